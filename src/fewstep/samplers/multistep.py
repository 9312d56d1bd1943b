"""Solvers that look back at earlier estimates of x_0: DPM-Solver++(2M) and UniPC."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from fewstep.plan import Tape, Vector
from fewstep.process import Level, log_snr_step
from fewstep.registry import Option
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import Output, exponential_rule, exponential_step
from fewstep.schedulers import Grid


@sampler(
    "dpmpp_2m",
    title="DPM++ 2M",
    order=2,
    paper="Lu et al. 2022, arXiv:2211.01095",
    aliases=("DPM-Solver++(2M)", "DPMSolverMultistepScheduler", "sample_dpmpp_2m"),
)
def dpmpp_2m(tape: Tape, grid: Grid) -> Vector:
    """Second-order multistep on the data prediction, exact for the linear part of the ODE.

    The first step, and a step to clean data, is of first order.
    """
    x, previous = tape.start, None
    for t, s in grid.steps:
        denoised = target = tape.denoise(x, t)
        if previous is not None and not s.is_clean:
            ratio = log_snr_step(previous.level, t) / log_snr_step(t, s)
            target = denoised + (denoised - previous.value) / (2 * ratio)
        x = exponential_step(x, target, t, s)
        previous = Output(t, denoised)
    return x


@sampler(
    "unipc",
    title="UniPC",
    order=3,
    paper="Zhao et al. 2023, arXiv:2302.04867",
    aliases=("uni_pc", "UniPCMultistepScheduler"),
)
def unipc(
    tape: Tape,
    grid: Grid,
    order: Annotated[
        int, Option("of the predictor; with the corrector the method has one more", 1, 6)
    ] = 2,
    variant: Annotated[
        Literal["bh1", "bh2"], Option("the weight B(h) of the two closed-form coefficients")
    ] = "bh2",
    lower_order_final: Annotated[
        bool, Option("lower the order towards a clean end, where the last step is of order 1")
    ] = True,
) -> Vector:
    """Predictor-corrector of any order: the estimate made at a point also corrects the step that led to it.

    The corrected point is not evaluated again, so there is one network call for each step.
    """
    x, outputs, last_step = tape.start, [], None
    for i, (t, s) in enumerate(grid.steps):
        newest = Output(t, tape.denoise(x, t))
        if last_step is not None:
            x = tape.settle(_unified_step(*last_step, newest, t, variant))
        outputs.append(newest)
        remaining = len(grid.steps) - i
        p = min(order, remaining) if lower_order_final and grid.levels[-1].is_clean else order
        history = [] if s.is_clean else [o for o in outputs[-p:-1] if not o.level.is_pure_noise]
        last_step = None if t.is_pure_noise else (x, [newest, *history])
        x = _unified_step(x, [newest, *history], None, s, variant)
    return x


def _unified_step(
    x: Vector, history: list[Output], corrector: Output | None, s: Level, variant: str
) -> Vector:
    """UniP, or with an output at s UniC: exact for D polynomial in log_snr.

    A single weight is not solved for but taken as `B(h) / 2`, as published.
    """
    outputs = history if corrector is None else [*history, corrector]
    if len(outputs) != 2:
        return exponential_rule(x, outputs, s)
    h = log_snr_step(outputs[0].level, s)
    moment = h if variant == "bh1" else -math.expm1(-h)
    return exponential_rule(x, outputs, s, moments=[moment / 2])
