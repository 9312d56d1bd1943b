"""Levels for which errors of the network reach the result least: no network calls at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import minimize

from fewstep.plan import Tape, Vector
from fewstep.process import Level, Process
from fewstep.samplers import SAMPLERS
from fewstep.schedulers import Grid, make_grid
from fewstep.schedulers.ranges import ends, level_count
from fewstep.tuning.teacher import Lesson

SAMPLER = "unipc"
"""The sampler whose bound is minimised; that of DDIM is least on equal steps in log_snr."""

STARTS = ("exponential", "time_uniform")
"""Schedulers that descent starts from."""

TAILS = ("zero", "cut")
"""Whether clean data follows the least noisy level or replaces it."""

ITERATIONS, WORK = 25, 3000
"""Iterations of the quasi-Newton method, and steps of the sampler that one descent writes out, at most."""

KNOTS = 8
"""Numbers that are fitted at most: the logarithms of the lengths of more steps lie on straight lines between them."""

LONGEST = 4.0
"""How far the logarithm of a step in log_snr may be from that of equal steps, before all are scaled to the range."""


class Written(Tape):
    """A tape on which every answer of the network stays a symbol of its own, so that the result is a sum of them."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = 0

    def denoise(self, x: Vector, level: Level) -> Vector:
        """A new symbol."""
        self.answers += 1
        return Vector({self.answers: 1.0})

    def settle(self, x: Vector) -> Vector:
        """The point as it is: no register is needed."""
        return x


def direct_weights(sampler: str, grid: Grid) -> np.ndarray:
    """Weights of the network's answers in the result of a deterministic sampler, as in `Plan.influence`, shape (n,).

    Much faster than tracing a Plan and looking at it.
    """
    entry, tape = SAMPLERS.find(sampler), Written()
    result = entry.function(tape, grid, **entry.resolve({}))
    return np.array([result.terms.get(k, 0.0) for k in range(1, tape.answers + 1)])


def error_bound(sampler: str, process: Process, ratios: Iterable[float]) -> float:
    """How far errors of the network move the result at most, `sum_j |w_j| e_j / alpha` with `e_j = sigma_j / alpha_j`.

    The result of n steps is a sum of `w_j D_j`. The error of the estimate D_j is taken to be in proportion to `e_j`.

    Args:
        sampler: One that calls the network once at each level but the last.
        process: The forward process.
        ratios: The n + 1 falling `sigma / alpha`, all of them finite and above 0.

    Source: Xue et al. 2024, arXiv 2402.17376, with their errors for models of pixels.
    """
    grid = Grid.from_ratios(process, ratios)
    weights = direct_weights(sampler, grid)
    return float(np.abs(weights) @ grid.ratios[:-1]) / grid.levels[-1].alpha


def least_bound(sampler: str, process: Process, start: Sequence[float]) -> np.ndarray:
    """The ratios between the same ends whose `error_bound` is least, by descent from a start.

    The logarithms of the lengths of the steps in log_snr are what is fitted, so that the order stays whatever they are.
    """
    logs = np.log(np.asarray(start))
    span, count = logs[-1] - logs[0], len(logs) - 1
    steps = np.arange(count)
    knots = np.linspace(0, count - 1, min(count, KNOTS))

    def ratios(fitted: np.ndarray) -> np.ndarray:
        way = np.cumsum(np.exp(np.interp(steps, knots, fitted)))
        return np.exp(logs[0] + span * np.concatenate([[0.0], way / way[-1]]))

    lengths = np.log(count * np.diff(logs) / span).clip(-LONGEST, LONGEST)
    found = minimize(
        lambda fitted: error_bound(sampler, process, ratios(fitted)),
        np.interp(knots, steps, lengths),
        method="L-BFGS-B",
        bounds=[(-LONGEST, LONGEST)] * len(knots),
        options={"maxiter": ITERATIONS, "maxfun": WORK // count},
    )
    return ratios(found.x)


def least_error_bounds(lesson: Lesson, calls: int) -> Iterator[Grid]:
    """Grids of the least bound on what errors of the network do.

    The bound is that of a run to the least noisy level, which is followed by clean data or replaced by it. Descent
    starts from equal steps in log_snr and from equal steps in time. No network calls.

    Source: Xue et al. 2024, arXiv 2402.17376.
    """
    process = lesson.model.model.process
    for tail in TAILS:
        count = level_count(calls, tail)
        starts = [_finite(make_grid(name, process, count)) for name in STARTS]
        found = [least_bound(SAMPLER, process, ratios) for ratios in starts]
        best = min(found, key=lambda ratios: error_bound(SAMPLER, process, ratios))
        visited = [process.noisiest.ratio, *best[1:calls], 0.0]
        yield replace(Grid.from_ratios(process, visited), options={"tail": tail})


def _finite(grid: Grid) -> list[float]:
    """The ratios of a grid short of clean data, the largest finite one in place of pure noise."""
    return [min(grid.ratios[0], ends(grid.process)[0]), *grid.ratios[1:-1]]
