"""The things a sampler ever does; a Plan is a list of them over numbered registers. Register 0 is the start."""

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
    """`out = D(point, level)`: one network call, giving the estimate of x_0.

    With a register for it, the call also gives `weak`, the estimate that guidance pushes away from.
    """

    out: int
    point: int
    level: Level
    weak: int | None = None


@dataclass(frozen=True, slots=True)
class Differentiate:
    """`out = dD/dlog_snr` at a point that moves along a direction: one network call, differentiated.

    The direction is `alpha dx^/dlog_snr` with `x^ = x / alpha`; `alpha D - x` follows the probability-flow ODE.
    """

    out: int
    point: int
    along: int
    level: Level


@dataclass(frozen=True, slots=True)
class Draw:
    """`out = ` a standard normal tensor, the noise of the path between two levels.

    Draws of one lap over stretches that do not overlap are independent; so are any draws of different laps.
    """

    out: int
    start: Level
    end: Level
    lap: int = 0


@dataclass(frozen=True, slots=True)
class Evaluate:
    """`out = F(point, level)`: one network call, giving its own output; only lowered programs have it."""

    out: int
    point: int
    level: Level


Instruction = Combine | Denoise | Differentiate | Draw
CALLS = (Denoise, Differentiate)
"""The instructions that call the network."""


def reads(instruction: Instruction | Evaluate) -> tuple[int, ...]:
    """The registers that an instruction needs."""
    match instruction:
        case Combine(terms=terms):
            return tuple(register for register, _ in terms)
        case Denoise(point=point) | Evaluate(point=point):
            return (point,)
        case Differentiate(point=point, along=along):
            return (point, along)
        case Draw():
            return ()


def writes(instruction: Instruction | Evaluate) -> tuple[int, ...]:
    """The registers that an instruction fills."""
    if isinstance(instruction, Denoise) and instruction.weak is not None:
        return (instruction.out, instruction.weak)
    return (instruction.out,)
