"""What a plan is tuned towards: the converged ends, and the paths, of noise that is fixed once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.denoisers import BaseDenoiser, ClassifierFree
from fewstep.errors import InvalidInputError
from fewstep.noise import Noise
from fewstep.plan import Plan, Progress
from fewstep.process import Level
from fewstep.samplers import plan
from fewstep.schedulers import Grid
from fewstep.threads import spread
from fewstep.tuning.losses import Loss

TEACHER = "unipc"
TEACHER_OPTIONS = {"order": 3}


@dataclass(frozen=True)
class Conditioned:
    """Which denoiser belongs to which pictures.

    Attributes:
        model: The model without conditions of its own.
        conditions: Tensors with one row for each picture.
        guidance: Scale of classifier-free guidance; 1 is off.
    """

    model: BaseDenoiser
    conditions: dict[str, Tensor]
    guidance: float

    def rows(self, chosen: Tensor) -> BaseDenoiser:
        """The denoiser for these pictures."""
        own = {name: value[chosen.to(value.device)] for name, value in self.conditions.items()}
        denoiser = self.model.with_conditions(**own)
        if self.guidance == 1:
            return denoiser
        return ClassifierFree(denoiser, self.guidance, null={"labels": self.model.num_classes})


def conditioned(model: BaseDenoiser, count: int, guidance: float) -> Conditioned:
    """The model for so many pictures: its own conditions in turn, or else all classes alike.

    Raises:
        InvalidInputError: If guidance is asked of a model without classes.
    """
    if guidance != 1 and not model.num_classes:
        raise InvalidInputError(
            f"guidance={guidance:g} needs a model with classes; wrap other models in fewstep.ClassifierFree yourself"
        )
    rows = {
        name: value
        for name, value in model.conditions.items()
        if isinstance(value, Tensor) and value.ndim and len(value)
    }
    if model.num_classes and "labels" not in model.conditions:
        rows["labels"] = torch.arange(model.num_classes, device=model.device)
    turns = torch.arange(count)
    return Conditioned(
        model,
        {name: value[turns.to(value.device) % len(value)] for name, value in rows.items()},
        guidance,
    )


@dataclass(frozen=True)
class Lesson:
    """Noise and where it leads.

    Attributes:
        model: The denoisers of its pictures.
        noise: Standard normal, shape (N, ...).
        ends: The converged results, shape (N, ...).
    """

    model: Conditioned
    noise: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return len(self.noise)

    def part(self, chosen: Tensor) -> tuple[BaseDenoiser, Tensor, Tensor]:
        """The denoiser, the noise and the ends of some pictures."""
        where = chosen.to(self.noise.device)
        return self.model.rows(chosen), self.noise[where], self.ends[where]

    def error_of(self, made: Plan, batch_size: int, loss: Loss) -> float:
        """Root mean square of the loss of a plan's results."""

        def measured(rows: Tensor) -> tuple[float, int]:
            denoiser, noise, ends = self.part(rows)
            wrong = loss(made.run(denoiser, made.levels[0].sigma * noise), ends)
            return float(wrong.square().sum()), wrong.numel()

        parts = torch.arange(len(self)).split(batch_size)
        totals, counts = zip(*spread(measured, parts, self.noise.device), strict=True)
        return math.sqrt(sum(totals) / sum(counts))


def lesson(
    model: Conditioned,
    noise: Noise,
    grid: Grid,
    batch_size: int,
    on_share: Callable[[float], None] = lambda share: None,
) -> Lesson:
    """Carry noise to its converged ends on a fine grid; `on_share` is told the share that is done, 0..1."""
    start = noise.initial()
    fine = _teacher(grid)
    batches = torch.arange(len(start)).split(batch_size)

    def end(rows: Tensor) -> Tensor:
        return fine.run(model.rows(rows), grid.levels[0].sigma * start[rows.to(start.device)])

    ends = []
    for part in spread(end, batches, start.device):
        ends.append(part)
        on_share(len(ends) / len(batches))
    return Lesson(model, start, torch.cat(ends))


@dataclass(frozen=True)
class Path:
    """A converged path, written down at the levels of a fine grid.

    Attributes:
        levels: Its levels, the last one clean.
        points: The points, shape (levels, B, ...).
        estimates: The estimates of x_0 at all levels but the last, shape (levels - 1, B, ...).
    """

    levels: tuple[Level, ...]
    points: Tensor
    estimates: Tensor


def path(denoiser: BaseDenoiser, noise: Tensor, grid: Grid) -> Path:
    """Follow noise along a fine grid, and write down where it passes."""
    points, estimates = [], []

    def keep(step: Progress) -> None:
        points.append(step.x)
        estimates.append(step.denoised)

    end = _teacher(grid).run(denoiser, grid.levels[0].sigma * noise, on_step=keep)
    return Path(grid.levels, torch.stack([*points, end]), torch.stack(estimates))


def _teacher(grid: Grid) -> Plan:
    made = plan(TEACHER, grid, **TEACHER_OPTIONS)
    assert isinstance(made, Plan)
    return made
