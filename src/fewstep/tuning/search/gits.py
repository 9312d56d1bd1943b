"""Levels between which a first-order step errs little on recorded paths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fewstep.process import Level
from fewstep.samplers.steps import exponential_step
from fewstep.schedulers import Grid, make_grid
from fewstep.tuning.search.routes import cheapest_route
from fewstep.tuning.teacher import Lesson, Path, path

FINE_STEPS = 32
"""Steps of a recorded path, at least."""

FINE_SCHEDULERS = ("exponential", "trailing")
"""Schedulers of the recorded paths, among whose levels is chosen."""

GROWTHS = (0.3, 1.0, 3.0)
"""Weights of the errors of the last jumps of a route against those of the first."""


def jump_costs(path: Path) -> np.ndarray:
    """How far a first-order step from level i of a path to level j misses it, shape (levels, levels).

    The distance is taken in `x / alpha` as a root mean square, and is infinite unless i < j. It is the local error
    that the curvature of the path between the two causes.

    Source: Chen et al. 2024, arXiv 2405.11326 (GITS).
    """
    count = len(path.levels)
    costs = np.full((count, count), np.inf)
    units = torch.eye(2, dtype=torch.float64)
    for i, t in enumerate(path.levels[:-1]):
        later = path.levels[i + 1 :]
        weights = torch.stack([exponential_step(units[0], units[1], t, s) for s in later])
        scale = 1 / torch.tensor([s.alpha for s in later], dtype=torch.float64)
        kept, share, scale = (
            column.to(path.points).view(-1, *(1,) * (path.points.ndim - 1))
            for column in (weights[:, 0] * scale, weights[:, 1] * scale, scale)
        )
        missed = kept * path.points[i] + share * path.estimates[i] - scale * path.points[i + 1 :]
        costs[i, i + 1 :] = missed.square().flatten(1).mean(1).sqrt().cpu()
    return costs


def searched_levels(path: Path, costs: np.ndarray, calls: int, growth: float) -> tuple[Level, ...]:
    """Levels for so many calls, and clean data, chosen among those of a path.

    Args:
        path: A converged path.
        costs: Its `jump_costs`.
        calls: Network calls, fewer than the path has levels.
        growth: How much the error of the last jump counts against that of the first, > 0: errors made early may
            shrink or grow on the way.
    """
    place = np.arange(len(costs)) / len(costs)
    route = cheapest_route(costs * (growth**place)[:, None], calls)
    return tuple(path.levels[k] for k in route)


def least_jump_errors(lesson: Lesson, calls: int) -> Iterator[Grid]:
    """Grids whose first-order steps miss the recorded paths least, for several weights of late errors.

    `2 max(32, 2 calls)` network calls for each picture.

    Source: Chen et al. 2024, arXiv 2405.11326 (GITS).
    """
    denoiser, noise, _ = lesson.part(torch.arange(len(lesson)))
    for scheduler in FINE_SCHEDULERS:
        grid = make_grid(scheduler, denoiser.process, max(FINE_STEPS, 2 * calls))
        followed = path(denoiser, noise, grid)
        costs = jump_costs(followed)
        for growth in GROWTHS:
            levels = searched_levels(followed, costs, calls, growth)
            yield Grid(grid.process, levels, options={"among": scheduler, "growth": growth})
