"""The front door: from a model to pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.denoisers import ClassifierFree, Clipped, Denoiser
from fewstep.errors import InvalidInputError
from fewstep.noise import Noise
from fewstep.plan import Plan, Progress
from fewstep.samplers import plan as make_plan
from fewstep.schedulers import Grid, make_grid

DEFAULT_SAMPLER, DEFAULT_SCHEDULER, DEFAULT_STEPS = "dpmpp_2m", "trailing", 20


@dataclass(frozen=True)
class Samples:
    """Pictures and how they were made.

    Attributes:
        images: Shape (n, C, H, W), nominally in [-1, 1], on the CPU.
        record: Everything needed to make them again; saved inside every PNG.
    """

    images: Tensor
    record: dict[str, Any]

    def uint8(self) -> Tensor:
        """The pictures as bytes, shape (n, C, H, W), 0..255."""
        from fewstep.data import to_uint8

        return to_uint8(self.images)

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write one picture of all images, or, for a path without a suffix, one file each into that folder.

        Returns:
            The files.

        Raises:
            DataError: If a file cannot be written; files that existed before survive.
        """
        from fewstep.data import image_grid, save_folder, save_image

        target = Path(path)
        if target.suffix and not os.fspath(path).endswith(("/", os.sep)):
            save_image(target, image_grid(self.images), self.record)
            return [target]
        return save_folder(target, self.images, [self._record_of(k) for k in range(len(self))])

    def __len__(self) -> int:
        return len(self.images)

    def _record_of(self, k: int) -> dict[str, Any]:
        own = {
            name: [self.record[name][k]]
            for name in ("seeds", "labels")
            if self.record[name] is not None
        }
        return {**self.record, **own}


def sample(
    model: Denoiser,
    n: int | None = None,
    *,
    shape: Sequence[int] | None = None,
    sampler: str | Callable[..., Any] = DEFAULT_SAMPLER,
    scheduler: str | Grid = DEFAULT_SCHEDULER,
    steps: int = DEFAULT_STEPS,
    seed: int | Sequence[int] = 0,
    labels: int | Sequence[int] | None = None,
    guidance: float = 1.0,
    clip: bool = False,
    sampler_options: Mapping[str, Any] | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Samples:
    """Make pictures from noise.

    Args:
        model: A model from `fewstep.load`, or any `fewstep.Denoiser`.
        n: How many; by default as many as there are seeds or labels, else 1.
        shape: Shape of one picture, (C, H, W); a loaded model knows its own. A shape (n, C, H, W) gives n as well.
        sampler: Name of a sampler, or a function of your own.
        scheduler: Name of a scheduler, or a `Grid`, which is run as given.
        steps: Number of steps; not used with a Grid or a plan.
        seed: The first picture's seed, the next one's being one higher; or one seed for each picture. A picture depends on
            its own seed alone, not on the others, the batch size or the device.
        labels: A class for all pictures, or one for each; None for none.
        guidance: Classifier-free guidance scale for models with labels; 1 is off.
        clip: Whether the estimates of x_0 are clipped to [-1, 1].
        sampler_options: Options of the sampler.
        scheduler_options: Options of the scheduler.
        plan: A ready Plan, in place of sampler, scheduler and steps.
        batch_size: Pictures that go through the network together.
        device: Where to compute; by default where the model is.
        on_step: Called after each network call of each batch.

    Returns:
        The pictures and their record.

    Raises:
        UnknownNameError: If a sampler, scheduler or option does not exist; names the nearest.
        InvalidInputError: If something is out of range or does not fit together.
        NonFiniteError: If the network's output is not finite.

    >>> import fewstep as fs
    >>> denoiser = fs.exact.GaussianMixture(torch.zeros(1, 2), 1.0, process=fs.process.vp_linear())
    >>> fs.sample(denoiser, shape=(4, 2), steps=5).images.shape
    torch.Size([4, 2])
    """
    n, shape = _count_and_shape(model, n, shape, seed, labels)
    seeds = _seeds(seed, n)
    classes = _labels(model, labels, n)
    if plan is None:
        options = dict(scheduler_options or {})
        grid = (
            scheduler
            if isinstance(scheduler, Grid)
            else make_grid(scheduler, model.process, steps, **options)
        )
        plan = make_plan(sampler, grid, **dict(sampler_options or {}))
    if plan.process != model.process:
        raise InvalidInputError(
            f"the plan is for {plan.process}, the model has {model.process}; make the plan for the model's"
        )
    if batch_size < 1:
        raise InvalidInputError(f"batch_size must be at least 1, got {batch_size}")
    where = torch.device(device) if device is not None else _device(model)
    images = []
    for first in range(0, n, batch_size):
        part = slice(first, first + batch_size)
        denoiser = _conditioned(model, classes[part] if classes else None, guidance, where)
        noise = Noise(seeds[part], shape, where)
        x = plan.levels[0].sigma * noise.initial()
        images.append(plan.run(Clipped(denoiser) if clip else denoiser, x, noise, on_step).cpu())
    record = {
        "software": f"fewstep {version('fewstep')}",
        "model": getattr(model, "name", type(model).__name__),
        "sampler": plan.sampler,
        "sampler_options": dict(plan.options),
        "scheduler": plan.scheduler,
        "scheduler_options": dict(plan.scheduler_options),
        "steps": len(plan.levels) - 1,
        "network_calls": plan.calls,
        "guidance": guidance,
        "clip": clip,
        "seeds": seeds,
        "labels": classes,
        "times": [_plain(level.t) for level in plan.levels],
        "sigma_over_alpha": [_plain(level.ratio) for level in plan.levels],
    }
    return Samples(torch.cat(images), record)


def _count_and_shape(
    model: Denoiser, n: int | None, shape: Sequence[int] | None, seed: Any, labels: Any
) -> tuple[int, tuple[int, ...]]:
    own = getattr(model, "shape", None)
    if shape is None and own is None:
        raise InvalidInputError(
            "this denoiser does not know the shape of its pictures; give shape=(channels, height, width)"
        )
    full = tuple(shape if shape is not None else own)  # type: ignore[arg-type]
    if own is not None and shape is not None and full != tuple(own):
        if full[1:] != tuple(own):
            raise InvalidInputError(
                f"shape {full} does not fit a model of {tuple(own)}; leave shape out"
            )
        n, full = full[0] if n is None else n, tuple(own)
    elif own is None and len(full) == 4:
        n, full = full[0] if n is None else n, full[1:]
    counts = {len(v) for v in (seed, labels) if isinstance(v, Sequence)} | (
        {n} if n is not None else set()
    )
    if len(counts) > 1:
        raise InvalidInputError(
            f"n, the seeds and the labels ask for different numbers of pictures: {sorted(counts)}"
        )
    count = counts.pop() if counts else 1
    if count < 1:
        raise InvalidInputError(f"n must be at least 1, got {count}")
    return count, full


def _seeds(seed: int | Sequence[int], n: int) -> list[int]:
    return list(seed) if isinstance(seed, Sequence) else [seed + k for k in range(n)]


def _labels(model: Denoiser, labels: int | Sequence[int] | None, n: int) -> list[int] | None:
    if labels is None:
        return None
    classes = [labels] * n if isinstance(labels, int) else list(labels)
    known = getattr(model, "num_classes", None)
    if known == 0:
        raise InvalidInputError("this model was trained without labels; leave labels out")
    if known is not None and (bad := [c for c in classes if not 0 <= c < known]):
        raise InvalidInputError(f"label {bad[0]} is not one of the model's classes 0..{known - 1}")
    return classes


def _conditioned(
    model: Denoiser, classes: list[int] | None, guidance: float, where: torch.device
) -> Denoiser:
    if classes is None:
        if guidance != 1:
            raise InvalidInputError(
                f"guidance={guidance} needs labels to push towards; give labels, or guidance=1"
            )
        return model
    denoiser = model.with_conditions(labels=torch.tensor(classes, device=where))
    if guidance == 1:
        return denoiser
    null = getattr(model, "num_classes", None)
    if null is None:
        raise InvalidInputError(
            "only a loaded model knows its null label; wrap this one in fewstep.ClassifierFree yourself"
        )
    return ClassifierFree(denoiser, guidance, null={"labels": null})


def _device(model: Denoiser) -> torch.device:
    parameters = getattr(model.network, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return first.device if first is not None else torch.device("cpu")


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
