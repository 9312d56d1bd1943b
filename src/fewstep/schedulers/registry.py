"""The list of schedulers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from numbers import Integral
from typing import Any

from fewstep.errors import InvalidInputError
from fewstep.process import Process
from fewstep.registry import Entry, Registry
from fewstep.schedulers.grid import Grid

SCHEDULERS: Registry[Entry] = Registry("scheduler", Entry)


def make_grid(name: str, process: Process, steps: int, **options: Any) -> Grid:
    """The grid of the scheduler of that name or alias.

    Args:
        name: A scheduler's name, title or alias.
        process: The forward process of the model.
        steps: Number of steps, >= 1.
        options: The scheduler's own options.

    Raises:
        UnknownNameError: If there is no such scheduler or option.
        InvalidInputError: If steps or an option is out of range.

    >>> from fewstep.process import vp_linear
    >>> make_grid("trailing", vp_linear(), 4).times
    [999.0, 749.0, 499.0, 249.0, -1.0]
    """
    entry = SCHEDULERS.find(name)
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise InvalidInputError(f"{entry.name}: steps must be a whole number >= 1, got {steps!r}")
    resolved = entry.resolve(options)
    grid = entry.function(process, int(steps), **resolved)
    return dataclasses.replace(grid, scheduler=entry.name, options=resolved)


def scheduler(name: str, **metadata: Any) -> Callable[[Callable[..., Grid]], Callable[..., Grid]]:
    """Register `(process, steps, **options) -> Grid` under a name, with title, paper and aliases."""

    def register(function: Callable[..., Grid]) -> Callable[..., Grid]:
        SCHEDULERS.add(name, function, **metadata)

        @functools.wraps(function)
        def make(process: Process, steps: int, **options: Any) -> Grid:
            return make_grid(name, process, steps, **options)

        return make

    return register
