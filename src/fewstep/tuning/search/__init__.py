"""Searches for levels that need no gradients: each yields grids of so many calls for the denoiser of a lesson."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fewstep.schedulers import Grid
from fewstep.tuning.search.bound import least_error_bounds
from fewstep.tuning.search.divergence import least_divergence
from fewstep.tuning.search.gits import least_jump_errors
from fewstep.tuning.search.student import nearest_students
from fewstep.tuning.teacher import Lesson

__all__ = ["SEARCHES", "Search", "searched_grids"]

IMAGES = 8
"""How many pictures of a lesson are looked at."""


@dataclass(frozen=True)
class Search:
    """A way to choose levels.

    Attributes:
        name: What its grids are called.
        title: The name it is known by.
        paper: Where it was published.
        grids: The search itself.
    """

    name: str
    title: str
    paper: str
    grids: Callable[[Lesson, int], Iterator[Grid]]


SEARCHES = (
    Search(
        "searched-bound", "error bound", "Xue et al. 2024, arXiv:2402.17376", least_error_bounds
    ),
    Search(
        "searched-kl",
        "Align Your Steps",
        "Sabour, Fidler, Kreis 2024, arXiv:2404.14507",
        least_divergence,
    ),
    Search("searched-gits", "GITS", "Chen et al. 2024, arXiv:2405.11326", least_jump_errors),
    Search("searched-oss", "OSS", "Pei, Hu, Gu 2025, arXiv:2503.21774", nearest_students),
)


def searched_grids(train: Lesson, calls: int) -> Iterator[Grid]:
    """The grids of all searches for so many calls, each once; a grid's `scheduler` tells which search found it.

    All together take 360 to 600 network calls for each of at most 8 pictures with 3 to 20 calls.
    """
    few = replace(train, noise=train.noise[:IMAGES], ends=train.ends[:IMAGES])
    seen = set()
    for search in SEARCHES:
        for grid in search.grids(few, calls):
            if grid.levels not in seen:
                seen.add(grid.levels)
                yield replace(grid, scheduler=search.name)
