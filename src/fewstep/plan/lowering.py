"""From a Plan to the fewest tensor operations on one kind of network.

A network's output F gives the estimate of x_0 as `D = skip x + out F` with numbers that depend on the level alone.
So wherever a Plan reads D, it can read x and F instead: the conversion costs nothing, and the division by a tiny
alpha or sigma happens in float64, in a coefficient, not on the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.plan.instructions import (
    Combine,
    Denoise,
    Differentiate,
    Draw,
    Evaluate,
    Instruction,
    reads,
    writes,
)
from fewstep.process import Level


class LinearForm(Protocol):
    """How a network's output gives the estimate of x_0."""

    def skip_out(self, level: Level) -> tuple[float, float]:
        """The numbers of `D = skip x + out F` at a level."""
        ...


class Operation(NamedTuple):
    """One thing for the executor to do, laid out for its loop.

    Attributes:
        kind: The instruction's type.
        what: The instruction itself.
        first: The register that a sum starts from, or the point that is evaluated.
        factor: The coefficient of the first register of a sum, None for 1; then there is at least one more term.
        rest: The other terms of a sum.
        out: The register that is written.
        dead: Registers that nobody needs afterwards.
    """

    kind: type
    what: Instruction | Evaluate
    first: int
    factor: Tensor | None
    rest: tuple[tuple[int, float], ...]
    out: int
    dead: tuple[int, ...]


def lower(
    program: Sequence[Instruction], result: int, form: LinearForm | None
) -> tuple[Operation, ...]:
    """Order a program for the executor; a linear form folds the estimates of x_0 away where that saves work."""
    folded = list(program) if form is None else _fold(program, result, form)
    last_use = {register: k for k, i in enumerate(folded) for register in reads(i)}
    last_use[result] = len(folded)
    operations = []
    for k, instruction in enumerate(folded):
        dead = {r for r in reads(instruction) if last_use[r] == k}
        dead.update(r for r in writes(instruction) if r not in last_use)
        operations.append(
            Operation(
                type(instruction),
                instruction,
                *_start(instruction),
                instruction.out,
                tuple(sorted(dead)),
            )
        )
    return tuple(operations)


def _fold(
    program: Sequence[Instruction], result: int, form: LinearForm
) -> list[Instruction | Evaluate]:
    readers: dict[int, list[Instruction]] = {}
    for instruction in program:
        for register in reads(instruction):
            readers.setdefault(register, []).append(instruction)
    fresh = 1 + max((r for i in program for r in writes(i)), default=0)
    substitutes: dict[int, tuple[tuple[int, float], tuple[int, float]]] = {}
    lowered: list[Instruction | Evaluate] = []
    for instruction in program:
        match instruction:
            case Denoise(estimate, point, level, weak=None):
                skip, out = form.skip_out(level)
                if (skip, out) == (0.0, 1.0):  # the output is the estimate
                    lowered.append(Evaluate(estimate, point, level))
                    continue
                output, fresh = fresh, fresh + 1
                substitute = ((point, skip), (output, out))
                lowered.append(Evaluate(output, point, level))
                if estimate != result and _saves_work(readers.get(estimate, []), point):
                    substitutes[estimate] = substitute
                else:
                    lowered.append(Combine(estimate, substitute))
            case Combine(out, terms):
                lowered.append(Combine(out, _substituted(terms, substitutes)))
            case _:
                lowered.append(instruction)
    return lowered


def _saves_work(readers: Sequence[Instruction], point: int) -> bool:
    """Writing D out costs two operations; reading x and F costs one more per reader that does not read x anyway."""
    return (
        all(isinstance(r, Combine) for r in readers)
        and sum(point not in reads(r) for r in readers) <= 1
    )


def _substituted(
    terms: tuple[tuple[int, float], ...],
    substitutes: dict[int, tuple[tuple[int, float], tuple[int, float]]],
) -> tuple[tuple[int, float], ...]:
    total: dict[int, float] = {}
    for register, c in terms:
        for source, weight in substitutes.get(register, ((register, 1.0),)):
            total[source] = total.get(source, 0.0) + c * weight
    return tuple((register, c) for register, c in total.items() if c != 0.0)


def _start(
    instruction: Instruction | Evaluate,
) -> tuple[int, Tensor | None, tuple[tuple[int, float], ...]]:
    """First register, its factor and the other terms; a sum starts where the factor is 1, which needs no product."""
    match instruction:
        case Combine(terms=terms):
            # The rounding of the fold may leave a 1 off by an ulp or two.
            (register, c), *rest = sorted(terms, key=lambda term: abs(term[1] - 1.0) > 4e-16)
            unit = abs(c - 1.0) <= 4e-16 and len(rest) > 0
            return register, None if unit else torch.tensor(c, dtype=torch.float64), tuple(rest)
        case Denoise(point=point) | Differentiate(point=point) | Evaluate(point=point):
            return point, None, ()
        case Draw():
            return 0, None, ()
