"""What a Plan must satisfy on a data set of one point, where every estimate of x_0 is exact.

There each point must land on the marginal of its own level, `alpha x_0 + sigma noise`:

- signal rule: coefficient on the start times its alpha, plus those on the network outputs, equals alpha;
- noise rule: `(R sigma_0)^2 + sum E_m^2 = sigma^2`, R the coefficient on the start, E_m those on the draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.plan.instructions import (
    CALLS,
    Combine,
    Denoise,
    Differentiate,
    Draw,
    Instruction,
    reads,
    writes,
)
from fewstep.process import Level

TOLERANCE = 1e-8
ROUNDING = 1e-12
"""What is left where coefficients cancel in float64, of the start or of large multiples of the network's outputs."""


@dataclass(frozen=True)
class Row:
    """A point written out in the start, the network outputs and the noise draws.

    Attributes:
        name: Which point it is.
        level: The level it belongs to.
        start: Coefficient on the start.
        outputs: Coefficients on the estimates of x_0, in the order of the calls; a guided pair has two.
        slopes: Coefficients on the derivatives of the estimate, which vanish on a data set of one point.
        draws: Coefficients on the noise draws, in order.
        along: The direction of a derivative that is taken at the point.
    """

    name: str
    level: Level
    start: float
    outputs: np.ndarray
    slopes: np.ndarray
    draws: np.ndarray
    along: Row | None = None


def expand(program: Sequence[Instruction], result: int, last: Level) -> Iterator[Row]:
    """Write every evaluated point, and the result, out in the start, the outputs and the draws."""
    outputs = [r for i in program if isinstance(i, Denoise) for r in writes(i)]
    slopes = [i.out for i in program if isinstance(i, Differentiate)]
    draws = [i.out for i in program if isinstance(i, Draw)]
    columns = {register: k for k, register in enumerate([0, *outputs, *slopes, *draws])}
    parts = np.cumsum([1, len(outputs), len(slopes)])
    last_use = {register: k for k, i in enumerate(program) for register in reads(i)}
    rows = {0: np.eye(1, len(columns))[0]}

    def row(name: str, register: int, level: Level, along: Row | None = None) -> Row:
        start, *others = np.split(rows[register], parts)
        return Row(name, level, float(start[0]), *others, along=along)

    call = 0
    for k, instruction in enumerate(program):
        if isinstance(instruction, CALLS):
            call += 1
            along = None
            if isinstance(instruction, Differentiate):
                along = row(f"the direction of call {call}", instruction.along, instruction.level)
            yield row(
                f"the point of network call {call}", instruction.point, instruction.level, along
            )
        if isinstance(instruction, Combine):
            terms = [c * rows[register] for register, c in instruction.terms]
            rows[instruction.out] = np.sum(terms, axis=0)
        else:
            for register in writes(instruction):
                rows[register] = np.eye(1, len(columns), columns[register])[0]
        for register in reads(instruction):
            if last_use[register] == k and register != result:
                rows.pop(register, None)
    yield row("the result", result, last)


def broken_rules(
    program: Sequence[Instruction], result: int, first: Level, last: Level
) -> Iterator[tuple[str, str]]:
    """Yield (rule, description) for each rule that the program breaks."""
    broken: set[str] = set()
    for row in expand(program, result, last):
        signal = row.start * first.alpha + row.outputs.sum()
        size = abs(row.start) * first.alpha + np.abs(row.outputs).sum() + row.level.alpha
        if "signal" not in broken and not abs(signal - row.level.alpha) <= TOLERANCE * size:
            broken.add("signal")
            yield (
                "signal",
                f"{row.name} carries {signal:.9g} of the data where its level has alpha={row.level.alpha:.9g}",
            )
        noise = np.hypot(row.start * first.sigma, np.linalg.norm(row.draws))
        lost = ROUNDING * (first.sigma + np.abs(row.outputs).sum())
        size = TOLERANCE * (noise + row.level.sigma) + lost
        if "noise" not in broken and not abs(noise - row.level.sigma) <= size:
            broken.add("noise")
            yield (
                "noise",
                f"{row.name} carries noise of size {noise:.9g} where its level has sigma={row.level.sigma:.9g}",
            )
