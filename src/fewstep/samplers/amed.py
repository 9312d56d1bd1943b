"""A midpoint method whose midpoints are learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fewstep.errors import InvalidInputError
from fewstep.plan import Tape, Vector
from fewstep.registry import Option
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import (
    exponential_step,
    is_open,
    level_between,
    noise_estimate,
    noise_step,
)
from fewstep.schedulers import Grid


@sampler(
    "amed",
    title="AMED-Solver",
    family="distilled",
    order=2,
    calls_per_step=2,
    paper="Zhou et al. 2024, arXiv:2312.00094",
    aliases=("amed_solver", "amed_sampler"),
    needs=("predictor",),
)
def amed(
    tape: Tape,
    grid: Grid,
    predictor: Annotated[
        Callable[[Any, Any, Any, Any], tuple[float, float]] | None,
        Option(
            "(x, denoised, t, s) -> (fraction, scale), asked at each step in place of the numbers"
        ),
    ] = None,
    fraction: Annotated[
        tuple[float, ...],
        Option("where the midpoint lies in log_snr; one for each step, or for all", 0, 1),
    ] = (0.5,),
    scale: Annotated[
        tuple[float, ...],
        Option("factor on the slope at the midpoint; one for each step, or for all", 0, 2),
    ] = (1.0,),
) -> Vector:
    """A step with the slope at a midpoint, `x^_s = x^ + scale (r_s - r_t) noise(r_t^(1 - fraction) r_s^fraction)`.

    Fractions and scales are trained so that few steps do the work of many, for the whole path or, with a `predictor`,
    for each point of it; its x and estimate are tensors, and it gives one pair of numbers for the batch. The default
    ones make it `dpm_2`. A step from pure noise or to clean data is an Euler step, which needs neither.
    """
    fractions = _one_each("fraction", fraction, grid)
    scales = _one_each("scale", scale, grid)
    x = tape.start
    for (t, s), place, factor in zip(grid.steps, fractions, scales, strict=True):
        denoised = tape.denoise(x, t)
        if not is_open(t, s):
            x = exponential_step(x, denoised, t, s)
            continue
        if predictor is not None:
            place, factor = _predicted(predictor(x, denoised, t, s))
        middle = level_between(grid.process, t, s, place)
        point = exponential_step(x, denoised, t, middle)
        noise = noise_estimate(point, tape.denoise(point, middle), middle)
        x = noise_step(x, factor * noise, t, s)
        if factor != 1:
            tape.declare_inexact("noise")
    return x


def _one_each(name: str, numbers: Sequence[float], grid: Grid) -> Sequence[float]:
    """One number for each step."""
    count = len(grid.steps)
    if len(numbers) not in (1, count):
        raise InvalidInputError(
            f"amed: {name} has {len(numbers)} numbers for {count} steps; give one, or one for each step"
        )
    return numbers if len(numbers) == count else [numbers[0]] * count


def _predicted(answer: Any) -> tuple[float, float]:
    try:
        place, factor = (float(number) for number in answer)
    except (TypeError, ValueError, RuntimeError):
        place = factor = math.nan
    if not (0 <= place <= 1 and math.isfinite(factor)):
        raise InvalidInputError(
            f"amed: the predictor gave {answer!r:.80}; it must give two numbers, a fraction in 0..1 and a finite scale"
        )
    return place, factor
