"""From a Plan to the fewest tensor operations on one kind of network.

A network's output F gives the estimate of x_0 as `D = skip x + out F` with numbers that depend on the level alone.
So wherever a Plan reads D, it can read x and F instead: the conversion costs nothing, and the division by a tiny
alpha or sigma happens in float64, in a coefficient, not on the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """One thing for the executor to do, laid out for its loop; places are slots, which registers share.

    Attributes:
        kind: The instruction's type.
        what: The instruction itself.
        first: The slot that a sum starts from, or of the point that is evaluated.
        factor: The coefficient of the first slot of a sum, None for 1; then there is at least one more term.
        rest: The other terms of a sum.
        out: The slot that is written.
        second: The other slot of an instruction with two: the weak estimate, or the direction of a derivative.
    """

    kind: type
    what: Instruction | Evaluate
    first: int
    factor: Tensor | None
    rest: tuple[tuple[int, float], ...]
    out: int
    second: int


@dataclass(frozen=True)
class Program:
    """A Plan laid out for the executor.

    Attributes:
        operations: What to do, in order. Slot 0 holds the start.
        slots: How many tensors are kept at most.
        result: The slot that holds the result in the end.
        evaluated: The levels of the network's own outputs, in order.
    """

    operations: tuple[Operation, ...]
    slots: int
    result: int
    evaluated: tuple[Level, ...]


def lower(program: Sequence[Instruction], result: int, form: LinearForm | None) -> Program:
    """Lay out a program; a linear form folds the estimates of x_0 away where that saves work."""
    folded = list(program) if form is None else _fold(program, result, form)
    scaled = _without_first_products(folded, result)
    evaluated = tuple(i.level for i in scaled if isinstance(i, Evaluate))
    operations, slots, place = _placed(scaled, result)
    return Program(operations, slots, place, evaluated)


def _placed(
    program: Sequence[Instruction | Evaluate], result: int
) -> tuple[tuple[Operation, ...], int, int]:
    """Give each register a slot from where it is written to where it is last read; return the slots' number too."""
    last_use = {register: k for k, i in enumerate(program) for register in reads(i)}
    last_use[result] = len(program)
    slot, free, slots = {0: 0}, [], 1
    operations = []
    for k, instruction in enumerate(program):
        read = reads(instruction)
        inputs = {register: slot[register] for register in read}
        free += [slot.pop(register) for register in dict.fromkeys(read) if last_use[register] == k]
        for register in writes(instruction):
            if not free:
                free.append(slots)
                slots += 1
            slot[register] = free.pop()
        first, factor, rest = _start(instruction, inputs)
        places = [slot[register] for register in writes(instruction)]
        second = (
            inputs[instruction.along] if isinstance(instruction, Differentiate) else places[-1]
        )
        operations.append(
            Operation(type(instruction), instruction, first, factor, rest, places[0], second)
        )
        free += [
            slot.pop(register) for register in writes(instruction) if register not in last_use
        ]
    return tuple(operations), slots, slot[result]


def _without_first_products(
    program: Sequence[Instruction | Evaluate], result: int
) -> list[Instruction | Evaluate]:
    """Keep sums that only other sums read at a scale of their own: the largest term then needs no product."""
    seen = {r for i in program if not isinstance(i, Combine) for r in reads(i)} | {result}
    scale: dict[int, float] = {}
    scaled: list[Instruction | Evaluate] = []
    for instruction in program:
        if isinstance(instruction, Combine):
            terms = tuple((r, c * scale.get(r, 1.0)) for r, c in instruction.terms)
            largest = max((c for _, c in terms), key=abs)
            if instruction.out not in seen and len(terms) > 1 and largest:
                scale[instruction.out] = largest
                terms = tuple((r, c / largest) for r, c in terms)
            instruction = Combine(instruction.out, terms)
        scaled.append(instruction)
    return scaled


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
    instruction: Instruction | Evaluate, slot: Mapping[int, int]
) -> tuple[int, Tensor | None, tuple[tuple[int, float], ...]]:
    """First slot, its factor and the other terms; a sum starts where the factor is 1, which needs no product."""
    match instruction:
        case Combine(terms=terms):
            # The rounding of the fold may leave a 1 off by an ulp or two.
            (register, c), *rest = sorted(terms, key=lambda term: abs(term[1] - 1.0) > 4e-16)
            unit = abs(c - 1.0) <= 4e-16 and len(rest) > 0
            factor = None if unit else torch.tensor(c, dtype=torch.float64)
            return slot[register], factor, tuple((slot[r], weight) for r, weight in rest)
        case Denoise(point=point) | Differentiate(point=point) | Evaluate(point=point):
            return slot[point], None, ()
        case Draw():
            return 0, None, ()
