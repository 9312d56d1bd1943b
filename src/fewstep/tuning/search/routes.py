"""The cheapest way from the first place to the last in so many jumps: exact dynamic programming."""

from __future__ import annotations

import numpy as np


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
    return traced_back(origins, len(costs) - 1)


def traced_back(origins: list[np.ndarray], last: int) -> list[int]:
    """The route that ends at a place, given from where each place is reached best after 1, 2... jumps."""
    route = [last]
    for origin in reversed(origins):
        route.append(int(origin[route[-1]]))
    return route[::-1]
