"""Tracing: a sampler runs once on symbolic vectors, and the tape keeps what it did."""

from __future__ import annotations

import math

from fewstep.errors import InvalidInputError
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

ROUNDING = 1e-15
"""A coefficient this small beside the largest of its sum is what is left where coefficients cancel."""


class Vector:
    """A linear combination of registers; arithmetic only collects float64 coefficients.

    >>> x, y = Vector({0: 1.0}), Vector({1: 1.0})
    >>> 2 * x - y / 4
    Vector({0: 2.0, 1: -0.25})
    """

    __slots__ = ("terms",)
    __array_ufunc__ = None  # a NumPy number times a Vector asks the Vector

    def __init__(self, terms: dict[int, float]) -> None:
        self.terms = terms

    def __add__(self, other: Vector) -> Vector:
        terms = dict(self.terms)
        for register, coefficient in other.terms.items():
            terms[register] = terms.get(register, 0.0) + coefficient
        return Vector(terms)

    def __mul__(self, factor: float) -> Vector:
        factor = _number(factor)
        return Vector(
            {register: factor * coefficient for register, coefficient in self.terms.items()}
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Vector:
        return self * (1.0 / _number(divisor))

    def __neg__(self) -> Vector:
        return self * -1.0

    def __sub__(self, other: Vector) -> Vector:
        return self + -other

    def __repr__(self) -> str:
        return f"Vector({self.terms})"


class Tape:
    """Hands out symbolic vectors and records the program.

    Attributes:
        start: The point at the first level of the grid.
        program: The instructions so far.
        inexact: Which rules the sampler declares that it breaks; see `declare_inexact`.
    """

    def __init__(self) -> None:
        self.start = Vector({0: 1.0})
        self.program: list[Instruction] = []
        self.inexact: set[str] = set()
        self._registers = 1

    def denoise(self, x: Vector, level: Level) -> Vector:
        """Estimate x_0 from the point x at a level: one network call."""
        point = self._point(x, level)
        return self._record(Denoise(self._new(), point, level))

    def denoise_pair(self, x: Vector, level: Level) -> tuple[Vector, Vector]:
        """The guided estimate of x_0 and the weak one that guidance pushes away from: one call of a guided denoiser."""
        point = self._point(x, level)
        call = Denoise(self._new(), point, level, weak=self._new())
        return self._record(call), Vector({writes(call)[1]: 1.0})

    def derivative(self, x: Vector, along: Vector, level: Level) -> Vector:
        """`dD/dlog_snr` at the point x when it moves along a direction, see `Differentiate`: one network call."""
        point = self._point(x, level)
        return self._record(Differentiate(self._new(), point, self._settle(along), level))

    def noise(self, start: Level, end: Level, lap: int = 0) -> Vector:
        """A standard normal tensor that belongs to the path between two levels.

        A method that passes a stretch again, or draws twice on one, asks for another `lap`: a path of its own.
        """
        return self._record(Draw(self._new(), start, end, lap))

    def settle(self, x: Vector) -> Vector:
        """Give x a register of its own; for a point that is used again but never evaluated, so programs stay short."""
        self._settle(x)
        return x

    def declare_inexact(self, rule: str) -> None:
        """Say that this sampler breaks a Plan's "signal" or "noise" rule on purpose, or keeps it only to its order."""
        self.inexact.add(rule)

    def finish(self, x: Vector) -> int:
        """Settle the result, drop what it does not need, and return its register. Network calls all stay."""
        if not isinstance(x, Vector):
            raise InvalidInputError(
                f"the sampler returned {x!r}; it must return a Vector, the point at the last level"
            )
        result = self._settle(x)
        needed, kept = {result}, []
        for instruction in reversed(self.program):
            if isinstance(instruction, CALLS) or instruction.out in needed:
                needed.update(reads(instruction))
                kept.append(instruction)
        self.program = kept[::-1]
        return result

    def _point(self, x: Vector, level: Level) -> int:
        if level.is_clean:
            raise InvalidInputError(
                "a clean level (sigma = 0) cannot be denoised; use the last estimate instead"
            )
        return self._settle(x)

    def _new(self) -> int:
        self._registers += 1
        return self._registers - 1

    def _record(self, instruction: Instruction) -> Vector:
        self.program.append(instruction)
        return Vector({instruction.out: 1.0})

    def _settle(self, x: Vector) -> int:
        """Give the point a register of its own; from then on x stands for that register, so programs stay short."""
        for c in x.terms.values():
            if not math.isfinite(c):
                raise InvalidInputError(
                    f"instruction {len(self.program)} would have the coefficient {c}; "
                    "the sampler divides by a level's alpha or sigma where it is 0, or by a step that is infinite"
                )
        least = ROUNDING * max(map(abs, x.terms.values()), default=0.0)
        terms = {register: c for register, c in x.terms.items() if abs(c) > least} or {0: 0.0}
        if list(terms.values()) != [1.0]:
            out = self._new()
            self.program.append(Combine(out, tuple(terms.items())))
            terms = {out: 1.0}
        x.terms = terms
        return next(iter(terms))


def _number(value: float) -> float:
    if isinstance(value, Vector):
        raise InvalidInputError(
            "a sampler may add vectors and scale them by numbers, but not multiply or divide them by one another: "
            "a Plan is linear"
        )
    return float(value)
