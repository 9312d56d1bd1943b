"""DPM-Solver-v3: an exponential multistep method in the form that suits the model best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InvalidInputError
from fewstep.plan import EagerTape
from fewstep.process import Level, log_snr_step
from fewstep.registry import Option
from fewstep.samplers.registry import sampler
from fewstep.samplers.statistics import ModelStatistics
from fewstep.samplers.steps import Output, exponential_step, is_open
from fewstep.schedulers import Grid


@sampler(
    "dpm_solver_v3",
    title="DPM-Solver-v3",
    family="implicit",
    order=3,
    eager=True,
    paper="Zheng et al. 2023, arXiv:2310.13268",
    aliases=("dpmpp_v3", "dpm_v3"),
    needs=("statistics",),
)
def dpm_solver_v3(
    tape: EagerTape,
    grid: Grid,
    statistics: Annotated[
        ModelStatistics | None,
        Option("of the model; made with `fewstep statistics MODEL --out FILE`"),
    ] = None,
    order: Annotated[int, Option("number of remainders that a step looks at", 1, 3)] = 3,
    corrector: Annotated[
        bool, Option("mend each point by the estimate made there, at no network call")
    ] = True,
) -> Tensor:
    """Multistep method for the remainder that a model's own statistics l, s and b leave of its estimate.

    With `f = (1 - l) x^ - D` it solves `dx^ / dlog_snr = -l x^ - f` exactly where `df / dlog_snr - s f - b` vanishes,
    and else for `g = e^-S (f - ...)`, f with that change taken out, as a polynomial in log_snr. A step from pure noise
    or to clean data takes the estimate alone.
    """
    _check(statistics, tape.start)
    x, history, last = tape.start, [], None
    for t, s in grid.steps:
        denoised = tape.denoise(x, t)
        if not is_open(t, s):
            x, last = exponential_step(x, denoised, t, s), None
            continue
        assert statistics is not None
        kept = 1 - statistics.at(torch.tensor([t.log_snr]).double())[0][0].to(x)
        newest = Output(t, kept * x / t.alpha - denoised)
        if last is not None:
            stretch, start, outputs = last
            if corrector and len(outputs) > 1:
                there = Output(t, stretch.seen_from_start(newest.value))
                x = stretch.step(start, [outputs[0], there, *outputs[1:-1]])
            history = [Output(o.level, stretch.seen_from_end(o.value)) for o in outputs]
        outputs = [newest, *history][:order]
        stretch = Stretch.between(statistics, t, s, x, order)
        last = stretch, x, outputs
        x = stretch.step(x, outputs)
    return x


def _check(statistics: ModelStatistics | None, x: Tensor) -> None:
    if statistics is None:
        raise InvalidInputError(
            "dpm_solver_v3 needs the model's statistics; make them with fewstep statistics MODEL --out FILE, and give "
            "statistics=FILE"
        )
    own, wanted = tuple(statistics.l.shape[1:]), tuple(x.shape[1:])
    try:
        fits = torch.broadcast_shapes(own, wanted) == wanted
    except RuntimeError:
        fits = False
    if not fits:
        raise InvalidInputError(
            f"dpm_solver_v3: {statistics} do not fit pictures of shape {wanted}; make statistics of this model"
        )


@dataclass(frozen=True)
class Stretch:
    """The integrals of the statistics over one step, all from its start; each has the shape of a picture.

    Attributes:
        start: Where it starts.
        end: Where it ends.
        decay: `e^-L`, `L = int l`.
        growth: `e^S`, `S = int s`.
        shift: `B = int e^-S b`.
        drift: `int e^(L + S) B`.
        moments: `int e^(L + S) u^k`, u from 0 at the start to 1 at the end.
    """

    start: Level
    end: Level
    decay: Tensor
    growth: Tensor
    shift: Tensor
    drift: Tensor
    moments: tuple[Tensor, ...]

    @classmethod
    def between(
        cls, statistics: ModelStatistics, t: Level, s: Level, x: Tensor, count: int
    ) -> Stretch:
        """Integrate from t to s, for up to `count` outputs, in the type and place of x."""
        log_snr, widths = _points(statistics, t, s)
        l, rate, b = (  # noqa: E741
            table.unflatten(0, log_snr.shape) for table in statistics.at(log_snr.flatten())
        )

        def integral(values: Tensor) -> Tensor:
            """From the start to each point: inside the cells by the rule, and over all cells before."""
            inside = torch.einsum("ij,cj...->ci...", _INTEGRATE, values)
            inside = inside * widths.view(-1, *(1,) * (inside.ndim - 1))
            before = inside[:, -1:].cumsum(0) - inside[:, -1:]
            return inside + before

        decayed, grown = integral(l), integral(rate)
        shift, weight = integral((-grown).exp() * b), (decayed + grown).exp()
        place = (log_snr - t.log_snr) / log_snr_step(t, s)
        place = place.view(*place.shape, *(1,) * (l.ndim - 2))
        ends = (
            value[-1, -1].to(x)
            for value in (
                (-decayed).exp(),
                grown.exp(),
                shift,
                integral(weight * shift),
                *(integral(weight * place**k) for k in range(count + 1)),
            )
        )
        decay, growth, shift, drift, *moments = ends
        return cls(t, s, decay, growth, shift, drift, tuple(moments))

    def step(self, x: Tensor, outputs: Sequence[Output[Tensor]]) -> Tensor:
        """`x^ e^-L - e^-L int e^(L + S) (g + B)` with g the polynomial through the outputs, as seen from the start."""
        h = log_snr_step(self.start, self.end)
        places = [log_snr_step(self.start, output.level) / h for output in outputs]
        solve = np.linalg.inv(np.vander(places, increasing=True).T)
        point = x / self.start.alpha - self.drift
        for row, output in zip(solve.tolist(), outputs, strict=True):
            weight = sum(c * moment for c, moment in zip(row, self.moments, strict=False))
            point = point - weight * output.value
        return self.end.alpha * self.decay * point

    def seen_from_end(self, value: Tensor) -> Tensor:
        """The g of an output for the step that starts where this one ends: `e^S (g + B)`; at that end it is f."""
        return self.growth * (value + self.shift)

    def seen_from_start(self, value: Tensor) -> Tensor:
        """The reverse."""
        return value / self.growth - self.shift


WIDEST = 0.25
"""Largest width of a cell of the quadrature, in log_snr."""

_NODES = (1 - np.cos(np.pi * np.arange(6) / 5)) / 2


def _integration(nodes: np.ndarray) -> Tensor:
    """The matrix that takes values at nodes in 0..1 to integrals from 0 to each, exact for polynomials."""
    powers = np.arange(len(nodes))
    to_coefficients = np.linalg.inv(np.vander(nodes, increasing=True))
    return torch.from_numpy(nodes[:, None] ** (powers + 1) / (powers + 1) @ to_coefficients)


_INTEGRATE = _integration(_NODES)


def _points(statistics: ModelStatistics, t: Level, s: Level) -> tuple[Tensor, Tensor]:
    """Points between t and s, shape (cells, nodes), and the cells' widths; cells end where the lines have kinks."""
    h = log_snr_step(t, s)
    even = torch.linspace(t.log_snr, s.log_snr, math.ceil(h / WIDEST) + 1, dtype=torch.float64)
    knots = statistics.log_snr
    inside = knots[(knots > t.log_snr) & (knots < s.log_snr)]
    edges = torch.cat([even, inside]).unique()
    widths = edges.diff()
    return edges[:-1, None] + widths[:, None] * torch.from_numpy(_NODES), widths
