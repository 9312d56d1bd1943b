"""Solvers of the reverse SDE: exponential integrators in log_snr with noise, DPM-Solver++ SDE, SEEDS and ER-SDE."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Literal

import numpy as np

from fewstep.plan import Tape, Vector
from fewstep.process import Level, log_snr_step
from fewstep.registry import Option
from fewstep.samplers.options import (
    AncestralEta,
    Corrected,
    NoiseFactor,
    SdeEta,
    SolverType,
    Stage,
)
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import (
    Output,
    ancestral_split,
    brownian_pair,
    declare_noise_factor,
    dpm_moments,
    exponential_rule,
    exponential_step,
    freshened,
    integral,
    is_open,
    level_between,
    look_back,
    noise_estimate,
    quadrature_weights,
    renoised,
    sde_rule,
    stage_noises,
    weighted,
)
from fewstep.schedulers import Grid

# ---- multistep -------------------------------------------------------------------------------


@sampler(
    "dpmpp_2m_sde",
    title="DPM++ 2M SDE",
    family="SDE",
    order=2,
    stochastic=True,
    paper="Lu et al. 2022, arXiv:2211.01095; k-diffusion",
    aliases=(
        "dpmpp_2m_sde_gpu",
        "sample_dpmpp_2m_sde",
        "SDE-DPM-Solver++(2M)",
        "CosineDPMSolverMultistepScheduler",
    ),
    presets={
        "dpmpp_2m_sde_heun": {"solver_type": "heun"},
        "dpmpp_2m_sde_heun_gpu": {"solver_type": "heun"},
        "sample_dpmpp_2m_sde_heun": {"solver_type": "heun"},
    },
)
def dpmpp_2m_sde(
    tape: Tape,
    grid: Grid,
    eta: SdeEta = 1.0,
    s_noise: NoiseFactor = 1.0,
    solver_type: SolverType = "midpoint",
) -> Vector:
    """Second-order multistep on the reverse SDE; DPM++ 2M for eta = 0.

    The first step, and a step to clean data, is of first order.
    """
    declare_noise_factor(tape, eta, s_noise)
    x, outputs = tape.start, []
    for t, s in grid.steps:
        outputs.append(Output(t, tape.denoise(x, t)))
        used = look_back(outputs, s, 2)
        length = (1 + eta) * log_snr_step(t, s)
        moments = dpm_moments(length, len(used) - 1, solver_type, corrected=False)
        x = sde_rule(tape, x, used, s, eta=eta, s_noise=s_noise, moments=moments)
    return x


@sampler(
    "dpmpp_3m_sde",
    title="DPM++ 3M SDE",
    family="SDE",
    order=2,
    stochastic=True,
    paper="Lu et al. 2022, arXiv:2211.01095; k-diffusion",
    aliases=("dpmpp_3m_sde_gpu", "sample_dpmpp_3m_sde"),
    presets={
        "dpmpp_3m_sde_dynamic_eta": {"eta_fall": 1.0},
        "sample_dpmpp_3m_sde_dynamic_eta": {"eta_fall": 1.0},
    },
    mistake="the weight of the second difference is half of what it should be, so that with eta = 0 the order is 2 "
    "instead of 3",
    corrected_order=2,
)
def dpmpp_3m_sde(
    tape: Tape,
    grid: Grid,
    eta: SdeEta = 1.0,
    s_noise: NoiseFactor = 1.0,
    eta_fall: Annotated[
        float, Option("share of eta that is lost along half a cosine over the run", 0, 1)
    ] = 0.0,
    corrected: Corrected = False,
) -> Vector:
    """Multistep with two earlier estimates on the reverse SDE, of constant or falling strength.

    The second step, and a step to clean data, has one earlier estimate less.
    """
    declare_noise_factor(tape, eta, s_noise)
    x, outputs = tape.start, []
    for i, (t, s) in enumerate(grid.steps):
        outputs.append(Output(t, tape.denoise(x, t)))
        used = look_back(outputs, s, 3)
        fallen = (1 - math.cos(math.pi * i / len(grid.steps))) / 2
        strength = eta * (1 - eta_fall * fallen)
        length = (1 + strength) * log_snr_step(t, s)
        moments = dpm_moments(length, len(used) - 1, "heun", corrected)
        x = sde_rule(tape, x, used, s, eta=strength, s_noise=s_noise, moments=moments)
    return x


@sampler(
    "sde_dpm_solver",
    title="SDE-DPM-Solver",
    family="SDE",
    order=2,
    stochastic=True,
    paper="Lu et al. 2022, arXiv:2211.01095",
    aliases=("sde-dpmsolver", "SDE-DPM-Solver-2M"),
)
def sde_dpm_solver(
    tape: Tape,
    grid: Grid,
    order: Annotated[int, Option("number of noise estimates that a step uses", 1, 2)] = 2,
    eta: SdeEta = 1.0,
    s_noise: NoiseFactor = 1.0,
    solver_type: SolverType = "midpoint",
) -> Vector:
    """Multistep on the noise prediction of the reverse SDE; cannot step to clean data.

    With `e` the estimated noise, `x^_s = x^ - (1 + eta) (r_t - r_s) e + sqrt(eta (r_t^2 - r_s^2)) z` to first order.
    It keeps the noise of the levels only to its order. A step from pure noise or to clean data takes the estimate of
    x_0 instead.
    """
    if eta > 0:
        tape.declare_inexact("noise")
    x, outputs = tape.start, []
    for t, s in grid.steps:
        denoised = tape.denoise(x, t)
        if not is_open(t, s):
            x = sde_rule(tape, x, [Output(t, denoised)], s, eta=eta, s_noise=s_noise)
            continue
        outputs.append(Output(t, noise_estimate(x, denoised, t)))
        used = look_back(outputs, s, order)
        length = -log_snr_step(t, s)
        moments = dpm_moments(length, len(used) - 1, solver_type, corrected=False)
        x = sde_rule(tape, x, used, s, eta=eta, s_noise=s_noise, noise_form=True, moments=moments)
    return x


# ---- singlestep ------------------------------------------------------------------------------


@sampler(
    "dpmpp_sde",
    title="DPM++ SDE",
    family="SDE",
    order=2,
    calls_per_step=2,
    stochastic=True,
    paper="Lu et al. 2022, arXiv:2211.01095; k-diffusion",
    aliases=("dpmpp_sde_gpu", "sample_dpmpp_sde", "DPMSolverSDEScheduler"),
)
def dpmpp_sde(
    tape: Tape,
    grid: Grid,
    eta: AncestralEta = 1.0,
    s_noise: NoiseFactor = 1.0,
    r: Stage = 0.5,
) -> Vector:
    """A stage at a place between, then the step with its estimate, both ancestral and on one path of noise.

    The step's noise is that of the path over the stretch t..m..s, which the stage at m has passed in part. The path
    is Brownian in `sigma / alpha`, as in k-diffusion. A step from pure noise or to clean data has no stage.
    """
    declare_noise_factor(tape, eta, s_noise)
    x = tape.start
    for t, s in grid.steps:
        target = denoised = tape.denoise(x, t)
        noise = noise_estimate(x, denoised, t)
        split = ancestral_split(t, s, eta)
        fresh = None
        if is_open(t, s):
            m = level_between(grid.process, t, s, r) if r < 1 else s
            early, fresh = brownian_pair(tape, t, m, s, s_noise) if eta > 0 else (None, None)
            stage = renoised(denoised, noise, early, ancestral_split(t, m, eta), m)
            target = denoised + (tape.denoise(stage, m) - denoised) / (2 * r)
        elif split.up > 0:
            fresh = s_noise * tape.noise(t, s)
        x = renoised(target, noise_estimate(x, target, t), fresh, split, s)
    return x


@sampler(
    "seeds_2",
    title="SEEDS-2",
    family="SDE",
    order=2,
    calls_per_step=2,
    stochastic=True,
    paper="Gonzalez et al. 2023, arXiv:2305.14267",
    aliases=("sample_seeds_2",),
    presets={
        "exp_heun_2_x0": {"r": 1.0, "solver_type": "phi_2", "eta": 0.0},
        "exp_heun_2_x0_sde": {"r": 1.0, "solver_type": "phi_2"},
        "sample_exp_heun_2_x0": {"r": 1.0, "solver_type": "phi_2", "eta": 0.0},
        "sample_exp_heun_2_x0_sde": {"r": 1.0, "solver_type": "phi_2"},
    },
)
def seeds_2(
    tape: Tape,
    grid: Grid,
    eta: SdeEta = 1.0,
    s_noise: NoiseFactor = 1.0,
    r: Stage = 0.5,
    solver_type: Annotated[
        Literal["phi_1", "phi_2"], Option("how the slope is weighed: by half of I_0, or exactly")
    ] = "phi_1",
) -> Vector:
    """Two-stage exponential Runge-Kutta method on the reverse SDE, both stages on one path of noise.

    A step from pure noise or to clean data is of first order.
    """
    declare_noise_factor(tape, eta, s_noise)
    x = tape.start
    for t, s in grid.steps:
        current = Output(t, tape.denoise(x, t))
        if not is_open(t, s):
            x = sde_rule(tape, x, [current], s, eta=eta, s_noise=s_noise)
            continue
        m = level_between(grid.process, t, s, r) if r < 1 else s
        noises = stage_noises(tape, _apart(t, m, s), eta, s_noise)
        stage = exponential_step(x, current.value, t, m, eta) + noises[0]
        used = [current, Output(m, tape.denoise(stage, m))]
        weighing = "midpoint" if solver_type == "phi_1" else "heun"
        moments = dpm_moments((1 + eta) * log_snr_step(t, s), 1, weighing, corrected=False)
        x = exponential_rule(x, used, s, eta=eta, moments=moments) + noises[-1]
    return x


@sampler(
    "seeds_3",
    title="SEEDS-3",
    family="SDE",
    order=2,
    calls_per_step=3,
    stochastic=True,
    paper="Gonzalez et al. 2023, arXiv:2305.14267",
    aliases=("sample_seeds_3",),
)
def seeds_3(
    tape: Tape,
    grid: Grid,
    eta: SdeEta = 1.0,
    s_noise: NoiseFactor = 1.0,
    r_1: Annotated[float, Option("place of the first stage, in log_snr", 0.1, 0.5)] = 1 / 3,
    r_2: Annotated[float, Option("place of the second stage, in log_snr", 0.51, 1)] = 2 / 3,
) -> Vector:
    """Three-stage exponential Runge-Kutta method on the reverse SDE, all stages on one path of noise.

    For eta = 0 it is the singlestep DPM-Solver++(3S), whose third order needs r_2 = 2/3. A step from pure noise or to
    clean data is of first order.
    """
    declare_noise_factor(tape, eta, s_noise)
    x = tape.start
    for t, s in grid.steps:
        current = Output(t, tape.denoise(x, t))
        if not is_open(t, s):
            x = sde_rule(tape, x, [current], s, eta=eta, s_noise=s_noise)
            continue
        m1 = level_between(grid.process, t, s, r_1)
        m2 = level_between(grid.process, t, s, r_2) if r_2 < 1 else s
        noises = stage_noises(tape, _apart(t, m1, m2, s), eta, s_noise)
        stage = exponential_step(x, current.value, t, m1, eta) + noises[0]
        first = Output(m1, tape.denoise(stage, m1))
        stage = exponential_rule(x, [current, first], m2, eta=eta) + noises[1]
        second = Output(m2, tape.denoise(stage, m2))
        x = exponential_rule(x, [current, second], s, eta=eta) + noises[-1]
    return x


def _apart(*levels: Level) -> list[Level]:
    """The levels without the last one where a stage lies at the end of the step."""
    return list(levels[:-1] if levels[-2] is levels[-1] else levels)


# ---- extended reverse SDE --------------------------------------------------------------------


@sampler(
    "er_sde",
    title="ER-SDE",
    family="SDE",
    order=2,
    stochastic=True,
    paper="Cui et al. 2023, arXiv:2309.06169",
    mistake="the third stage takes the slope between the last two estimates for the slope at the newest, "
    "so that with eta = 0 the order is 2 instead of 3",
    corrected_order=2,
    aliases=("sample_er_sde", "ER-SDE-Solver"),
)
def er_sde(
    tape: Tape,
    grid: Grid,
    max_stage: Annotated[int, Option("number of estimates that a step uses", 1, 3)] = 3,
    noise_scaler: Annotated[
        Literal["er_sde", "reverse_sde"],
        Option("f(r) = r (e^(r^0.3) + 10)^eta, or r^(1 + eta), the usual reverse SDE"),
    ] = "er_sde",
    eta: SdeEta = 1.0,
    s_noise: NoiseFactor = 1.0,
    corrected: Corrected = False,
) -> Vector:
    """Multistep in sigma/alpha on a family of reverse SDEs that differ by how fast they renew the noise.

    With `R = f(r_s) / f(r_t)` the first stage is `x^_s = R x^ + (1 - R) D + sqrt(r_s^2 - R^2 r_t^2) z`; the others
    integrate a polynomial through the last estimates exactly. eta = 0 is the ODE.
    """
    declare_noise_factor(tape, eta, s_noise)
    x, outputs = tape.start, []
    for t, s in grid.steps:
        outputs.append(Output(t, tape.denoise(x, t)))
        used = look_back(outputs, s, max_stage)
        kept = float(_kept_noise(t.ratio, s, noise_scaler, eta))
        weights = _er_weights([output.level for output in used], s, noise_scaler, eta, corrected)
        estimate = weighted(weights, [output.value for output in used])
        x = (kept * s.sigma / t.sigma) * x + s.alpha * estimate
        x = freshened(tape, x, t, s, s_noise * s.sigma * math.sqrt((1 - kept) * (1 + kept)))
    return x


def _kept_noise(
    ratio: float | np.ndarray, s: Level, noise_scaler: str, eta: float
) -> float | np.ndarray:
    """The share of the noise at s that is not fresh after a step from a level: `f(r_s) r / (f(r) r_s)`."""
    if noise_scaler == "reverse_sde":
        return (s.ratio / ratio) ** eta
    growth = np.logaddexp(s.ratio**0.3, math.log(10)) - np.logaddexp(ratio**0.3, math.log(10))
    return np.exp(growth) ** eta


def _er_weights(
    levels: list[Level], s: Level, noise_scaler: str, eta: float, corrected: bool
) -> list[float]:
    """Weights of the estimates made at some levels, the newest first, for the step from there to s.

    With `theta` the place in sigma/alpha, 0 at t and 1 at s, and `w = f(r_s) / f(r)`, they are to integrate
    `int theta^k dw = 1 - k int theta^(k-1) w dtheta` exactly.
    """
    t, h = levels[0], log_snr_step(levels[0], s)
    moments = [1 - math.exp(-h) * float(_kept_noise(t.ratio, s, noise_scaler, eta))]

    def integrand(v: np.ndarray, k: int) -> np.ndarray:
        """`theta^(k-1) w dtheta/dv`, but for a constant, where r = r_t e^-v."""
        theta = np.expm1(-v) / math.expm1(-h)
        return theta ** (k - 1) * _kept_noise(t.ratio * np.exp(-v), s, noise_scaler, eta)

    for k in range(1, len(levels)):
        area = integral(partial(integrand, k=k), 0.0, h) / math.expm1(h)
        moments.append(1 - k * area)
    nodes = [(level.ratio - t.ratio) / (s.ratio - t.ratio) for level in levels]
    if len(levels) == 3 and not corrected:
        # As published: the slope between the last two estimates stands for the slope at the newest.
        moments[2] += nodes[1] * moments[1]
    return quadrature_weights(nodes, moments)
