"""Schedulers: which noise levels to visit."""

from fewstep.schedulers.community import (
    cosine,
    gaussian_tail,
    golden,
    phi,
    simple_exponential,
    sinusoidal_sf,
)
from fewstep.schedulers.flow_time import bong_tangent, flow, flow_dynamic, linear_quadratic
from fewstep.schedulers.grid import Grid
from fewstep.schedulers.indexed import (
    beta,
    ddim_uniform,
    lcm,
    leading,
    linspace,
    normal,
    quadratic,
    sd_turbo,
    simple,
    trailing,
)
from fewstep.schedulers.published import align_your_steps, gits, optimal_steps
from fewstep.schedulers.ratios import (
    exponential,
    iddpm,
    karras,
    kl_optimal,
    laplace,
    time_uniform,
    vp,
)
from fewstep.schedulers.registry import SCHEDULERS, make_grid, scheduler

__all__ = [
    "SCHEDULERS",
    "Grid",
    "align_your_steps",
    "beta",
    "bong_tangent",
    "cosine",
    "ddim_uniform",
    "exponential",
    "flow",
    "flow_dynamic",
    "gaussian_tail",
    "gits",
    "golden",
    "iddpm",
    "karras",
    "kl_optimal",
    "laplace",
    "lcm",
    "leading",
    "linear_quadratic",
    "linspace",
    "make_grid",
    "normal",
    "optimal_steps",
    "phi",
    "quadratic",
    "scheduler",
    "sd_turbo",
    "simple",
    "simple_exponential",
    "sinusoidal_sf",
    "time_uniform",
    "trailing",
    "vp",
]
