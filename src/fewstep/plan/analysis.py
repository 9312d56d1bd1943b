"""What a Plan tells before it is run: how far each answer of the network reaches, and how errors grow.

Written out in the start, the network's answers and the draws, a point is a row of numbers (`fewstep.plan.rules`). The
numbers of the result are the *direct* weights. But an answer also moves the later points, and so the later answers.
On data whose directions are normal with standard deviation `spread`, the estimate of x_0 is linear,
`D = gain x + ...`, and the chain rule gives the *total* weights: the derivative of the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import TYPE_CHECKING, Literal

import numpy as np

from fewstep.errors import InvalidInputError
from fewstep.plan.instructions import CALLS, Denoise, Differentiate, Draw
from fewstep.plan.rules import Row, broken_rules, expand
from fewstep.process import Level

if TYPE_CHECKING:
    from fewstep.plan.plan import Plan

SPREAD = 1.0
"""Standard deviation of the data along a direction in which images in [-1, 1] differ much."""

SPREADS = tuple(np.geomspace(1e-3, 1e2, 51).tolist())
"""From the finest detail of images to their brightness as a whole."""

Kind = Literal["estimate", "guided", "weak", "derivative"]


def gain(level: Level, spread: float | np.ndarray) -> float | np.ndarray:
    """`dD/dx` for normal data: `alpha spread^2 / ((alpha spread)^2 + sigma^2)`.

    >>> gain(Level(t=1.0, alpha=1.0, sigma=1.0), spread=1.0)
    0.5
    """
    return level.alpha * spread**2 / ((level.alpha * spread) ** 2 + level.sigma**2)


@dataclass(frozen=True)
class Answer:
    """One answer of the network.

    Attributes:
        call: Number of the network call, from 1.
        kind: "estimate" of x_0; of a guided pair the "guided" and the "weak" one; or the "derivative" of the estimate
            by log_snr.
        level: The level that it was asked at.
    """

    call: int
    kind: Kind
    level: Level


@dataclass(frozen=True, eq=False)
class Weights:
    """Derivatives of the result.

    Attributes:
        start: By the start.
        answers: By the network's answers, shape (answers,).
        draws: By the noise draws, in order, shape (draws,).
    """

    start: float
    answers: np.ndarray
    draws: np.ndarray


@dataclass(frozen=True, eq=False)
class Influence:
    """How strongly each network call reaches the result; made by `Plan.influence`.

    Attributes:
        name: The Plan's name.
        answers: What the network is asked, in order; a guided pair has two answers.
        spread: Standard deviation of the data in the direction for which `total` is worked out.
        direct: The weights that the answers have in the result, later answers held fixed. Those of the estimates, plus
            the start's times its alpha, add up to the result's alpha: the signal rule.
        total: The same with what later calls make of a change: an error e in answer k moves the result by
            `total.answers[k] e`.
    """

    name: str
    answers: tuple[Answer, ...]
    spread: float
    direct: Weights
    total: Weights

    @property
    def share(self) -> np.ndarray:
        """Each answer's part of all total influence, `|total| / sum |total|`, shape (answers,)."""
        sizes = np.abs(self.total.answers)
        return sizes / max(sizes.sum(), np.finfo(float).tiny)

    @property
    def largest(self) -> Answer:
        """The answer whose errors reach the result most strongly."""
        return self.answers[int(np.argmax(self.share))]

    def __str__(self) -> str:
        """A table, one line for each answer."""
        lines = [
            f"{self.name}: influence of each answer on the result (total: for data of spread {self.spread:g})",
            f"{'call':>5}  {'answer':<10} {'sigma/alpha':>11} {'direct':>10} {'total':>10}  share",
        ]
        columns = zip(
            self.answers, self.direct.answers, self.total.answers, self.share, strict=True
        )
        for answer, direct, total, share in columns:
            lines.append(
                f"{answer.call:>5}  {answer.kind:<10} {answer.level.ratio:>11.5g} {direct:>+10.5f} {total:>+10.5f}  "
                f"{share:>6.1%} {'#' * round(40 * share)}".rstrip()
            )
        lines.append(f"start: direct {self.direct.start:+.5g}, total {self.total.start:+.5g}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Stability:
    """How errors grow in a Plan, held against the exact solution; made by `Plan.stability`.

    Each entry is for data with independent normal directions of one `spread`, where everything is linear. The exact
    solution is the probability-flow ODE's, from the first level of the grid to the last.

    Attributes:
        name: The Plan's name.
        spreads: Standard deviations of the data, shape (S,).
        answers: What the network is asked, in order.
        start: How much of a change of the start reaches the result, as a multiple of the exact solution's, shape (S,).
            1 is exact; for a deterministic Plan it is also the width of what it makes over the width of the data.
        width: Standard deviation of the result over that of the exact marginal, draws included, shape (S,).
        errors: How far an error in each answer moves the result, as a share of how far errors of that size in all
            estimates can move the exact solution, shape (S, answers). A derivative's error counts for a unit of
            log_snr.
    """

    name: str
    spreads: np.ndarray
    answers: tuple[Answer, ...]
    start: np.ndarray
    width: np.ndarray
    errors: np.ndarray

    @property
    def worst(self) -> np.ndarray:
        """How far errors in all answers, of one size and the worst signs, move the result, likewise, shape (S,)."""
        return self.errors.sum(1)

    @cached_property
    def factor(self) -> float:
        """The largest factor of all: about 1 or less is as stable as the exact solution, 10 loses a digit."""
        return float(max(self.start.max(), self.worst.max()))

    def __str__(self) -> str:
        """The largest factors, and the spreads at which they occur."""
        start, worst = int(np.argmax(self.start)), int(np.argmax(self.worst))
        one = np.unravel_index(int(np.argmax(self.errors)), self.errors.shape)
        return "\n".join(
            [
                f"{self.name}: errors grow at most {self.factor:.4g} times as much as in the exact solution",
                f"  of the start: {self.start[start]:.4g} times, for data of spread {self.spreads[start]:.3g}",
                f"  of all answers together: {self.worst[worst]:.4g} times, for spread {self.spreads[worst]:.3g}",
                f"  of one answer: {self.errors[one]:.4g} times that of all, call {self.answers[one[1]].call}",
                f"  width of the result: {self.width.min():.4g} to {self.width.max():.4g} times the data's",
            ]
        )


def influence(plan: Plan, spread: float = SPREAD) -> Influence:
    """How strongly each network call reaches the result; see `Plan.influence`."""
    table = _Table(plan)
    (total,) = table.total(_checked([spread]))
    return Influence(
        plan.name, table.answers, float(spread), table.weights(table.result), table.weights(total)
    )


def stability(plan: Plan, spreads: Sequence[float] | np.ndarray = SPREADS) -> Stability:
    """How errors grow, against the exact solution; see `Plan.stability`."""
    values = _checked(spreads)
    table, first, last = _Table(plan), plan.levels[0], plan.levels[-1]
    total = [table.weights(row) for row in table.total(values)]
    start = np.array([abs(weights.start) for weights in total])
    fresh = np.array([np.linalg.norm(weights.draws) for weights in total])
    answers = np.abs([weights.answers for weights in total])
    before, after = (np.hypot(level.alpha * values, level.sigma) for level in (first, last))
    return Stability(
        name=plan.name,
        spreads=values,
        answers=table.answers,
        start=start * before / after,
        width=np.hypot(start * before, fresh) / after,
        errors=answers / _exact_reach(plan, values)[:, None],
    )


def describe(plan: Plan) -> str:
    """A Plan in words and numbers; see `Plan.describe`."""
    reach, growth = influence(plan), stability(plan)
    broken = dict(broken_rules(plan.instructions, plan.result, plan.levels[0], plan.levels[-1]))
    rules = [
        f"{rule} rule: {'broken as declared: ' + broken[rule] if rule in broken else 'kept'}"
        for rule in ("signal", "noise")
    ]
    most = reach.largest
    return "\n".join(
        [
            str(plan),
            f"sampler: {_named(plan.sampler, plan.options)}",
            f"scheduler: {_named(plan.scheduler, plan.scheduler_options)}",
            f"process: {plan.process}",
            *rules,
            "",
            *_steps(plan, reach),
            "",
            f"largest influence: call {most.call} ({most.kind}) at {most.level}, {reach.share.max():.1%} of all for "
            f"data of spread {reach.spread:g}",
            str(growth).split(": ", 1)[1],
        ]
    )


class _Table:
    """A Plan's rows: its points and its result, written out in the start, the network's answers and the draws."""

    def __init__(self, plan: Plan) -> None:
        *points, result = expand(plan.instructions, plan.result, plan.levels[-1])
        self._calls = [i for i in plan.instructions if isinstance(i, CALLS)]
        self._points = points
        self.result = _vector(result)
        self._draws = 1 + len(result.outputs) + len(result.slopes)
        outputs, slopes = count(1), count(1 + len(result.outputs))
        self._columns: list[list[int]] = []
        answers: list[Answer] = []
        for number, call in enumerate(self._calls, 1):
            kinds = _kinds(call)
            answers += [Answer(number, kind, call.level) for kind in kinds]
            columns = slopes if isinstance(call, Differentiate) else outputs
            self._columns.append(list(islice(columns, len(kinds))))
        self.answers = tuple(answers)

    def total(self, spreads: np.ndarray) -> np.ndarray:
        """The result's weights with all that later calls make of a change, shape (S, columns).

        Backwards through the calls: what the result makes of an answer, it makes of the point `gain` times as much.
        """
        total = np.tile(self.result, (len(spreads), 1))
        for call, point, columns in zip(
            reversed(self._calls), reversed(self._points), reversed(self._columns), strict=True
        ):
            slope = np.asarray(gain(call.level, spreads))[:, None]
            change = _vector(point)
            if point.along is not None:  # of D = w x^ along a path, with dw/dlog_snr = 2 w (1 - w)
                change = 2 * (1 - call.level.alpha * slope) * change + _vector(point.along)
            total += total[:, columns].sum(1, keepdims=True) * slope * change
        return total

    def weights(self, row: np.ndarray) -> Weights:
        """The parts of a row."""
        columns = [column for columns in self._columns for column in columns]
        return Weights(float(row[0]), row[columns], row[self._draws :])


def _kinds(call: Denoise | Differentiate) -> tuple[Kind, ...]:
    if isinstance(call, Differentiate):
        return ("derivative",)
    return ("estimate",) if call.weak is None else ("guided", "weak")


def _vector(row: Row) -> np.ndarray:
    return np.concatenate([[row.start], row.outputs, row.slopes, row.draws])


def _exact_reach(plan: Plan, spreads: np.ndarray) -> np.ndarray:
    """How far errors of size 1 in all estimates can move the exact solution of the ODE, shape (S,).

    With `r = sigma / alpha` a change of x^ at r has become `sqrt((s^2 + r_end^2) / (s^2 + r^2))` as large at the end,
    and errors come in at the rate `dr / r`. Towards clean data that integral diverges: there it goes on to the last
    call, whose estimate stands for the rest of the path.
    """
    first, last = plan.levels[0], plan.levels[-1]
    lowest = min(
        (i.level.ratio for i in plan.instructions if isinstance(i, CALLS)), default=math.inf
    )
    end = lowest if last.is_clean else last.ratio
    length = np.arcsinh(spreads / end) - np.arcsinh(spreads / first.ratio)
    kept = np.hypot(spreads, last.ratio) / spreads
    return last.alpha * (kept * length + (1.0 if last.is_clean else 0.0))


def _checked(spreads: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(spreads, dtype=float)
    if values.ndim != 1 or not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise InvalidInputError(
            f"spread {spreads!r} must be a finite standard deviation > 0, or a list of them; data in [-1, 1] have "
            "0.01 to 10 in their directions"
        )
    return values


def _named(name: str, options: object) -> str:
    given = dict(options)  # type: ignore[call-overload]
    return (
        f"{name} ({', '.join(f'{key}={value}' for key, value in given.items())})"
        if given
        else name
    )


def _steps(plan: Plan, reach: Influence) -> list[str]:
    """One line for each level of the grid, with the calls that are made there and on the way to the next."""
    ratios = [level.ratio for level in plan.levels]
    draws = [_step_of(i.start, ratios) for i in plan.instructions if isinstance(i, Draw)]
    places = np.array([_step_of(answer.level, ratios) for answer in reach.answers], dtype=int)
    lines = [_line("step", "t", "sigma/alpha", "log_snr", "calls", "draws", "direct", "total")]
    for step, level in enumerate(plan.levels):
        here = np.flatnonzero(places == step)
        weights = [reach.direct.answers, reach.total.answers] if len(here) else []
        lines.append(
            _line(
                "end" if step == len(ratios) - 1 else str(step + 1),
                *(f"{number:.5g}" for number in (level.t, level.ratio, level.log_snr)),
                _range(sorted({reach.answers[k].call for k in here})),
                str(draws.count(step) or ""),
                *(f"{values[here].sum():+.5f}" for values in weights),
            )
        )
    return lines


def _line(*cells: str) -> str:
    widths = (4, 9, 11, 9, 7, 5, 10, 10)
    return " ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=False)).rstrip()


def _step_of(level: Level, ratios: Sequence[float]) -> int:
    """The last level of the grid that is at least as noisy; the first one for levels noisier than all."""
    return max(sum(ratio >= level.ratio for ratio in ratios) - 1, 0)


def _range(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))
