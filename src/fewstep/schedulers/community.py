"""Grids that have no paper: curves drawn by users, between the ends of the range of `sigma / alpha`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np

from fewstep.process import Process
from fewstep.registry import Option
from fewstep.schedulers.grid import Grid
from fewstep.schedulers.indexed import simple_indices
from fewstep.schedulers.ranges import Tail, apart, ends, held_grid, places, ratio_grid
from fewstep.schedulers.registry import scheduler

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


@scheduler(
    "golden",
    title="Golden",
    paper="Extraltodeus",
    aliases=("the golden scheduler",),
)
def golden(process: Process, steps: int, *, tail: Tail = "zero") -> Grid:
    """`(1 - r)^phi sigma_max + r^phi sigma_min`, phi the golden ratio and `r = i / (n - 1)`."""
    high, low = ends(process)

    def curve(count: int) -> np.ndarray:
        r = places(count)
        return (1 - r) ** GOLDEN_RATIO * high + r**GOLDEN_RATIO * low

    return ratio_grid(process, steps, tail, curve)


@scheduler("gaussian_tail", title="Gaussian tail", paper="Extraltodeus")
def gaussian_tail(process: Process, steps: int, *, tail: Tail = "zero") -> Grid:
    """`sigma_min + (sigma_max - sigma_min) erfc(3.2905 r / sqrt(2))` with `r = i / (n - 1)`: a Gaussian's tail."""
    return _between(
        process, steps, tail, np.vectorize(lambda r: math.erfc(3.2905 * r / math.sqrt(2)))
    )


@scheduler("phi", title="Phi", paper="Extraltodeus; reForge")
def phi(
    process: Process,
    steps: int,
    *,
    power: Annotated[float, Option("exponent of the golden ratio", 0, 5)] = 2.0,
    tail: Tail = "zero",
) -> Grid:
    """`sigma_min + (sigma_max - sigma_min) (1 - r)^(phi^power)`, phi the golden ratio and `r = i / (n - 1)`."""
    return _between(process, steps, tail, lambda r: (1 - r) ** GOLDEN_RATIO**power)


def _between(
    process: Process, steps: int, tail: str, share: Callable[[np.ndarray], np.ndarray]
) -> Grid:
    """The grid that goes from the lower to the upper end by a share, a function of the place r along the way."""
    high, low = ends(process)
    return ratio_grid(
        process, steps, tail, lambda count: low + (high - low) * share(places(count))
    )


@scheduler(
    "cosine",
    title="Cosine",
    paper="Forge, reForge",
    presets={"cosexpblend": {"blend": True}, "cosine-exponential blend": {"blend": True}},
)
def cosine(
    process: Process,
    steps: int,
    *,
    blend: Annotated[
        bool, Option("go over to the exponential curve in proportion to the way")
    ] = False,
    tail: Tail = "zero",
) -> Grid:
    """`sigma_min + (sigma_max - sigma_min) (1 + cos(pi sqrt(r))) / 2` with `r = i / (n - 1)`."""
    high, low = ends(process)

    def curve(count: int) -> np.ndarray:
        r = places(count)
        wave = low + (high - low) * (1 + np.cos(np.pi * np.sqrt(r))) / 2
        return wave + r * (high * (low / high) ** r - wave) if blend else wave

    return ratio_grid(process, steps, tail, curve)


@scheduler(
    "sinusoidal_sf",
    title="Sinusoidal SF",
    paper="reForge",
    presets={"invcosinusoidal_sf": {"shape": "cosine"}},
)
def sinusoidal_sf(
    process: Process,
    steps: int,
    *,
    shape: Annotated[
        Literal["sine", "cosine"], Option("1 - sin(pi r / 2), or (1 + cos(pi r)) / 2")
    ] = "sine",
    factor: Annotated[
        float, Option("exponent; larger for more steps at low noise", 0.1, 10)
    ] = 3.5,
    tail: Tail = "zero",
) -> Grid:
    """A power of a sine wave: `sigma_max ((sigma_min + (sigma_max - sigma_min) g) / sigma_max)^factor`.

    Here g is `1 - sin(pi r / 2)` with `r = i / (n - 1)`. What falls below the process's range moves inside.
    """
    high, low = ends(process)

    def curve(count: int) -> np.ndarray:
        angle = np.pi / 2 * places(count)
        wave = 1 - np.sin(angle) if shape == "sine" else np.cos(angle) ** 2
        return high * (low / high + (1 - low / high) * wave) ** factor

    return ratio_grid(process, steps, tail, curve)


@scheduler("simple_exponential", title="Simple exponential", paper="Clybius")
def simple_exponential(process: Process, steps: int) -> Grid:
    """The levels of `simple`, each times `1 - i / n`."""
    indices = apart(simple_indices(process, steps), process.training_steps)
    ratios = process.levels([process.table_time(float(i)) for i in indices])
    return held_grid(
        process, np.array([level.ratio for level in ratios]) * np.linspace(1, 0, steps + 1)[:-1]
    )
