"""Grids that were optimised for a certain model and published as tables, resampled to any number of levels.

The tables stand in `tables.json` beside this file, with their sources.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any, Literal

import numpy as np

from fewstep.process import Process, vp_scaled_linear
from fewstep.registry import Option
from fewstep.schedulers.flow_time import ratio_of
from fewstep.schedulers.grid import Grid
from fewstep.schedulers.ranges import Tail, places, ratio_grid
from fewstep.schedulers.registry import scheduler


@functools.cache
def _tables(name: str) -> dict[str, Any]:
    text = files("fewstep.schedulers").joinpath("tables.json").read_text(encoding="utf-8")
    return json.loads(text)[name]


def resampled(knots: Sequence[float] | np.ndarray, count: int) -> np.ndarray:
    """Log-linear interpolation: as many levels, at equal distances in the list, straight in the logarithm."""
    return np.exp(np.interp(places(count), places(len(knots)), np.log(knots)))


@scheduler(
    "align_your_steps",
    title="Align Your Steps",
    paper="Sabour, Fidler, Kreis 2024, arXiv:2404.14507",
    aliases=("AlignYourStepsScheduler", "AYS SD1"),
    presets={
        "ays": {"table": "sdxl"},
        "ays+": {"table": "sdxl", "tail": "zero"},
        "ays_30": {"table": "sdxl_30"},
        "ays_30+": {"table": "sdxl_30", "tail": "zero"},
        "AYS SDXL": {"table": "sdxl"},
        "AYS SVD": {"table": "svd"},
        "align_your_steps_11": {"table": "sdxl", "tail": "zero"},
        "align_your_steps_32": {"table": "sdxl_32", "tail": "zero"},
        "align_your_steps_gits": {"table": "sdxl_gits", "tail": "zero"},
    },
)
def align_your_steps(
    process: Process,
    steps: int,
    *,
    table: Annotated[
        Literal[
            "sd15",
            "sdxl",
            "svd",
            "deepfloyd",
            "sd15_30",
            "sdxl_30",
            "sd15_32",
            "sdxl_32",
            "sd15_gits",
            "sdxl_gits",
        ],
        Option("the model that the levels were optimised for, and the number of levels"),
    ] = "sd15",
    tail: Tail = "cut",
) -> Grid:
    """Levels that minimise a bound on the Kullback-Leibler divergence, for Stable Diffusion and others: 10 steps.

    Other numbers of steps interpolate between them in the logarithm of `sigma / alpha`. Every process visits the
    same `sigma / alpha`; what lies outside its range moves inside. The tables of 30 and 32 are resampled ones, no
    new optimisation; those called gits were made with GITS.
    """
    knots = _ratios(table)
    return ratio_grid(process, steps, tail, lambda count: resampled(knots, count))


@functools.cache
def _ratios(table: str) -> tuple[float, ...]:
    entry = _tables("align_your_steps")[table]
    if "ratios" in entry:
        return tuple(entry["ratios"])
    return tuple(level.ratio for level in vp_scaled_linear().levels(entry["indices"]))


@scheduler(
    "gits",
    title="GITS",
    paper="Chen et al. 2024, arXiv:2405.11326",
    aliases=("GITSScheduler",),
)
def gits(
    process: Process,
    steps: int,
    *,
    coefficient: Annotated[
        float,
        Option(
            "0.8, 0.85, ..., 1.5, or the nearest of these; larger for more steps at low noise",
            0.8,
            1.5,
        ),
    ] = 1.2,
    tail: Tail = "cut",
) -> Grid:
    """Levels from the geometry of sampling trajectories of Stable Diffusion 1.5, for 2 to 20 steps.

    More steps interpolate between those for 20 in the logarithm of `sigma / alpha`. Every process visits the same
    `sigma / alpha`; what lies outside its range moves inside.
    """
    tables = _tables("gits")
    rows = tables["rows"][f"{round(coefficient * 20) / 20:.2f}"]

    def curve(count: int) -> np.ndarray:
        row = rows[min(max(count - 3, 0), len(rows) - 1)]
        knots = [tables["ratios"][i] for i in row]
        return np.array(knots) if len(knots) == count else resampled(knots, count)

    return ratio_grid(process, steps, tail, curve)


@scheduler(
    "optimal_steps",
    title="OSS",
    paper="Pei, Hu, Gu 2025, arXiv:2503.21774",
    aliases=("OptimalStepsScheduler",),
)
def optimal_steps(
    process: Process,
    steps: int,
    *,
    model: Annotated[
        Literal["flux", "wan", "chroma"], Option("the model that the levels were optimised for")
    ] = "flux",
    tail: Tail = "cut",
) -> Grid:
    """Levels from dynamic programming on trajectories of a flow model, in 10 (Flux), 20 (Wan) or 40 steps (Chroma).

    Other numbers of steps interpolate between them in the logarithm of the flow time. Every process visits the same
    `sigma / alpha`; what lies outside its range moves inside.
    """
    knots = _tables("optimal_steps")[model]
    return ratio_grid(process, steps, tail, lambda count: ratio_of(resampled(knots, count)))
