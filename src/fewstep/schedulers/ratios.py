"""Grids that need only the ends of the range of `sigma / alpha`."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np

from fewstep.process import Process
from fewstep.registry import Option
from fewstep.schedulers.grid import Grid
from fewstep.schedulers.registry import scheduler


def _between_ends(process: Process, curve: np.ndarray) -> Grid:
    """The grid of ratios from the process's noisiest to its least noisy level, its ends exact, then clean data."""
    ratios = curve.tolist()
    ratios[-1] = process.least_noisy.ratio
    ratios[0] = process.noisiest.ratio
    return Grid.from_ratios(process, [*ratios, 0.0])


def _ends(process: Process) -> tuple[float, float]:
    """Largest finite and smallest trained ratio; a path that starts at pure noise begins one table entry below."""
    high = process.noisiest.ratio
    if math.isinf(high):
        high = process.ratio(process.table_time(process.training_steps - 2))
    return high, process.least_noisy.ratio


@scheduler(
    "karras", title="Karras", paper="Karras et al. 2022, arXiv:2206.00364", aliases=("edm",)
)
def karras(
    process: Process,
    steps: int,
    *,
    rho: Annotated[
        float, Option("exponent; larger puts more steps at low noise", 1e-3, 1e3)
    ] = 7.0,
) -> Grid:
    """Equally spaced in `(sigma / alpha)^(1 / rho)` from the noisiest to the least noisy level."""
    high, low = _ends(process)
    return _between_ends(process, high * np.linspace(1.0, (low / high) ** (1 / rho), steps) ** rho)


@scheduler(
    "exponential",
    title="Exponential",
    paper="Lu et al. 2022, arXiv:2206.00927",
    aliases=("log_snr", "lu", "uniform_log_snr"),
)
def exponential(process: Process, steps: int) -> Grid:
    """Equally spaced in log_snr from the noisiest to the least noisy level."""
    high, low = _ends(process)
    return _between_ends(process, np.exp(np.linspace(math.log(high), math.log(low), steps)))
