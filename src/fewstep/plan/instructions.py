"""The three things a sampler ever does; a Plan is a list of them over numbered registers. Register 0 is the start."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.process import Level


@dataclass(frozen=True, slots=True)
class Combine:
    """`out = sum of coefficient * register`, with float64 coefficients that depend on the grid alone."""

    out: int
    terms: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Denoise:
    """`out = D(point, level)`: one network call, giving the estimate of x_0."""

    out: int
    point: int
    level: Level


@dataclass(frozen=True, slots=True)
class Draw:
    """`out = ` a standard normal tensor, the noise of the path between two levels."""

    out: int
    start: Level
    end: Level


@dataclass(frozen=True, slots=True)
class Evaluate:
    """`out = F(point, level)`: one network call, giving its own output; only lowered programs have it."""

    out: int
    point: int
    level: Level


Instruction = Combine | Denoise | Draw


def reads(instruction: Instruction | Evaluate) -> tuple[int, ...]:
    """The registers that an instruction needs."""
    match instruction:
        case Combine(terms=terms):
            return tuple(register for register, _ in terms)
        case Denoise(point=point) | Evaluate(point=point):
            return (point,)
        case Draw():
            return ()
