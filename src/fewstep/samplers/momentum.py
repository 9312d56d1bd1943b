"""Community samplers that dance, repeat corrections or smooth their steps: all linear, none better than its base.

They come from a popular collection of samplers for ComfyUI; no paper derives them. What they add to the solvers that
they are built on is said with each.
"""

from __future__ import annotations

import math
from typing import Annotated

from fewstep.plan import Tape, Vector
from fewstep.process import Level, log_snr_step
from fewstep.registry import Option
from fewstep.samplers.options import AncestralEta, Corrected, NoiseFactor, SdeEta, Stage
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import (
    Output,
    Split,
    ancestral_split,
    brownian_pair,
    declare_noise_factor,
    dpm_moments,
    exponential_moments,
    exponential_rule,
    exponential_step,
    fresh_std,
    freshened,
    is_open,
    level_between,
    noise_estimate,
    raised,
    renoised,
    sde_rule,
)
from fewstep.schedulers import Grid

COLLECTION = "Clybius, ComfyUI-Extra-Samplers"
BEHIND = 1
"""The lap of the draws that a step makes besides its own."""

MomentumShare = Annotated[
    float,
    Option("how much of the last step's movement is kept at high noise; not 0: order 1", -1, 1),
]


class _Momentum:
    """A memory `v <- c v + (1 - c) u` of what steps add to the part of x^ that they keep; the first v is u.

    `c = m (r / r_max - m / 2)` falls from its largest at the first finite level r_max to `-m^2 / 2` at clean data. It
    depends on the grid alone. With m != 0 an estimate that does not change is no longer reached exactly.
    """

    def __init__(self, tape: Tape, grid: Grid, momentum: float) -> None:
        self.tape, self.momentum = tape, momentum
        self.top = max(level.ratio for level in grid.levels if not level.is_pure_noise)
        self.velocity: Vector | None = None
        if momentum:
            tape.declare_inexact("signal")

    def __call__(self, step: Vector, kept: Vector, t: Level, s: Level) -> Vector:
        """The step from t to s with what it adds to `kept` smoothed."""
        if not self.momentum:
            return step
        added = (step - kept) / s.alpha
        if self.velocity is not None:
            share = self.momentum * (t.ratio / self.top - self.momentum / 2)
            added = share * self.velocity + (1 - share) * added
        self.velocity = self.tape.settle(added)
        return kept + s.alpha * self.velocity


@sampler(
    "euler_ancestral_dancing",
    title="Euler a dancing",
    family="momentum",
    order=0,
    stochastic=True,
    paper=COLLECTION,
    aliases=("sample_euler_ancestral_dancing",),
)
def euler_ancestral_dancing(
    tape: Tape,
    grid: Grid,
    eta: AncestralEta = 1.0,
    eta_dance: Annotated[
        float, Option("share of the noise that is fresh when it dances back up", 0, 1)
    ] = 1.0,
    leap: Annotated[int, Option("how many levels down it leaps before that", 1, 16)] = 2,
    s_noise: NoiseFactor = 1.0,
) -> Vector:
    """An ancestral Euler step too far down, then back up to the next level with the same estimate and more noise.

    In the original any eta_dance > 0 takes the square root of a negative number, and the NaN turns into all noise being
    fresh: with the defaults this is `lcm`, but for `euler_ancestral` over the last leap - 1 noisy levels. The same
    comes of eta_dance = 1 here, and what lies below blends with the noise that the leap kept. With eta_dance = 0 it is
    Euler with the noise renewed as fast as over the whole leap, of first order.
    """
    declare_noise_factor(tape, eta + eta_dance, s_noise)
    x = tape.start
    for (t, s), later in zip(grid.steps, _leaps(grid, leap), strict=True):
        denoised = tape.denoise(x, t)
        noise, fresh = noise_estimate(x, denoised, t), s_noise * tape.noise(t, s)
        if later is s:
            x = renoised(denoised, noise, fresh, ancestral_split(t, s, eta), s)
        else:
            leapt = s_noise * tape.noise(t, s, lap=BEHIND)
            low = renoised(denoised, noise, leapt, ancestral_split(t, later, eta), later)
            kept = math.sqrt((1 - eta_dance) * (1 + eta_dance))
            split = Split(kept * s.ratio, eta_dance * s.ratio)
            x = renoised(denoised, noise_estimate(low, denoised, later), fresh, split, s)
    return x


def _leaps(grid: Grid, leap: int) -> list[Level]:
    """For each step the level to leap to, which is noisy; where there is none so far ahead, the next one."""
    ends = [*grid.levels[leap:], *[grid.process.clean] * leap]
    return [s if end.is_clean else end for (_, s), end in zip(grid.steps, ends, strict=False)]


@sampler(
    "dpmpp_dual_sde_momentumized",
    title="DPM++ Dual SDE momentumized",
    family="momentum",
    order=1,
    calls_per_step=2,
    stochastic=True,
    paper=COLLECTION,
    aliases=("dpmpp_dualsde_momentumized", "sample_dpmpp_dualsde_momentumized"),
    mistake="the step is of second order by itself, so the multistep correction on top counts the change of the "
    "estimate twice, and the order is 1 instead of 2; the second step overwrites the option r",
    corrected_order=2,
)
def dpmpp_dual_sde_momentumized(
    tape: Tape,
    grid: Grid,
    eta: AncestralEta = 1.0,
    s_noise: NoiseFactor = 1.0,
    r: Stage = 0.5,
    momentum: MomentumShare = 0.0,
    corrected: Annotated[
        bool, Option("DPM++ SDE: no correction on top, r as given, one path of noise")
    ] = False,
) -> Vector:
    """DPM++ SDE with the multistep correction of `clyb_4m_sde_momentumized` on top, and momentum on all three parts.

    As published the stages of the third and later steps lie at the ratio of the first two steps' lengths, and share no
    noise with the step. With eta = 1, where the estimate changes by chance alone, the correction makes up for that, and
    the order is 2 on smooth grids; it is 1 with any other eta, or where the lengths of steps change abruptly.
    """
    declare_noise_factor(tape, eta, s_noise)
    on_stage, on_step, on_change = (_Momentum(tape, grid, momentum) for _ in range(3))
    x, outputs = tape.start, []
    for t, s in grid.steps:
        denoised = tape.denoise(x, t)
        if not is_open(t, s):
            x = _ancestral(x, denoised, t, s, eta, s_noise * tape.noise(t, s))
            continue
        nothing = 0.0 * denoised
        m = level_between(grid.process, t, s, r) if r != 1 else s
        early, fresh = s_noise * tape.noise(t, s, lap=BEHIND), None
        if corrected:
            early, fresh = brownian_pair(tape, t, m, s, s_noise)
        target = denoised
        if not m.is_clean:
            kept = _ancestral(x, nothing, t, m, eta, early)
            stage = on_stage(_ancestral(x, denoised, t, m, eta, early), kept, t, m)
            target = denoised + (tape.denoise(stage, m) - denoised) / (2 * r)
        outputs = [Output(t, tape.settle(target)), *outputs][:4]
        fresh = fresh or s_noise * tape.noise(t, s)
        kept = _ancestral(x, nothing, t, s, eta, fresh)
        x = on_step(_ancestral(x, target, t, s, eta, fresh), kept, t, s)
        if len(outputs) > 1 and not corrected:
            x = x + on_change(_change(outputs, s, eta), nothing, t, s)
        if len(outputs) == 2 and not corrected:
            r = log_snr_step(outputs[1].level, t) / log_snr_step(t, s)
    return x


def _ancestral(x: Vector, target: Vector, t: Level, s: Level, eta: float, fresh: Vector) -> Vector:
    """An Euler step to the kept part of s's noise for an estimate of x_0, then the fresh part."""
    return renoised(target, noise_estimate(x, target, t), fresh, ancestral_split(t, s, eta), s)


@sampler(
    "clyb_4m_sde_momentumized",
    title="CLyB 4M SDE momentumized",
    family="momentum",
    order=1,
    stochastic=True,
    paper=COLLECTION,
    aliases=("sample_clyb_4m_sde_momentumized",),
    mistake="with three earlier estimates the differences are divided by inverted ratios of step lengths and weighed "
    "as in the third-order method, so that with eta = 0 the order is at most 2 instead of 4, and it is 1 where the "
    "lengths of steps change abruptly",
    corrected_order=2,
)
def clyb_4m_sde_momentumized(
    tape: Tape,
    grid: Grid,
    eta: SdeEta = 1.0,
    s_noise: NoiseFactor = 1.0,
    momentum: MomentumShare = 0.0,
    corrected: Corrected = False,
) -> Vector:
    """DPM++ 3M SDE with a third earlier estimate, and momentum on the step and on the correction.

    As published the order is 2 on smooth grids alone; corrected it is 4 with eta = 0.
    """
    declare_noise_factor(tape, eta, s_noise)
    on_step, on_change = _Momentum(tape, grid, momentum), _Momentum(tape, grid, momentum)
    x, outputs = tape.start, []
    for t, s in grid.steps:
        denoised = tape.denoise(x, t)
        if not is_open(t, s):
            x = sde_rule(tape, x, [Output(t, denoised)], s, eta=eta, s_noise=s_noise)
            continue
        outputs = [Output(t, denoised), *outputs][:4]
        nothing = 0.0 * denoised
        kept = exponential_step(x, nothing, t, s, eta)
        x = on_step(exponential_step(x, denoised, t, s, eta), kept, t, s)
        if len(outputs) > 1:
            x = x + on_change(_change(outputs, s, eta, corrected), nothing, t, s)
        x = freshened(tape, x, t, s, s_noise * fresh_std(t, s, eta))
    return x


def _change(
    outputs: list[Output[Vector]], s: Level, eta: float, corrected: bool = False
) -> Vector:
    """What earlier estimates add to a first-order step, newest first; of three, as published, with a wrong formula.

    Up to two of them: DPM++ 3M SDE. Corrected: exact for estimates that are polynomial in log_snr.
    """
    now, *past = outputs
    length = (1 + eta) * log_snr_step(now.level, s)
    if len(past) == 3 and not corrected:
        return s.alpha * _published_change([o.value for o in outputs], _steps(outputs, s), length)
    nothing = 0.0 * now.value
    moments = dpm_moments(length, len(past), "heun", corrected)
    whole = exponential_rule(nothing, outputs, s, eta=eta, moments=moments)
    return whole - exponential_step(nothing, now.value, now.level, s, eta)


def _steps(outputs: list[Output[Vector]], s: Level) -> list[float]:
    """Lengths in log_snr of the step to s and of those between the outputs, newest first."""
    levels = [s, *(output.level for output in outputs)]
    return [log_snr_step(t, s) for s, t in zip(levels, levels[1:], strict=False)]


def _published_change(values: list[Vector], steps: list[float], length: float) -> Vector:
    """The fourth-order correction as published: `I_1 (e_0 + r_2 a + r_2 b) + (I_2 / 2) (a + b)`."""
    h, h1, h2, h3 = steps
    r0, r1, r2 = h3 / h2, h2 / h, h / h1
    d0, d1, d2, d3 = values
    e0, e1, e2 = (d0 - d1) / r2, (d1 - d2) / r1, (d2 - d3) / r0
    a = (e0 - e1) / (r1 + r2)
    b = (r2 * a - r1 / (r0 + r1) * (e1 - e2)) / ((r1 + r2) * (r0 + r1))
    _, i1, i2 = exponential_moments(length, 3)
    return i1 * (e0 + r2 * (a + b)) + i2 / 2 * (a + b)


@sampler(
    "res_momentumized",
    title="RES momentumized",
    family="momentum",
    order=0,
    calls_per_step=2,
    stochastic=True,
    paper="Zhang, Chen 2023, arXiv:2308.02157; " + COLLECTION,
    aliases=("sample_res_momentumized", "res_solver"),
)
def res_momentumized(
    tape: Tape,
    grid: Grid,
    ita: Annotated[
        float, Option("share by which noise raises sigma/alpha before each step", 0, 10)
    ] = 0.25,
    c2: Stage = 0.5,
    momentum: MomentumShare = 0.0,
) -> Vector:
    """The refined exponential solver: a two-stage exponential Runge-Kutta method, after noise at each step.

    Of second order with `ita = 0`. With more, the noise that a step adds and removes does not shrink with the step, so
    that many steps converge to nothing. The original makes its last call, to clean data, at the level before the
    current one and with more noise; here it is at the current level, as the method means it.
    """
    on_stage, on_step = _Momentum(tape, grid, momentum), _Momentum(tape, grid, momentum)
    x = tape.start
    for t, s in grid.steps:
        if not is_open(t, s):
            x = exponential_step(x, tape.denoise(x, t), t, s)
            continue
        high = grid.process.levels_at([(1 + ita) * t.ratio])[0] if ita else t
        x = raised(x, t, high, tape.noise(t, s, lap=BEHIND)) if ita else x
        first = Output(high, tape.denoise(x, high))
        nothing = 0.0 * first.value
        m = level_between(grid.process, high, s, c2) if c2 < 1 else s
        kept = exponential_step(x, nothing, high, m)
        stage = on_stage(exponential_step(x, first.value, high, m), kept, t, m)
        second = Output(m, tape.denoise(stage, m))
        kept = exponential_step(x, nothing, high, s)
        x = on_step(exponential_rule(x, [first, second], s), kept, t, s)
    return x
