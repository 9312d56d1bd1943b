"""Levels on which a student keeps nearest to a recorded path, step by step from where it is itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.denoisers import BaseDenoiser
from fewstep.process import Level
from fewstep.samplers.steps import Output, exponential_rule, look_back
from fewstep.schedulers import Grid, make_grid
from fewstep.tuning.search.routes import traced_back
from fewstep.tuning.teacher import Lesson, Path, path

FINE_STEPS = 48
"""Steps of the recorded path, where the network calls suffice for so many."""

MOST_CALLS = 200
"""Network calls of the students of one order for each picture, up to one for each step."""

ORDERS = (1, 2)
"""Orders of the students: that of DDIM, and that of the multistep samplers."""


@dataclass(frozen=True)
class Student:
    """Where a student is that has made some steps, and what the network told it on its way.

    Attributes:
        x: Its point, shape (B, ...).
        outputs: The estimates so far, newest last.
    """

    x: Tensor
    outputs: tuple[Output[Tensor], ...] = ()

    def asked(self, denoiser: BaseDenoiser, level: Level, order: int) -> Student:
        """The student after a network call."""
        estimate = Output(level, denoiser.for_run()(self.x, level))
        return Student(self.x, (*self.outputs, estimate)[-order:])

    def at(self, level: Level, order: int) -> Tensor:
        """The point that its step to a level leads to."""
        return exponential_rule(self.x, look_back(self.outputs, level, order), level)


@torch.no_grad()
def student_route(denoiser: BaseDenoiser, followed: Path, calls: int, order: int) -> list[int]:
    """Places on a path that a student of an order visits in so many steps to end near the path's end.

    For each number of steps and each place, the student is kept that comes nearest to the path there. This is greedy,
    not exact, but it counts the true error of a run and not the sum of the errors of single steps.

    Args:
        denoiser: The denoiser of the path.
        followed: A converged path of M levels.
        calls: Steps, 1..M - 1.
        order: Estimates that the student's step uses, 1 for DDIM.

    Returns:
        The places, `calls + 1` of them, the first and the last among them.

    Source: Pei, Hu, Gu 2025, arXiv 2503.21774 (OSS).
    """
    levels, last = followed.levels, len(followed.levels) - 1
    students = {0: Student(followed.points[0])}
    origins = []
    for step in range(1, calls + 1):
        asked = {i: s.asked(denoiser, levels[i], order) for i, s in students.items()}
        students, origin = {}, np.zeros(last + 1, dtype=int)
        for j in range(last if step == calls else step, last - calls + step + 1):
            before = [i for i in asked if i < j]
            missed = torch.stack(
                [
                    (asked[i].at(levels[j], order) - followed.points[j]).square().mean()
                    for i in before
                ]
            )
            origin[j] = before[int(missed.argmin())]
            nearest = asked[origin[j]]
            students[j] = Student(nearest.at(levels[j], order), nearest.outputs)
        origins.append(origin)
    return traced_back(origins, last)


def nearest_students(lesson: Lesson, calls: int) -> Iterator[Grid]:
    """Grids on which students of first and second order end nearest to converged paths.

    At most about 450 network calls for each picture with up to 20 calls.

    Source: Pei, Hu, Gu 2025, arXiv 2503.21774 (OSS).
    """
    denoiser, noise, _ = lesson.part(torch.arange(len(lesson)))
    fine = max(calls + 1, min(FINE_STEPS, calls + MOST_CALLS // calls))
    grid = make_grid("exponential", denoiser.process, fine)
    followed = path(denoiser, noise, grid)
    # Two steps are of first order whatever is asked: the first has nothing behind it, the last leads to clean data.
    for order in ORDERS if calls > 2 else ORDERS[:1]:
        route = student_route(denoiser, followed, calls, order)
        levels = tuple(grid.levels[k] for k in route)
        yield Grid(grid.process, levels, options={"order": order})
