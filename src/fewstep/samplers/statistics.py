"""What DPM-Solver-v3 knows of a model beforehand: how its estimate answers to each element of the point, on average."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from fewstep.errors import CheckpointError, InvalidInputError
from fewstep.process import Level, Process, log_snr_step
from fewstep.samplers.steps import Output, exponential_rule

NOISIEST, LEAST_NOISY = 200.0, 1e-3
"""Range of sigma / alpha in which statistics are taken; beyond, those at its ends hold."""

NEARBY = 0.02
"""Change of the point, in units of its noise, that tells how the estimate answers."""

SHARED, FLAT = 20.0, 1e-8
"""What holds each line fast: pictures' worth of the line through all elements, and of no change at all."""


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """Three numbers for each element of a picture and each of many levels; between the levels they are linear.

    With `x^ = x / alpha` the ODE is `dx^ / dlog_snr = -l x^ - f` for the remainder `f = (1 - l) x^ - D`, whose own
    change is about `df / dlog_snr = s f + b`. `l = 1, s = b = 0` is the data form, `l = 0, s = -1, b = 0` the noise
    form, for every model; those of a model leave least for the sampler to find out.

    Args:
        log_snr: The levels, rising, shape (K,), K >= 2.
        l: Shape (K, *shape of a picture), or one that broadcasts to it.
        s: Likewise.
        b: Likewise.
        model: Name of the model.

    Raises:
        InvalidInputError: If shapes do not fit, a number is not finite, or the levels do not rise.

    Source: Zheng et al. 2023, arXiv 2310.13268, section 3.
    """

    log_snr: Tensor
    l: Tensor  # noqa: E741  the paper's name
    s: Tensor
    b: Tensor
    model: str = ""

    def __post_init__(self) -> None:
        tables = {"log_snr": self.log_snr, "l": self.l, "s": self.s, "b": self.b}
        for name, table in tables.items():
            object.__setattr__(self, name, table.double().cpu())
            if not bool(torch.isfinite(table).all()):
                raise InvalidInputError(
                    f"statistics: {name} holds a NaN or infinity; take them again"
                )
        knots, shapes = self.log_snr, {table.shape for table in (self.l, self.s, self.b)}
        if knots.ndim != 1 or len(knots) < 2 or not bool((knots.diff() > 0).all()):
            raise InvalidInputError(
                f"statistics: log_snr of shape {tuple(knots.shape)} must be a rising list of 2 or more levels"
            )
        if len(shapes) > 1 or self.l.ndim < 1 or len(self.l) != len(knots):
            raise InvalidInputError(
                f"statistics: l, s and b must have one shape, the first dimension that of log_snr, {len(knots)}"
            )

    def at(self, log_snr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """l, s and b at some levels, shape (levels, *shape)."""
        after = torch.searchsorted(self.log_snr, log_snr).clamp(1, len(self.log_snr) - 1)
        low, high = self.log_snr[after - 1], self.log_snr[after]
        place = ((log_snr - low) / (high - low)).clamp(0, 1)
        place = place.view(-1, *(1,) * (self.l.ndim - 1))
        one, two, three = (
            table[after - 1] + place * (table[after] - table[after - 1])
            for table in (self.l, self.s, self.b)
        )
        return one, two, three

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file.

        Raises:
            CheckpointError: If it cannot be written.
        """
        from safetensors.torch import save

        tables = {name: getattr(self, name).contiguous() for name in ("log_snr", "l", "s", "b")}
        try:
            Path(path).write_bytes(save(tables, {"format": _FORMAT, "model": self.model}))
        except OSError as error:
            raise CheckpointError(
                f"cannot write {os.fspath(path)!r}: {error}; choose another place"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            CheckpointError: If there is no such file, or it is something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                about = file.metadata() or {}
                tables = {name: file.get_tensor(name) for name in ("log_snr", "l", "s", "b")}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path!r} holds no model statistics ({str(error).splitlines()[0]}); make the file with: "
                "fewstep statistics MODEL --out FILE"
            ) from error
        return cls(**tables, model=about.get("model", ""))

    def __str__(self) -> str:
        shape = "x".join(map(str, self.l.shape[1:])) or "one number"
        return f"statistics of {self.model or 'a model'}, {len(self.log_snr)} levels of {shape}"


_FORMAT = "fewstep-statistics"


class Estimator(Protocol):
    """An estimator of x_0 that knows its process, such as a `fewstep.Denoiser`."""

    process: Process

    def __call__(self, x: Tensor, level: Level, /) -> Tensor:
        """Estimate x_0."""
        ...


@torch.no_grad()
def model_statistics(
    denoiser: Estimator,
    shape: Sequence[int],
    n: int = 64,
    *,
    seed: int = 0,
    levels: int = 120,
    batch_size: int = 16,
    on_level: Callable[[int, int], None] | None = None,
) -> ModelStatistics:
    """Take the statistics of a model for `dpm_solver_v3`, on pictures that it makes itself in as many steps.

    `l = 1 - E diag(dD / dx^)`, so that f answers least to x^; the diagonal is Hutchinson's, `E v (dD / dx^ v)` with
    random signs v, the same at all levels. s and b are the regression of `df / dlog_snr` along the ODE on f, element by
    element; because few pictures tell little of one element, those of all together count as `SHARED` pictures more.

    Args:
        denoiser: The model; conditions that it has, one for each picture, are shared out.
        shape: Shape of a picture.
        n: How many pictures, >= 2.
        seed: Of the starting noise and the signs.
        levels: How many levels, >= 3, at equal distances in log_snr over the range of the process.
        batch_size: Pictures that go through the network together.
        on_level: Called after each level with its number and how many there are.

    Returns:
        The statistics. They took `3 n levels` passes of the network.

    Raises:
        InvalidInputError: If a number is out of range.

    >>> import torch, fewstep as fs
    >>> gaussian = fs.exact.GaussianMixture(torch.zeros(1, 2), 1.0, process=fs.process.vp_linear())
    >>> statistics = model_statistics(gaussian, (2,), n=4, levels=101)
    >>> l, s, b = statistics.at(torch.zeros(1))  # where D = x^ / 2
    >>> [round(float(value), 2) for value in l[0]]
    [0.5, 0.5]

    Source: Zheng et al. 2023, arXiv 2310.13268, section 3.1.2 and appendix C.1; the shared part is ours.
    """
    for name, value, least in (("n", n, 2), ("levels", levels, 3), ("batch_size", batch_size, 1)):
        if value < least:
            raise InvalidInputError(f"statistics: {name}={value} must be at least {least}")
    generator, size, path = (
        torch.Generator().manual_seed(seed),
        (n, *shape),
        _path(denoiser.process, levels),
    )
    signs = torch.randint(0, 2, size, generator=generator).double() * 2 - 1
    x = path[0].sigma * torch.randn(size, generator=generator, dtype=torch.float64)
    outputs: list[Output[Tensor]] = []
    kept, remainders, lines = [], [], []
    for k, t in enumerate(path):
        parts = [_observed(d, x[i], signs[i], t) for i, d in _shares(denoiser, n, batch_size)]
        denoised, answer = (torch.cat(part).double() for part in zip(*parts, strict=True))
        kept.append((signs * answer).mean(0))
        remainders = [*remainders[-2:], kept[-1] * x / t.alpha - denoised]
        if len(remainders) == 3:
            lines.append(_line(remainders, log_snr_step(path[k - 2], t)))
        outputs = [Output(t, denoised), *outputs[:1]]
        if k + 1 < len(path):
            x = exponential_rule(x, outputs, path[k + 1])
        if on_level is not None:
            on_level(k + 1, len(path))
    log_snr = torch.tensor([t.log_snr for t in path], dtype=torch.float64)
    s, b = (torch.stack([v[0], *v, v[-1]]) for v in zip(*lines, strict=True))
    return ModelStatistics(log_snr, 1 - torch.stack(kept), s, b, getattr(denoiser, "name", ""))


def _path(process: Process, count: int) -> list[Level]:
    """Levels at equal distances in log_snr, noisy to clean, as far as the process goes."""
    ends = min(process.noisiest.ratio, NOISIEST), max(process.least_noisy.ratio, LEAST_NOISY)
    first, last = (math.log(end) for end in ends)
    return process.levels_at(
        torch.linspace(first, last, count, dtype=torch.float64).exp().tolist()
    )


def _shares(denoiser: Any, n: int, size: int) -> Iterator[tuple[slice, Any]]:
    """Batches of the pictures, and the denoiser with their share of the conditions."""
    conditions = getattr(denoiser, "conditions", {})
    for first in range(0, n, size):
        rows = slice(first, first + size)
        own = {
            name: value[rows]
            for name, value in conditions.items()
            if isinstance(value, Tensor) and value.ndim and len(value) == n
        }
        yield rows, denoiser.with_conditions(**own) if own else denoiser


def _observed(denoiser: Any, x: Tensor, signs: Tensor, t: Level) -> tuple[Tensor, Tensor]:
    """The estimate, and how it answers to a change of x^ by the signs, for a change by a little of the noise."""
    where = getattr(denoiser, "device", None) or x.device
    x, change = (
        value.to(where, torch.float32 if where.type == "mps" else x.dtype) for value in (x, signs)
    )
    change = NEARBY * t.sigma * change
    answer = (denoiser(x + change, t) - denoiser(x - change, t)) / (2 * NEARBY * t.ratio)
    return denoiser(x, t).cpu(), answer.cpu()


def _line(remainders: Sequence[Tensor], width: float) -> tuple[Tensor, Tensor]:
    """The least-squares line `s f + b` of `df / dlog_snr` over f, from f at three levels."""
    before, f, after = remainders
    change = (after - before) / width
    mean, mean_change = f.mean(0), change.mean(0)
    variance = (f - mean).square().mean(0)
    together = ((f - mean) * (change - mean_change)).mean(0)
    share = SHARED / len(f)
    flat = FLAT * f.square().mean() + torch.finfo(f.dtype).tiny
    s = (together + share * together.mean()) / (variance + share * variance.mean() + flat)
    return s, mean_change - s * mean
