"""Samplers: readable maths `(tape, grid, **options) -> Vector`, traced once into a Plan."""

from fewstep.samplers import (
    adaptive,
    amed,
    ancestral,
    distilled,
    dpm_solver_v3,
    guided,
    inversion,
    linear_multistep,
    momentum,
    multistep,
    predictor_corrector,
    runge_kutta,
    singlestep,
    stochastic,
    supreme,
    taylor,
)
from fewstep.samplers.registry import SAMPLERS, SamplerEntry, plan, sampler

__all__ = [
    "SAMPLERS",
    "SamplerEntry",
    "adaptive",
    "amed",
    "ancestral",
    "distilled",
    "dpm_solver_v3",
    "guided",
    "inversion",
    "linear_multistep",
    "momentum",
    "multistep",
    "plan",
    "predictor_corrector",
    "runge_kutta",
    "sampler",
    "singlestep",
    "stochastic",
    "supreme",
    "taylor",
]
