"""Choosing levels by dynamic programming on a recorded path: no gradients, a few network calls."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fewstep.process import Level
from fewstep.samplers.steps import exponential_step
from fewstep.schedulers import Grid, make_grid
from fewstep.tuning.teacher import Lesson, Path, path

SEARCH_STEPS, SEARCH_IMAGES = 32, 16
"""Steps of a recorded path, at least, and how many pictures follow it."""

SEARCH_SCHEDULERS = ("exponential", "trailing")
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


def cheapest_route(costs: np.ndarray, steps: int) -> list[int]:
    """The route of so many jumps from the first place to the last whose costs add up to the least.

    Args:
        costs: Cost of each jump, shape (places, places), infinite where there is none.
        steps: Number of jumps, 1..places - 1.

    Returns:
        The places, `steps + 1` of them.

    Source: Bellman 1957, Dynamic Programming.

    >>> inf = np.inf
    >>> cheapest_route(np.array([[inf, 1, 9.0], [inf, inf, 1], [inf, inf, inf]]), 2)
    [0, 1, 2]
    """
    best = np.full(len(costs), np.inf)
    best[0] = 0.0
    origins = []
    for _ in range(steps):
        totals = best[:, None] + costs
        origins.append(totals.argmin(0))
        best = totals.min(0)
    route = [len(costs) - 1]
    for origin in reversed(origins):
        route.append(int(origin[route[-1]]))
    return route[::-1]


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


def searched_grids(train: Lesson, calls: int) -> Iterator[Grid]:
    """Grids for so many calls, chosen among the levels of paths that some noise of a lesson follows."""
    denoiser, noise, _ = train.part(torch.arange(min(SEARCH_IMAGES, len(train))))
    for scheduler in SEARCH_SCHEDULERS:
        grid = make_grid(scheduler, denoiser.process, max(SEARCH_STEPS, 2 * calls))
        followed = path(denoiser, noise, grid)
        costs = jump_costs(followed)
        routes = {searched_levels(followed, costs, calls, growth): None for growth in GROWTHS}
        for levels in routes:
            yield Grid(denoiser.process, levels, "searched")
