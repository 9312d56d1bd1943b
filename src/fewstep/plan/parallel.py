"""Parallel in time: many network calls of a Plan in one batch, repeated until their points agree with one another.

The points of a Plan are `points = A start + B D(points) + C noise` with B strictly lower triangular. In order, that
takes one round of the network for each call. Picard iteration guesses all estimates, works out all points, asks the
network for all of them at once, and repeats: after k rounds the first k points are exact.

The estimate at a point that moved by d since it was evaluated is taken for `D + gain d`, with the gain of normal data
(`analysis.gain`). So only what the data differ from normal data by has to be iterated: about half the rounds.

Source: Shih, Belkhale, Ermon, Sadigh, Anari 2023, arXiv 2305.16317 (the iteration and its sliding window).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.errors import InvalidInputError, NonFiniteError
from fewstep.plan.analysis import SPREAD, gain
from fewstep.plan.executor import (
    DenoiserLike,
    NoiseSource,
    checked_start,
    drawn,
    estimate,
    finite,
    guided_pair,
)
from fewstep.plan.instructions import Combine, Denoise, Differentiate, Draw, reads, writes
from fewstep.process import Level

if TYPE_CHECKING:
    from fewstep.plan.plan import Plan

SAFETY, LEAST_SAFETY = 100.0, 10.0
"""How much an error of a point may grow on the way to the result, and still be within the tolerance there.

The second holds for points whose moves do not shrink any more, because the network's rounding moves them."""

SMALLEST_WINDOW = 8
"""By default a third of the calls, but not fewer: later ones would follow points that are mere guesses."""

ROUNDING = 4.0
"""Moves of so many units in the last place are none."""


@dataclass(frozen=True, slots=True)
class Round:
    """What `on_round` is told after each round.

    Attributes:
        number: Number of the round, from 1.
        finished: Calls that are done for all images.
        calls: Calls in all.
        evaluated: Calls whose estimates were made in this round, all in one batch.
    """

    number: int
    finished: int
    calls: int
    evaluated: int


@dataclass(frozen=True)
class ParallelResult:
    """Where a parallel run ended, and what it took.

    Attributes:
        x: The point at the last level, shape (B, ...).
        rounds: Rounds of the network, one after the other; a sequential run takes one for each call.
        calls: Network calls in all rounds together; a sequential run takes fewer.
    """

    x: Tensor
    rounds: int
    calls: int


@torch.no_grad()
def run_parallel(
    plan: Plan,
    denoiser: DenoiserLike,
    x: Tensor,
    noise: NoiseSource | None,
    window: int | None,
    tolerance: float,
    on_round: Callable[[Round], None] | None,
) -> ParallelResult:
    """Run a Plan in rounds; see `Plan.run_parallel`."""
    x = checked_start(plan.name, x, draws=plan.draws, noise=noise)
    _check(plan, denoiser, window, tolerance)
    window = window or max(SMALLEST_WINDOW, math.ceil(plan.calls / 3))
    run = _Run(plan, denoiser, x, noise, window, tolerance)
    rounds = calls = 0
    while run.base < plan.calls:
        evaluated = run.round()
        rounds, calls = rounds + 1, calls + evaluated
        if on_round is not None:
            on_round(Round(rounds, run.base, plan.calls, evaluated))
    return ParallelResult(run.result(), rounds, calls)


class _Run:
    """The state of one parallel run. Each image moves on at its own pace, so none depends on the others.

    Attributes:
        base: Calls that are done for all images; what is kept for later calls, in rows, begins there.
        finished: Calls that are done, for each image, shape (B,).
        evaluated: Calls that were evaluated at least once, for each image, shape (B,).
        points: The points to be evaluated next, one for each row.
        rests: By how much the estimates exceed `gain * point`, shape (rows, kinds, B, ...); kinds is 2 for Plans of
            guided pairs, else 1.
    """

    def __init__(
        self,
        plan: Plan,
        denoiser: Any,
        x: Tensor,
        noise: NoiseSource | None,
        window: int,
        tolerance: float,
    ) -> None:
        self.plan, self.denoiser, self.noise = plan, denoiser, noise
        self.window, self.tolerance = window, tolerance
        self.calls = [i for i in plan.instructions if isinstance(i, Denoise)]
        self.gains = [float(gain(call.level, SPREAD)) for call in self.calls]
        self.pairs = any(call.weak is not None for call in self.calls)
        self.base = 0
        self.finished = self.evaluated = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.rests = x.new_zeros((0, 1 + self.pairs, *x.shape))
        self._x, self._registers, self._position = x, {0: x}, 0
        self._draws: dict[int, Tensor] = {}
        self._moves = x.new_zeros((0, len(x)))
        self._last_use = {r: k for k, i in enumerate(plan.instructions) for r in reads(i)}
        self._last_use[plan.result] = len(plan.instructions)
        self._advance(0)
        self.points = [point for _, point in islice(self._ahead(), window)]

    def round(self) -> int:
        """Evaluate the points, work them out anew, and pass those that stay; return how many were evaluated."""
        points, rows = torch.stack(self.points), len(self.points)
        calls = torch.arange(self.base, self.base + rows, device=points.device)[:, None]
        self.evaluated = (self.finished + self.window).clamp(max=len(self.calls))
        fresh = (calls >= self.finished) & (calls < self.evaluated)
        self._keep(points, fresh)
        ahead = self._ahead()
        moved = torch.stack([point for _, point in islice(ahead, rows)])
        stays = (calls < self.finished) | (fresh & self._settled(points, moved, fresh))
        passed = self.base + stays.long().cumprod(0).sum(0)
        # The first point of a window follows from what is done: it never moves, and its estimate is final.
        self.finished = passed.maximum(self.finished + 1).clamp(max=len(self.calls))
        done = int(self.finished.min()) - self.base
        top = min(int(self.finished.max()) + self.window, len(self.calls))
        more = islice(ahead, top - self.base - rows)
        self.points = [*moved[done:], *(point for _, point in more)]
        self._moves = self._moves[done:]
        self._advance(done)
        return rows

    def result(self) -> Tensor:
        """The point at the last level, once all calls are done."""
        return self._registers[self.plan.result]

    def _keep(self, points: Tensor, fresh: Tensor) -> None:
        """Ask for the estimates, and keep those that are fresh, shape (rows, B); the others are final or too early."""
        gains = self._column(self.gains, points)
        rests = self._estimates(points) - (gains * points).unsqueeze(1)
        known = len(self.rests)
        which = fresh[:known].view(known, 1, *fresh.shape[1:], *(1,) * (points.ndim - 2))
        rests[:known] = torch.where(which, rests[:known], self.rests)
        self.rests = rests

    def _settled(self, points: Tensor, moved: Tensor, fresh: Tensor) -> Tensor:
        """Whether the points moved so little that their estimates stand, shape (rows, B)."""
        moves = _rms(moved - points)
        allowed = self.tolerance * self._column([call.level.sigma for call in self.calls], moves)
        rounding = ROUNDING * torch.finfo(moved.dtype).eps * _rms(moved)
        before = torch.full_like(moves, math.inf)
        before[: len(self._moves)] = self._moves
        self._moves = moves.where(fresh, math.inf)
        stalled = (moves <= allowed / LEAST_SAFETY) & (moves > before / 2)
        return (moves <= allowed / SAFETY + rounding) | stalled

    def _estimates(self, points: Tensor) -> Tensor:
        """The estimates of the network, shape (rows, kinds, B, ...)."""
        levels = [call.level for call in self.calls[self.base : self.base + len(points)]]
        if self.pairs:
            value = torch.stack(_guided_pairs(self.denoiser, points, levels), 1)
        else:
            value = _estimates(self.denoiser, points, levels).unsqueeze(1)
        if not finite(value):
            first = next(k for k, row in enumerate(value) if not finite(row))
            raise NonFiniteError(
                f"{self.plan.name}: the network's output at call {self.base + first + 1} of {len(self.calls)}, level "
                f"{levels[first]}, holds a NaN or infinity; see whether a sequential run does without, and take a "
                "smaller window or another type of the network"
            )
        return value

    def _ahead(self) -> Iterator[tuple[int, Tensor]]:
        """Follow the program from the base on, and leave the base as it is."""
        return self._follow(dict(self._registers))

    def _advance(self, count: int) -> None:
        """Move the base past the next calls."""
        position = len(self.plan.instructions)
        for passed, (k, _) in enumerate(self._follow(self._registers)):
            if passed == count:
                position = k
                break
        self._position, self.base, self.rests = position, self.base + count, self.rests[count:]
        self._draws = {k: draw for k, draw in self._draws.items() if k >= position}

    def _follow(self, registers: dict[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Follow the program from the base on by the estimates known so far; yield each call's place and point.

        Where an image has no estimate yet, it has what the last one exceeded `gain * point` by.
        """
        base, rests, evaluated = self.base, self.rests, self.evaluated
        everywhere = base if not len(rests) else int(evaluated.min())
        rest, call = self._x.new_zeros(rests.shape[1:]), base
        for k in range(self._position, len(self.plan.instructions)):
            instruction = self.plan.instructions[k]
            match instruction:
                case Combine(out, terms):
                    registers[out] = _combined(registers, terms)
                case Draw(out):
                    if k not in self._draws:
                        self._draws[k] = drawn(self.noise, instruction, self._x)
                    registers[out] = self._draws[k]
                case Denoise(_, place):
                    point = registers[place]
                    yield k, point
                    if call < everywhere:
                        rest = rests[call - base]
                    elif call < base + len(rests):
                        has = (call < evaluated).view(-1, *(1,) * (point.ndim - 1))
                        rest = torch.where(has, rests[call - base], rest)
                    answers = rest + self.gains[call] * point
                    registers.update(zip(writes(instruction), answers, strict=False))
                    call += 1
            for register in reads(instruction):
                if self._last_use[register] == k:
                    registers.pop(register, None)

    def _column(self, numbers: Sequence[float], like: Tensor) -> Tensor:
        """Numbers of the calls in the rows of a tensor, to be multiplied with it."""
        rows = numbers[self.base : self.base + len(like)]
        return like.new_tensor(rows).view(-1, *(1,) * (like.ndim - 1))


def _combined(registers: Mapping[int, Tensor], terms: Sequence[tuple[int, float]]) -> Tensor:
    (first, factor), *rest = terms
    total = factor * registers[first]
    for register, c in rest:
        total.add_(registers[register], alpha=c)
    return total


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each image in each row, shape (rows, B)."""
    return x.reshape(*x.shape[:2], -1).square().mean(2).sqrt()


def _estimates(denoiser: Any, points: Tensor, levels: Sequence[Level]) -> Tensor:
    if not hasattr(denoiser, "many"):
        return torch.stack(
            [estimate(denoiser, *pair) for pair in zip(points, levels, strict=True)]
        )
    return denoiser.many(points, levels).to(points.dtype)


def _guided_pairs(denoiser: Any, points: Tensor, levels: Sequence[Level]) -> tuple[Tensor, Tensor]:
    if not hasattr(denoiser, "guided_pairs"):
        pairs = [guided_pair(denoiser, *pair) for pair in zip(points, levels, strict=True)]
        guided, weak = (torch.stack(values) for values in zip(*pairs, strict=True))
    else:
        guided, weak = denoiser.guided_pairs(points, levels)
    return guided.to(points.dtype), weak.to(points.dtype)


def _check(plan: Plan, denoiser: Any, window: int | None, tolerance: float) -> None:
    """Refuse what has no parallel run."""
    if any(isinstance(i, Differentiate) for i in plan.instructions):
        raise InvalidInputError(
            f"{plan.name} asks for derivatives of the estimate, which a parallel run does not take; use plan.run, or "
            "another sampler such as dpmpp_2m"
        )
    if window is not None and not (isinstance(window, int) and window >= 1):
        raise InvalidInputError(f"window={window!r} must be a whole number of calls >= 1, or None")
    if not 0 <= tolerance < math.inf:
        raise InvalidInputError(f"tolerance={tolerance!r} must be a finite number >= 0")
    if hasattr(denoiser, "for_run") and denoiser.for_run() is not denoiser:
        raise InvalidInputError(
            f"{denoiser.name} remembers earlier calls, which a parallel run has not made yet; use plan.run, or leave "
            "the momentum of its guidance out"
        )
