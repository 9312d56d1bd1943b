"""Grids that walk the training table by index."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import numpy as np

from fewstep.errors import InvalidInputError
from fewstep.process import Process
from fewstep.registry import Option
from fewstep.schedulers.grid import Grid
from fewstep.schedulers.registry import scheduler


def _from_indices(process: Process, indices: Iterable[float]) -> Grid:
    """The grid of falling table indices, then clean data."""
    return Grid.from_times(process, [process.table_time(float(i)) for i in indices])


def _table(process: Process, steps: int, name: str) -> int:
    if steps > process.training_steps:
        raise InvalidInputError(
            f"{name}: {steps} steps do not fit a table of {process.training_steps} entries; "
            "take fewer steps, or a scheduler that goes between the entries: normal, karras, exponential"
        )
    return process.training_steps


@scheduler(
    "trailing",
    title="Trailing",
    paper="Lin et al. 2023, arXiv:2305.08891",
    aliases=("sgm trailing",),
)
def trailing(process: Process, steps: int) -> Grid:
    """Equal strides counted from the noisiest index: `round(T - i T / n) - 1`."""
    size = _table(process, steps, "trailing")
    # Halves round as in diffusers, whose expression this is; for some n it yields one entry too many.
    return _from_indices(process, np.round(np.arange(size, 0, -size / steps))[:steps] - 1)


@scheduler(
    "leading",
    title="Leading",
    paper="Song, Meng, Ermon 2021, arXiv:2010.02502",
    aliases=("ddim_linear",),
)
def leading(
    process: Process,
    steps: int,
    *,
    offset: Annotated[int, Option("added to every index; Stable Diffusion uses 1", 0, 1000)] = 0,
) -> Grid:
    """Equal strides counted from index 0: `i floor(T / n) + offset`; the linear subsequence of DDIM.

    It stops short of the noisiest index, so it does not suit models whose table ends in pure noise.
    """
    size = _table(process, steps, "leading")
    top = (steps - 1) * (size // steps)
    if top + offset > size - 1:
        raise InvalidInputError(
            f"leading: offset={offset} runs past the table; with {steps} steps at most {size - 1 - top}"
        )
    return _from_indices(process, (i * (size // steps) + offset for i in reversed(range(steps))))


@scheduler("linspace", title="Linspace", paper="Nichol, Dhariwal 2021, arXiv:2102.09672")
def linspace(process: Process, steps: int) -> Grid:
    """Equally spaced from the noisiest index to index 0, rounded: `round((T - 1) (1 - i / (n - 1)))`."""
    size = _table(process, steps, "linspace")
    rising = np.round(np.linspace(0, size - 1, steps))  # from below: halves round as in diffusers
    rising[-1] = size - 1  # a single step starts at the noisiest index
    return _from_indices(process, rising[::-1])


@scheduler("normal", title="Normal", paper="k-diffusion, ComfyUI", aliases=("uniform",))
def normal(process: Process, steps: int) -> Grid:
    """Equally spaced from the noisiest index to index 0, between the entries where need be."""
    return _from_indices(process, np.linspace(process.training_steps - 1, 0, steps))


@scheduler("simple", title="Simple", paper="ComfyUI")
def simple(process: Process, steps: int) -> Grid:
    """Equal strides from the noisiest index, rounded up: `T - 1 - floor(i T / n)`."""
    size = _table(process, steps, "simple")
    return _from_indices(process, (size - 1 - int(i * (size / steps)) for i in range(steps)))


@scheduler(
    "ddim_uniform",
    title="DDIM uniform",
    paper="Rombach et al. 2022, arXiv:2112.10752; ComfyUI",
    aliases=("ddim",),
)
def ddim_uniform(process: Process, steps: int) -> Grid:
    """Every c-th index from 1 up, `c = floor(T / n)`.

    As everywhere under this name, the number of steps is `ceil((T - 1) / c)`, which is n only where n divides T,
    and the first level is not the noisiest one.
    """
    size = _table(process, steps, "ddim_uniform")
    return _from_indices(process, reversed(range(1, size, size // steps)))


@scheduler(
    "quadratic",
    title="Quadratic",
    paper="Song, Meng, Ermon 2021, arXiv:2010.02502",
    aliases=("ddim_quadratic",),
)
def quadratic(
    process: Process,
    steps: int,
    *,
    reach: Annotated[float, Option("share of the table that is used", 0.01, 1.0)] = 0.8,
) -> Grid:
    """Squares: `floor(reach T (i / (n - 1))^2)`; the quadratic subsequence of DDIM.

    Where neighbouring squares fall on one index, the later one moves up to the next free index.
    """
    size = _table(process, steps, "quadratic")
    squares = (
        np.linspace(0, (reach * size) ** 0.5, steps) ** 2
        if steps > 1
        else np.array([reach * size])
    )
    free = np.maximum.accumulate(squares.astype(int) - np.arange(steps)) + np.arange(steps)
    return _from_indices(
        process, reversed(np.minimum(free, size - steps + np.arange(steps)).tolist())
    )
