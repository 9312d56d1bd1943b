"""What all schedulers share: how a grid ends, and how it stays inside its process and falls strictly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import numpy as np

from fewstep.process import Process
from fewstep.registry import Option
from fewstep.schedulers.grid import Grid

Tail = Annotated[
    Literal["zero", "cut", "min"],
    Option(
        "the end of the grid: n levels and then clean data (zero); n + 1 levels, clean data in place of the last one "
        "(cut); n + 1 levels and no clean data (min)"
    ),
]

ROUNDING = 1e-9
"""Ratios that differ by less than this share are one level."""


def level_count(steps: int, tail: str) -> int:
    """Number of levels that a curve is asked for."""
    return steps if tail == "zero" else steps + 1


def places(count: int) -> np.ndarray:
    """Equally spaced places along the way, from 0 at the noisy end to 1; a single one is at 0."""
    return np.linspace(0.0, 1.0, count)


def ends(process: Process) -> tuple[float, float]:
    """Largest finite and smallest trained ratio; a path that starts at pure noise begins one table entry below."""
    high = process.noisiest.ratio
    if math.isinf(high):
        last = process.training_steps - 1
        high = process.ratio(process.table_time(max(last - 1, last / 2)))
    return high, process.least_noisy.ratio


def ratio_grid(
    process: Process, steps: int, tail: str, curve: Callable[[int], np.ndarray]
) -> Grid:
    """The grid of a curve of falling ratios, of which it can give any number.

    A curve that begins at the largest finite ratio begins at the noisiest level, which may be pure noise.
    """
    ratios = curve(level_count(steps, tail))
    if math.isclose(ratios[0], ends(process)[0], rel_tol=ROUNDING):
        ratios[0] = process.noisiest.ratio
    return held_grid(process, ratios[:-1] if tail == "cut" else ratios, tail != "min")


def held_grid(process: Process, ratios: np.ndarray, end_clean: bool = True) -> Grid:
    """The grid of falling ratios, held to the process's range, then clean data."""
    return Grid.from_ratios(process, [*within(process, ratios), *[0.0] * end_clean])


def within(process: Process, ratios: np.ndarray) -> list[float]:
    """Falling ratios held to the process's range, and strictly falling.

    What lies outside the range, or on its ends more than once, is spread evenly in log_snr from the end of the range
    to the nearest ratio inside; if none is inside, over the whole range.
    """
    high, low = ends(process)
    noisiest = process.noisiest.ratio  # infinite where the path starts at pure noise
    inside = (ratios > low * (1 + ROUNDING)) & (ratios < noisiest * (1 - ROUNDING))
    order = np.arange(len(ratios))
    fixed = inside | (order == 0) | (order == len(ratios) - 1)
    if inside.any():
        logs = np.log(np.where(inside, ratios, np.clip(ratios, low, high)))
    else:
        logs = np.linspace(math.log(high), math.log(low), len(ratios))
    result = np.where(inside, ratios, np.exp(np.interp(order, order[fixed], logs[fixed]))).tolist()
    if len(result) > 1 and not inside[-1]:
        result[-1] = low
    if not inside[0]:
        result[0] = noisiest
    return result


def index_grid(
    process: Process, steps: int, tail: str, indices: Callable[[int], Iterable[float]]
) -> Grid:
    """The grid of falling table indices, of which `indices` can give any number."""
    falling = np.array(list(indices(level_count(steps, tail))), dtype=float)
    visited = apart(falling[:-1] if tail == "cut" else falling, process.training_steps)
    return Grid.from_times(process, map(process.table_time, visited), end_clean=tail != "min")


def apart(falling: np.ndarray, size: int) -> np.ndarray:
    """Falling table indices with repeats moved apart.

    The later of two equal ones, seen from clean data, moves up to the next free entry. With more indices than
    entries they are spread evenly over the table.
    """
    count = len(falling)
    gap = min(1.0, (size - 1) / max(count - 1, 1))
    least = gap * np.arange(count)  # the lowest that each index can be, seen from the clean end
    rising = np.clip(falling[::-1], 0, size - 1)
    free = np.maximum.accumulate(rising - least) + least
    return np.minimum(free, size - 1 - gap * (count - 1) + least)[::-1]
