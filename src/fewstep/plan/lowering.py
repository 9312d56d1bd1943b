"""From a Plan to the fewest tensor operations on one kind of network.

A network's output F gives the estimate of x_0 as `D = skip x + out F` with numbers that depend on the level alone.
So wherever a Plan reads D, it can read x and F instead: the conversion costs nothing, and the division by a tiny
alpha or sigma happens in float64, in a coefficient, not on the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.plan.instructions import Combine, Denoise, Draw, Instruction, reads
from fewstep.process import Level


class LinearForm(Protocol):
    """How a network's output gives the estimate of x_0."""

    def skip_out(self, level: Level) -> tuple[float, float]:
        """The numbers of `D = skip x + out F` at a level."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluate:
    """`out = F(point, level)`: one network call, giving the network's own output."""

    out: int
    point: int
    level: Level


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing for the executor to do, and the registers that nobody needs afterwards.

    Attributes:
        what: The instruction.
        first: For a Combine: the register that the sum starts from, and its coefficient, None for 1.
        rest: For a Combine: the other terms.
        dead: Registers to drop.
    """

    what: Instruction | Evaluate
    first: tuple[int, Tensor | None]
    rest: tuple[tuple[int, float], ...]
    dead: tuple[int, ...]


def lower(
    program: Sequence[Instruction], result: int, form: LinearForm | None
) -> tuple[Operation, ...]:
    """Order a program for the executor; with a linear form the estimates of x_0 are folded away where that saves work."""
    folded = list(program) if form is None else _fold(program, result, form)
    last_use = {register: k for k, i in enumerate(folded) for register in _reads(i)}
    last_use[result] = len(folded)
    operations = []
    for k, instruction in enumerate(folded):
        dead = {r for r in _reads(instruction) if last_use[r] == k}
        if instruction.out not in last_use:
            dead.add(instruction.out)
        first, rest = (
            _ordered(instruction) if isinstance(instruction, Combine) else ((-1, None), ())
        )
        operations.append(Operation(instruction, first, rest, tuple(sorted(dead))))
    return tuple(operations)


def _fold(
    program: Sequence[Instruction], result: int, form: LinearForm
) -> list[Instruction | Evaluate]:
    readers: dict[int, list[Instruction]] = {}
    for instruction in program:
        for register in reads(instruction):
            readers.setdefault(register, []).append(instruction)
    fresh = 1 + max((i.out for i in program), default=0)
    substitutes: dict[int, tuple[tuple[int, float], tuple[int, float]]] = {}
    lowered: list[Instruction | Evaluate] = []
    for instruction in program:
        match instruction:
            case Denoise(estimate, point, level):
                skip, out = form.skip_out(level)
                output, fresh = fresh, fresh + 1
                substitute = ((point, skip), (output, out))
                lowered.append(Evaluate(output, point, level))
                if estimate != result and _saves_work(readers.get(estimate, []), point):
                    substitutes[estimate] = substitute
                else:
                    lowered.append(Combine(estimate, substitute))
            case Combine(out, terms):
                lowered.append(Combine(out, _substituted(terms, substitutes)))
            case Draw():
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


def _ordered(combine: Combine) -> tuple[tuple[int, Tensor | None], tuple[tuple[int, float], ...]]:
    """Start from a term whose coefficient is 1, up to the rounding of the fold, since that needs no product."""
    terms = sorted(combine.terms, key=lambda term: abs(term[1] - 1.0) > 4e-16)
    (register, c), *rest = terms or [(0, 0.0)]
    unit = abs(c - 1.0) <= 4e-16 and len(rest) > 0
    return (register, None if unit else torch.tensor(c, dtype=torch.float64)), tuple(rest)


def _reads(instruction: Instruction | Evaluate) -> tuple[int, ...]:
    return (instruction.point,) if isinstance(instruction, Evaluate) else reads(instruction)
