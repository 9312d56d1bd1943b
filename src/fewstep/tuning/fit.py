"""Fitting a table to a model by gradient descent: where to call the network, and how to mix its answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.errors import NonFiniteError
from fewstep.plan import DenoiserLike
from fewstep.process import Level, Process
from fewstep.samplers import plan
from fewstep.schedulers import Grid
from fewstep.tuning.table import Table, table_of

NEARBY = 0.02
"""Distance in log_snr at which estimates are compared to learn how they depend on the level.

Far enough to see the trend: the derivative of a trained network by the level is much rougher than that.
"""

TRACED_NEARBY = 1e-4
"""The same for the mixing weights, which are smooth."""

LEVELS_RATE, MIX_RATE = 0.03, 0.01
"""Learning rates of the logarithms of the increments and of the mixing weights."""

LEAST_STEP = 1e-3
"""Shortest step in log_snr that levels may come to."""

Loss = Callable[[Tensor, Tensor], Tensor]


class Levels(torch.nn.Module):
    """The log_snr of n calls: the first is fixed, the others divide the range below it by a softmax of increments.

    The last increment leads from the last call to the end of the range, so that the last call is free as well.
    """

    def __init__(self, process: Process, log_snrs: list[float]) -> None:
        super().__init__()
        self.process = process
        self.first = log_snrs[0]
        self.low = max(self.first, process.log_snr(process.table_time(process.training_steps - 2)))
        self.high = max(process.least_noisy.log_snr, log_snrs[-1] + 1e-3)
        steps = np.diff([self.low, *log_snrs[1:], self.high])
        self.free = self.high - self.low - len(steps) * LEAST_STEP
        share = np.maximum(steps - LEAST_STEP, LEAST_STEP) / self.free
        self.increments = torch.nn.Parameter(torch.tensor(np.log(share), dtype=torch.float64))

    def forward(self) -> Tensor:
        """The log_snr of the calls, float64, shape (n,)."""
        steps = LEAST_STEP + self.free * self.increments.softmax(0)
        inner = self.low + steps.cumsum(0)[:-1]
        return torch.cat([inner.new_tensor([self.first]), inner])

    def grid(self) -> Grid:
        """The levels as they are now, and clean data."""
        return grid_at(self.process, self().tolist())


def grid_at(process: Process, log_snrs: list[float]) -> Grid:
    """The grid of these levels and clean data."""
    ratios = [*(math.exp(-value) for value in log_snrs), 0.0]
    return Grid(process, tuple(process.levels_at(ratios)), "learned")


def slack(log_snrs: Tensor) -> Tensor:
    """Zeros that follow the levels when differentiated: all but the first, which is fixed and may be infinite."""
    later = log_snrs[1:]
    return torch.cat([later.new_zeros(1), later - later.detach()])


@dataclass(frozen=True)
class Base:
    """The sampler whose mixing weights tuning starts from and follows as the levels move."""

    sampler: str
    options: dict[str, Any]
    process: Process

    def mix(self, log_snrs: list[float]) -> np.ndarray:
        """Its mixing weights at these levels."""
        traced = plan(self.sampler, grid_at(self.process, log_snrs), **self.options)
        return table_of(traced).mix  # type: ignore[arg-type]

    def mix_and_slopes(self, log_snrs: list[float]) -> tuple[Tensor, Tensor]:
        """The mixing weights, shape (n, n), and their derivatives by each log_snr, shape (n, n, n)."""
        here = self.mix(log_snrs)
        slopes = [np.zeros_like(here)]  # the first level is fixed
        for k in range(1, len(log_snrs)):
            moved = list(log_snrs)
            moved[k] += TRACED_NEARBY
            slopes.append((self.mix(moved) - here) / TRACED_NEARBY)
        return torch.from_numpy(here), torch.from_numpy(np.stack(slopes, axis=-1))


class TunedTable(torch.nn.Module):
    """A table whose levels and mixing weights can be fitted.

    Args:
        base: The sampler whose mixing weights are changed.
        start: The table to start from.
    """

    def __init__(self, base: Base, start: Table) -> None:
        super().__init__()
        log_snrs = [level.log_snr for level in start.grid.levels[:-1]]
        self.base, self.levels = base, Levels(base.process, log_snrs)
        change = np.tril(start.mix - base.mix(log_snrs))
        self.change = torch.nn.Parameter(torch.from_numpy(change))

    def mix(self, log_snrs: Tensor) -> Tensor:
        """The mixing weights at these levels: the base's, plus a change whose rows sum to zero."""
        here, slopes = self.base.mix_and_slopes(log_snrs.tolist())
        free = torch.ones_like(self.change).tril()
        change = self.change * free
        change = change - free * (change.sum(1, keepdim=True) / free.sum(1, keepdim=True))
        return here + (slopes * slack(log_snrs)).sum(-1) + change

    @torch.no_grad()
    def table(self) -> Table:
        """The table as it is now."""
        return Table(self.levels.grid(), self.mix(self.levels()).numpy())

    def forward(self, denoiser: DenoiserLike, noise: Tensor) -> Tensor:
        """Run the table on standard normal noise, shape (B, ...); differentiable by everything that is fitted."""
        log_snrs = self.levels()
        mix, moved = self.mix(log_snrs), slack(log_snrs)
        first, *later = self.levels.grid().levels
        path = self.base.process.path
        ratios = (-log_snrs[1:]).exp()
        clean = torch.ones(1, dtype=torch.float64)
        kept = torch.cat([path.sigma_of(ratios) / first.sigma, 0 * clean])
        share = torch.cat([path.alpha_of(ratios), clean]) - kept * first.alpha
        start = first.sigma * noise
        x, estimates = start, []
        for k, level in enumerate((first, *later[:-1])):
            estimates.append(_estimate(denoiser, x, level, moved[k], self.base.process))
            x = kept[k].to(noise) * start
            for weight, estimate in zip(mix[k], estimates, strict=False):
                x = x + (share[k] * weight).to(noise) * estimate
        return x


def _estimate(
    denoiser: DenoiserLike, x: Tensor, level: Level, moved: Tensor, process: Process
) -> Tensor:
    """The estimate of x_0, differentiable by the point and, to first order, by the level."""
    if not x.requires_grad:  # the first call, whose point and level are fixed
        with torch.no_grad():
            return denoiser(x, level)
    value: Any = checkpoint(denoiser, x, level, use_reentrant=False)
    with torch.no_grad():
        beside = process.levels_at([level.ratio * math.exp(-NEARBY)])[0]
        slope = (denoiser(x.detach(), beside) - value) / NEARBY
    return value + moved.to(x) * slope


def mean_square(x: Tensor, target: Tensor) -> Tensor:
    """`mean (x - target)^2`."""
    return (x - target).square().mean()


def fit(
    tuned: TunedTable,
    batches: Iterator[tuple[DenoiserLike, Tensor, Tensor]],
    steps: int,
    *,
    loss: Loss = mean_square,
    rate: float = 1.0,
) -> Iterator[float]:
    """Gradient descent by Adam with cosine decay; yields the loss of each step, after the step.

    Args:
        tuned: What is fitted, in place.
        batches: For each step a denoiser, the noise and the converged results that belong to it.
        steps: How many.
        loss: Of results and converged results.
        rate: Factor on the learning rates.

    Raises:
        NonFiniteError: If the loss or its gradient is not finite; that step is not taken.
    """
    parameters = [tuned.levels.increments, tuned.change]
    rates = [LEVELS_RATE * rate, MIX_RATE * rate]
    optimiser = torch.optim.Adam(
        [{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)],
        betas=(0.9, 0.99),
    )
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(1, steps + 1):
        denoiser, noise, target = next(batches)
        with torch.enable_grad():
            value = loss(tuned(denoiser, noise), target)
            optimiser.zero_grad()
            value.backward()
        slopes = [p.grad for p in parameters if p.grad is not None]
        if not all(bool(v.isfinite().all()) for v in (value, *slopes)):
            raise NonFiniteError(f"the loss or its gradient is not finite at step {step}")
        optimiser.step()
        decay.step()
        yield float(value.detach())
