"""Exponential solvers that look back at earlier estimates: DPM-Solver(++) multistep, RES and UniPC."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from fewstep.plan import Tape, Vector
from fewstep.process import Level, log_snr_step
from fewstep.registry import Option
from fewstep.samplers.options import (
    AncestralEta,
    Corrected,
    LowerOrderFinal,
    NoiseFactor,
    SolverType,
)
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import (
    Output,
    as_far_back,
    declare_noise_factor,
    dpm_moments,
    exponential_rule,
    exponential_step,
    is_open,
    kept_level,
    look_back,
    noise_estimate,
    renewed,
)
from fewstep.schedulers import Grid

Rule = Callable[[Vector, list[Output[Vector]], Level], Vector]
"""One step `(x, outputs, s)` with outputs at levels behind, newest first; the newest is the one at x."""

FEW_STEPS = 15
"""Below this many steps `lower_order_final` acts: the number that diffusers took for DPM-Solver and DEIS."""


def multistep(
    tape: Tape,
    grid: Grid,
    order: int,
    rule: Rule,
    *,
    noise_form: bool = False,
    lower_order_final: bool = False,
    to_clean: bool = False,
) -> Vector:
    """The loop of every explicit multistep method: each step is a rule on the newest output and earlier ones.

    There is one output at the first step and one more at each that follows, up to the order. A step from pure noise is
    of first order and leaves nothing to look back at; a step to clean data returns the newest estimate.

    Args:
        tape: The tape.
        grid: The grid.
        order: Largest number of outputs that the rule is given.
        rule: One step.
        noise_form: Whether the outputs are estimates of the noise, not of x_0.
        lower_order_final: Whether short runs end with a step of order 2 and one of order 1.
        to_clean: Whether the rule takes the step to clean data too.
    """
    x, outputs = tape.start, []
    few = lower_order_final and len(grid.steps) < FEW_STEPS
    for left, (t, s) in zip(range(len(grid.steps), 0, -1), grid.steps, strict=True):
        denoised = tape.denoise(x, t)
        if is_open(t, s) or (to_clean and not t.is_pure_noise):
            value = noise_estimate(x, denoised, t) if noise_form else denoised
            outputs = [Output(t, value), *outputs][:order]
            x = rule(x, outputs[:left] if few else outputs, s)
        else:
            x = exponential_step(x, denoised, t, s)
    return x


def _dpm_solver(
    solver_type: Literal["midpoint", "heun"], corrected: bool = False, noise_form: bool = False
) -> Rule:
    """The rule of DPM-Solver (noise form) and DPM-Solver++ (data form)."""

    def rule(x: Vector, outputs: list[Output[Vector]], s: Level) -> Vector:
        h = log_snr_step(outputs[0].level, s)
        moments = dpm_moments(-h if noise_form else h, len(outputs) - 1, solver_type, corrected)
        return exponential_rule(x, outputs, s, noise_form=noise_form, moments=moments)

    return rule


@sampler(
    "dpmpp_2m",
    title="DPM++ 2M",
    order=2,
    paper="Lu et al. 2022, arXiv:2211.01095",
    aliases=(
        "DPM-Solver++(2M)",
        "DPMSolverMultistepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "sample_dpmpp_2m",
    ),
)
def dpmpp_2m(tape: Tape, grid: Grid, solver_type: SolverType = "midpoint") -> Vector:
    """Second-order multistep on the data prediction, exact for the linear part of the ODE.

    The first step, and a step to clean data, is of first order.
    """
    return multistep(tape, grid, 2, _dpm_solver(solver_type))


@sampler(
    "dpmpp_3m",
    title="DPM++ 3M",
    order=2,
    corrected_order=3,
    mistake="the last term of the third-order step has half its right weight, I_2 / 2 in place of I_2, in every "
    "public implementation, so it is of second order",
    paper="Lu et al. 2022, arXiv:2211.01095",
    aliases=("DPM-Solver++(3M)", "sample_dpmpp_3m"),
)
def dpmpp_3m(
    tape: Tape,
    grid: Grid,
    solver_type: SolverType = "midpoint",
    lower_order_final: LowerOrderFinal = True,
    corrected: Corrected = False,
) -> Vector:
    """Multistep on the data prediction with two earlier estimates; of third order when corrected.

    `solver_type` is that of the second step, and of the last but one in short runs.
    """
    rule = _dpm_solver(solver_type, corrected)
    return multistep(tape, grid, 3, rule, lower_order_final=lower_order_final)


@sampler(
    "dpm_solver_multistep",
    title="DPM-Solver multistep",
    order=2,
    corrected_order=3,
    mistake="the last term of the third-order step has half its right weight, J_2 / 2 in place of J_2, in every "
    "public implementation, so it is of second order",
    paper="Lu et al. 2022, arXiv:2206.00927",
    aliases=("dpm_solver_3m",),
    presets={"dpm_solver_2m": {"order": 2}},
)
def dpm_solver_multistep(
    tape: Tape,
    grid: Grid,
    order: Annotated[int, Option("of the multistep method", 1, 3)] = 3,
    solver_type: SolverType = "midpoint",
    lower_order_final: LowerOrderFinal = True,
    corrected: Corrected = False,
) -> Vector:
    """Multistep on the noise prediction; with order 1 it is DDIM, with order 3 of third order when corrected."""
    rule = _dpm_solver(solver_type, corrected, noise_form=True)
    return multistep(tape, grid, order, rule, noise_form=True, lower_order_final=lower_order_final)


@sampler(
    "res_multistep",
    title="RES multistep",
    order=2,
    paper="Zhang, Song, Chen 2023, arXiv:2308.02157",
    aliases=("sample_res_multistep",),
    presets={
        "res_multistep_ancestral": {"eta": 1.0},
        "sample_res_multistep_ancestral": {"eta": 1.0},
    },
)
def res_multistep(
    tape: Tape,
    grid: Grid,
    eta: AncestralEta = 0.0,
    s_noise: NoiseFactor = 1.0,
) -> Vector:
    """Exact second-order multistep on the data prediction, `dpmpp_2m` of type heun; ancestral for eta > 0.

    An ancestral step goes down past s, to the kept part of its noise, and back up with fresh noise. The slope is taken
    along these longer steps: the earlier estimate counts as made as far back as the last step went down. This keeps the
    second order in law; for eta = 1 it is `dpmpp_2m_sde` of type heun. (Placed at its own level, the estimate would be
    extrapolated over the noise as well, and the order in law falls to 1.)
    """
    declare_noise_factor(tape, eta, s_noise)
    process, x, earlier = grid.process, tape.start, []
    for t, s in grid.steps:
        newest = Output(t, tape.denoise(x, t))
        down = kept_level(process, t, s, eta)
        if is_open(t, down):
            x = exponential_rule(x, [newest, *earlier], down)
            earlier = [Output(as_far_back(process, t, down, s), newest.value)]
        else:
            x, earlier = exponential_step(x, newest.value, t, down), []
        x = renewed(tape, x, down, t, s, s_noise)
    return x


@sampler(
    "unipc",
    title="UniPC",
    family="implicit",
    order=3,
    paper="Zhao et al. 2023, arXiv:2302.04867",
    aliases=("uni_pc", "UniPCMultistepScheduler"),
    presets={
        "uni_pc_bh1": {"variant": "bh1", "order": 3},
        "uni_pc_bh2": {"variant": "bh2", "order": 3},
        "sample_unipc": {"variant": "bh1", "order": 3},
        "sample_unipc_bh2": {"variant": "bh2", "order": 3},
    },
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
        used = look_back(outputs, s, p)
        last_step = None if t.is_pure_noise else (x, used)
        x = _unified_step(x, used, None, s, variant)
    return x


def _unified_step(
    x: Vector, used: list[Output], corrector: Output | None, s: Level, variant: str
) -> Vector:
    """UniP, or with an output at s UniC: exact for D polynomial in log_snr.

    A single weight is not solved for but taken as `B(h) / 2`, as published.
    """
    outputs = used if corrector is None else [*used, corrector]
    if len(outputs) != 2:
        return exponential_rule(x, outputs, s)
    h = log_snr_step(outputs[0].level, s)
    moment = h if variant == "bh1" else -math.expm1(-h)
    return exponential_rule(x, outputs, s, moments=[moment / 2])
