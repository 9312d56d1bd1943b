"""Samplers: readable maths `(tape, grid, **options) -> Vector`, traced once into a Plan."""

from fewstep.samplers import ancestral, multistep, runge_kutta
from fewstep.samplers.registry import SAMPLERS, SamplerEntry, plan, sampler

__all__ = ["SAMPLERS", "SamplerEntry", "ancestral", "multistep", "plan", "runge_kutta", "sampler"]
