"""A deterministic Plan as the numbers that tuning changes: where it calls the network, and how it mixes the answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from fewstep.errors import InvalidInputError
from fewstep.plan import Denoise, DenoiserLike, Plan, Tape, Vector, trace
from fewstep.plan.rules import expand
from fewstep.process import Level, Process
from fewstep.schedulers import Grid

State = TypeVar("State", Tensor, Vector)


@dataclass(frozen=True, eq=False)
class Table:
    """Points of a deterministic method, `x_k = starts_k z + sum_j weights_kj D(x_j, level_j)` over j < k, z the noise.

    Every Plan that draws no noise and asks for plain estimates can be written so; x_n is its result. A usual sampler
    keeps the noise rule, `starts_k = sigma_k`, and the signal rule, which fixes the sum of each row of weights. A table
    need not: a start that differs from its level's sigma asks the network at another level than the point lies at.

    Attributes:
        grid: The n levels of the calls, and that of the result.
        starts: Coefficients on the noise, shape (n + 1,).
        weights: Coefficients of point k + 1 on the estimates 0..k, shape (n, n), zero above the diagonal.
    """

    grid: Grid
    starts: np.ndarray
    weights: np.ndarray

    @property
    def calls(self) -> int:
        """Network calls."""
        return len(self.weights)

    @property
    def log_snrs(self) -> np.ndarray:
        """log_snr of the calls, within `log_snr_bounds`."""
        levels = self.grid.levels[: self.calls]
        return np.clip([level.log_snr for level in levels], *log_snr_bounds(self.grid.process))

    def point(self, k: int, noise: State, estimates: Sequence[State]) -> State:
        """The point x_k, of the noise and the k estimates before it; of tensors, or of a tape's vectors."""
        x = noise * float(self.starts[k])
        for weight, estimate in zip(self.weights[k - 1, :k], estimates, strict=False):
            x = x + estimate * float(weight)
        return x

    def estimates(
        self, denoiser: DenoiserLike, noise: Tensor, known: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """The estimates of all calls, of which the first ones may be known already."""
        found = list(known)
        for k in range(len(found), self.calls):
            found.append(denoiser(self.point(k, noise, found), self.grid.levels[k]))
        return found

    def plan(self, name: str, **options: object) -> Plan:
        """The table as a Plan."""
        sigma = self.grid.levels[0].sigma

        def follow(tape: Tape, grid: Grid, **_: object) -> Vector:
            tape.declare_inexact("signal")
            tape.declare_inexact("noise")
            start, estimates = tape.start / sigma, []
            for k, level in enumerate(self.grid.levels[:-1]):
                estimates.append(tape.denoise(self.point(k, start, estimates), level))
            return self.point(self.calls, start, estimates)

        return trace(follow, self.grid, name, **options)

    def widened(self) -> Table:
        """A table of one call more and the same result: nothing reads the new call yet.

        It lies in the widest gap of log_snr between two calls, at the point that the later one's mix gives there, so
        that a fit finds a sensible estimate to begin with.
        """
        levels, process = self.grid.levels, self.grid.process
        log_snrs = self.log_snrs
        k = int(np.diff(log_snrs).argmax()) + 1
        (level,) = process.levels_at([math.exp(-log_snrs[k - 1 : k + 1].mean())])
        mix = self.weights[k - 1] * level.alpha / self.weights[k - 1].sum()
        return Table(
            Grid(process, (*levels[:k], level, *levels[k:]), self.grid.scheduler),
            np.insert(self.starts, k, level.sigma),
            np.insert(np.insert(self.weights, k - 1, mix, axis=0), k, 0.0, axis=1),
        )


def log_snr_bounds(process: Process) -> tuple[float, float]:
    """Least and largest log_snr that a network is trained on, pure noise left out."""
    low = process.noisiest.log_snr
    if math.isinf(low):
        low = process.log_snr(process.table_time(process.training_steps - 2))
    return low, process.least_noisy.log_snr


def table_of(plan: Plan) -> Table:
    """Write a Plan out as a table.

    Raises:
        InvalidInputError: If it draws noise, needs guidance or derivatives, or goes back in level.
    """
    calls = [i for i in plan.instructions if isinstance(i, Denoise)]
    if plan.draws or len(calls) != plan.calls or any(call.weak is not None for call in calls):
        raise InvalidInputError(
            f"{plan.name} cannot be tuned: only deterministic samplers that ask for plain estimates can; "
            "take unipc, dpmpp_2m or ddim"
        )
    levels: Sequence[Level] = [*(i.level for i in calls), plan.levels[-1]]
    if any(not s.ratio < t.ratio for t, s in zip(levels, levels[1:], strict=False)):
        raise InvalidInputError(
            f"{plan.name} cannot be tuned: it goes back to levels that it has passed; take unipc or dpmpp_2m"
        )
    rows = list(expand(plan.instructions, plan.result, plan.levels[-1]))
    if any(row.start <= 0 for row in rows[:-1]):
        raise InvalidInputError(
            f"{plan.name} cannot be tuned: it evaluates points without noise; take unipc, dpmpp_2m or ddim"
        )
    return Table(
        Grid(plan.process, tuple(levels), plan.scheduler, plan.scheduler_options),
        plan.levels[0].sigma * np.array([row.start for row in rows]),
        np.array([row.outputs for row in rows[1:]]),
    )
