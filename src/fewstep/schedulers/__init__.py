"""Schedulers: which noise levels to visit."""

from fewstep.schedulers.grid import Grid
from fewstep.schedulers.indexed import (
    ddim_uniform,
    leading,
    linspace,
    normal,
    quadratic,
    simple,
    trailing,
)
from fewstep.schedulers.ratios import exponential, karras
from fewstep.schedulers.registry import SCHEDULERS, make_grid, scheduler

__all__ = [
    "SCHEDULERS",
    "Grid",
    "ddim_uniform",
    "exponential",
    "karras",
    "leading",
    "linspace",
    "make_grid",
    "normal",
    "quadratic",
    "scheduler",
    "simple",
    "trailing",
]
