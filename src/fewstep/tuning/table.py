"""A deterministic Plan as the numbers that tuning changes: where it calls the network, and how it mixes the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.errors import InvalidInputError
from fewstep.plan import Denoise, Plan, Tape, Vector, trace
from fewstep.plan.rules import expand
from fewstep.process import Level
from fewstep.schedulers import Grid


@dataclass(frozen=True, eq=False)
class Table:
    """Points of a deterministic method, `x_k = r_k x_T + (alpha_k - r_k alpha_T) sum_j mix_kj D_j`.

    `r_k = sigma_k / sigma_T` is the start's share, which the noise rule demands; by the signal rule each row of `mix`
    sums to 1. So a method with n calls is n levels and a triangle of mixing weights, and nothing else.

    Attributes:
        grid: The n + 1 levels, the last one that of the result.
        mix: Weights of the estimates D_j in the points k = 1..n, shape (n, n), zero above the diagonal.
    """

    grid: Grid
    mix: np.ndarray

    @property
    def calls(self) -> int:
        """Network calls."""
        return len(self.mix)

    def plan(self, name: str, **options: object) -> Plan:
        """The table as a Plan."""
        first, *later = self.grid.levels

        def follow(tape: Tape, grid: Grid, **_: object) -> Vector:
            x, estimates = tape.start, []
            for level, following, weights in zip(self.grid.levels, later, self.mix, strict=False):
                estimates.append(tape.denoise(x, level))
                kept = following.sigma / first.sigma
                x = kept * tape.start
                for weight, estimate in zip(weights, estimates, strict=False):
                    x = x + (following.alpha - kept * first.alpha) * weight * estimate
            return x

        return trace(follow, self.grid, name, **options)


def table_of(plan: Plan) -> Table:
    """Write a Plan out as a table.

    Raises:
        InvalidInputError: If it draws noise, needs guidance or derivatives, breaks a rule, or goes back in level.
    """
    calls = [i for i in plan.instructions if isinstance(i, Denoise)]
    other = plan.draws or plan.inexact or len(calls) != plan.calls
    if other or any(call.weak is not None for call in calls):
        raise InvalidInputError(
            f"{plan.name} cannot be tuned: only deterministic samplers that ask for plain estimates can; "
            "take unipc, dpmpp_2m or ddim"
        )
    levels: Sequence[Level] = [*(i.level for i in calls), plan.levels[-1]]
    if any(not s.ratio < t.ratio for t, s in zip(levels, levels[1:], strict=False)):
        raise InvalidInputError(
            f"{plan.name} cannot be tuned: it goes back to levels that it has passed; take unipc or dpmpp_2m"
        )
    first = levels[0]
    rows = []
    for row in list(expand(plan.instructions, plan.result, plan.levels[-1]))[1:]:
        kept = row.level.sigma / first.sigma
        rows.append(row.outputs / (row.level.alpha - kept * first.alpha))
    grid = Grid(plan.process, tuple(levels), plan.scheduler, plan.scheduler_options)
    return Table(grid, np.array(rows))
