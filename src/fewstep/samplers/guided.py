"""CFG++: each step goes as the weak estimate says, and the guidance is added to it whole.

Ordinary guidance steps along the guided estimate, `x^_s = q x^ + (1 - q) D_guided` with `q = e^-h`. CFG++ steps along
the weak one, which knows the data's own noise, and shifts: `x^_s = q x^ + (1 - q) D_weak + (D_guided - D_weak)`, that
is `D_guided + r_s noise_weak`. So a scale of 0.4 to 2 is usual here, and 1 is not off. Every step adds the whole
push, whatever its length: more steps mean more guidance, and the orders stated hold where both estimates agree. There
each sampler is the one without `_cfg_pp` in its name.

Source: Chung et al. 2024, arXiv 2406.08070.
"""

from __future__ import annotations

from typing import Annotated

from fewstep.plan import Tape, Vector
from fewstep.process import Level, log_snr_step
from fewstep.registry import Option
from fewstep.samplers.options import AncestralEta, NewestWeight, NoiseFactor, Variable
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import (
    Output,
    as_far_back,
    declare_noise_factor,
    exponential_rule,
    exponential_step,
    is_open,
    kept_level,
    level_between,
    noise_estimate,
    noise_step,
    renewed,
)
from fewstep.schedulers import Grid

PAPER = "Chung et al. 2024, arXiv:2406.08070"


@sampler(
    "euler_cfg_pp",
    title="Euler CFG++",
    paper=PAPER,
    needs=("guided pair",),
    aliases=("sample_euler_cfg_pp", "ddim_cfg_pp", "cfg_pp"),
    presets={
        name: {"eta": 1.0}
        for name in (
            "euler_ancestral_cfg_pp",
            "sample_euler_ancestral_cfg_pp",
            "Euler a CFG++",
        )
    },
)
def euler_cfg_pp(
    tape: Tape, grid: Grid, eta: AncestralEta = 0.0, s_noise: NoiseFactor = 1.0
) -> Vector:
    """DDIM along the weak estimate, then the push; ancestral for eta > 0.

    With eta = 0 that is the guided estimate with the weak one's noise, `alpha_s D_guided + sigma_s noise_weak`.
    """
    declare_noise_factor(tape, eta, s_noise)
    x = tape.start
    for t, s in grid.steps:
        guided, weak = tape.denoise_pair(x, t)
        kept = kept_level(grid.process, t, s, eta)
        x = renewed(tape, exponential_step(x, weak, t, kept), kept, t, s, s_noise)
        x = pushed(x, guided, weak, s)
    return x


@sampler(
    "dpmpp_2m_cfg_pp",
    title="DPM++ 2M CFG++",
    order=2,
    paper=PAPER,
    needs=("guided pair",),
    aliases=("sample_dpmpp_2m_cfg_pp",),
    mistake="the slope is the guided estimate less the weak one of the step before, so it holds guidance too, "
    "about half a step's length of it",
    corrected_order=2,
)
def dpmpp_2m_cfg_pp(
    tape: Tape,
    grid: Grid,
    corrected: Annotated[bool, Option("take the slope from the weak estimates alone")] = False,
) -> Vector:
    """DPM++ 2M along the weak estimate, then the push.

    The first step, and a step to clean data, is of first order.
    """
    x, previous = tape.start, None
    for t, s in grid.steps:
        guided, weak = tape.denoise_pair(x, t)
        target = weak
        if previous is not None and is_open(previous.level, s):
            ratio = log_snr_step(previous.level, t) / log_snr_step(t, s)
            target = weak + ((weak if corrected else guided) - previous.value) / (2 * ratio)
        x = pushed(exponential_step(x, target, t, s), guided, weak, s)
        previous = Output(t, weak)
    return x


@sampler(
    "dpmpp_2s_ancestral_cfg_pp",
    title="DPM++ 2S a CFG++",
    family="SDE",
    order=2,
    calls_per_step=2,
    stochastic=True,
    paper=PAPER,
    needs=("guided pair",),
    aliases=("sample_dpmpp_2s_ancestral_cfg_pp",),
    presets={"sample_dpmpp_2s_ancestral_RF_cfg_pp": {"variable": "flow_time"}},
)
def dpmpp_2s_ancestral_cfg_pp(
    tape: Tape,
    grid: Grid,
    eta: AncestralEta = 1.0,
    s_noise: NoiseFactor = 1.0,
    variable: Variable = "ratio",
) -> Vector:
    """DPM++ 2S a along the weak estimates of both stages, then the push of the first.

    A step from pure noise or to clean data is of first order.
    """
    declare_noise_factor(tape, eta, s_noise)
    x = tape.start
    for t, s in grid.steps:
        guided, weak = tape.denoise_pair(x, t)
        target, kept = weak, kept_level(grid.process, t, s, eta, variable)
        if is_open(t, kept):
            middle = level_between(grid.process, t, kept, 0.5)
            _, target = tape.denoise_pair(exponential_step(x, weak, t, middle), middle)
        x = renewed(tape, exponential_step(x, target, t, kept), kept, t, s, s_noise)
        x = pushed(x, guided, weak, s)
    return x


@sampler(
    "res_multistep_cfg_pp",
    title="RES multistep CFG++",
    order=2,
    paper="Zhang, Song, Chen 2023, arXiv:2308.02157; ComfyUI",
    needs=("guided pair",),
    aliases=("sample_res_multistep_cfg_pp",),
    presets={
        "res_multistep_ancestral_cfg_pp": {"eta": 1.0},
        "sample_res_multistep_ancestral_cfg_pp": {"eta": 1.0},
    },
    mistake="from the second step on the push is added before the step, which then shrinks it as it does the noise",
    corrected_order=2,
)
def res_multistep_cfg_pp(
    tape: Tape,
    grid: Grid,
    eta: AncestralEta = 0.0,
    s_noise: NoiseFactor = 1.0,
    corrected: Annotated[bool, Option("add the push after each step, not before")] = False,
) -> Vector:
    """RES multistep along the weak estimate, with the push; ancestral for eta > 0.

    The first step, and one to clean data, is of first order and adds the push after it.
    """
    declare_noise_factor(tape, eta, s_noise)
    process, x, earlier = grid.process, tape.start, []
    for t, s in grid.steps:
        guided, weak = tape.denoise_pair(x, t)
        kept = kept_level(process, t, s, eta)
        if not is_open(t, kept):
            earlier = []
        pushes_before = earlier and not corrected
        x = pushed(x, guided, weak, t) if pushes_before else x
        x = exponential_rule(x, [Output(t, weak), *earlier], kept)
        x = renewed(tape, x, kept, t, s, s_noise)
        x = x if pushes_before else pushed(x, guided, weak, s)
        if is_open(t, kept):
            earlier = [Output(as_far_back(process, t, kept, s), weak)]
    return x


@sampler(
    "gradient_estimation_cfg_pp",
    title="Gradient estimation CFG++",
    paper="Permenter, Yuan 2024, arXiv:2306.04848; ComfyUI",
    needs=("guided pair",),
    aliases=("sample_gradient_estimation_cfg_pp",),
)
def gradient_estimation_cfg_pp(
    tape: Tape,
    grid: Grid,
    gamma: NewestWeight = 2.0,
) -> Vector:
    """Euler CFG++ along `gamma noise + (1 - gamma) earlier noise` of the weak estimate; over-corrects on purpose."""
    x, earlier = tape.start, None
    for t, s in grid.steps:
        guided, weak = tape.denoise_pair(x, t)
        noise = noise_estimate(x, weak, t)
        x = pushed(exponential_step(x, weak, t, s), guided, weak, s)
        if earlier is not None and not s.is_clean:
            x = x + ((gamma - 1) * s.alpha * (s.ratio - t.ratio)) * (noise - earlier)
        earlier = None if t.is_pure_noise else noise
    return x


@sampler(
    "cfgpp_ud10_ab",
    title="CFG++ UD10 AB",
    order=0,
    paper="ComfyUI",
    needs=("guided pair",),
    aliases=("sample_cfgpp_ud10_ab",),
)
def cfgpp_ud10_ab(
    tape: Tape,
    grid: Grid,
    ahead: Annotated[
        float, Option("how far the weak noise is extrapolated, as a share of the step", 0, 1)
    ] = 0.1,
    history: Annotated[
        float, Option("share of Adams-Bashforth in the step; the rest is Euler", 0, 1)
    ] = 0.25,
) -> Vector:
    """Euler CFG++ with the weak noise extrapolated, mixed with its Adams-Bashforth step of second order.

    Since the extrapolated noise meets an estimate of x_0 that is not, the method does not converge to the ODE's
    solution: in the limit it follows `dx^ / dr = noise + ahead r dnoise / dr`. With `ahead = 0` it is of first order,
    with `history = 1` besides of second. The last step, to clean data, extrapolates the guided estimate.
    """
    x, levels, estimates, noises, slopes = tape.start, [], [], [], []
    for t, s in grid.steps:
        guided, weak = tape.denoise_pair(x, t)
        if t.is_pure_noise:
            x = pushed(exponential_step(x, weak, t, s), guided, weak, s)
            continue
        levels.append(t)
        estimates.append(guided)
        noises.append(noise_estimate(x, weak, t))
        share = (s.ratio - t.ratio) / (t.ratio - levels[-2].ratio) if len(levels) > 1 else 0.0
        if s.is_clean:
            x = _onward(estimates, share)
        else:
            noise = _onward(noises, ahead * share)
            slopes.append((guided + s.ratio * noise - x / t.alpha) / (s.ratio - t.ratio))
            x = noise_step(x, _onward(slopes, history * share / 2), t, s)
    return x


def _onward(values: list[Vector], share: float) -> Vector:
    """The last value, and a share of its change since the one before."""
    newest, *earlier = values[::-1]
    return newest + share * (newest - earlier[0]) if earlier else newest


def pushed(x: Vector, guided: Vector, weak: Vector, t: Level) -> Vector:
    """Shift a point of level t by the whole push, `x^ + D_guided - D_weak`."""
    return x + t.alpha * (guided - weak)
