"""Multistep solvers of `dx^ / dr = noise`, `x^ = x / alpha`, `r = sigma / alpha`: LMS, PNDM, DEIS and relatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch

from fewstep.plan import Tape, Vector
from fewstep.process import Level, Process
from fewstep.registry import Option
from fewstep.samplers.multistep import multistep
from fewstep.samplers.options import Corrected, LowerOrderFinal, NewestWeight
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import (
    Output,
    adams_rule,
    adams_weights,
    exponential_rule,
    exponential_step,
    integral,
    is_open,
    level_between,
    noise_estimate,
    noise_step,
    quadrature_weights,
    weighted,
)
from fewstep.schedulers import Grid

Order = Annotated[
    int, Option("of the multistep method: how many estimates of the noise it uses", 1, 4)
]


def _average_step(
    x: Vector, noises: Sequence[Output[Vector]], weights: Sequence[float], s: Level
) -> Vector:
    """Step to s along a weighted mean of the newest noise and earlier ones."""
    return noise_step(x, weighted(weights, [n.value for n in noises]), noises[0].level, s)


def _equal_steps_rule(x: Vector, noises: Sequence[Output[Vector]], s: Level) -> Vector:
    """The Adams-Bashforth weights of equal steps in r, whatever the steps are."""
    return _average_step(x, noises, adams_weights([-j for j in range(len(noises))]), s)


@sampler(
    "lms",
    title="LMS",
    order=4,
    paper="Hairer, Norsett, Wanner 1993, Solving Ordinary Differential Equations I; k-diffusion",
    aliases=("LMSDiscreteScheduler", "sample_lms", "linear_multistep"),
)
def lms(
    tape: Tape,
    grid: Grid,
    order: Order = 4,
    extrapolate: Annotated[
        bool,
        Option("take the step to clean data by extrapolation, as k-diffusion and diffusers do"),
    ] = False,
) -> Vector:
    """Adams-Bashforth in sigma/alpha for steps of any size; the first steps are of lower order."""
    return multistep(tape, grid, order, adams_rule, noise_form=True, to_clean=extrapolate)


@sampler(
    "ipndm",
    title="iPNDM",
    order=1,
    paper="Liu et al. 2022, arXiv:2202.09778; Zhang, Chen 2022, arXiv:2204.13902",
    aliases=("IPNDMScheduler", "sample_ipndm"),
)
def ipndm(tape: Tape, grid: Grid, order: Order = 4) -> Vector:
    """Adams-Bashforth in sigma/alpha with the weights of equal steps, and no warm-up but lower orders.

    Since grids are not of equal steps, it is of second order at best: on grids whose neighbouring steps differ
    little, and of first order on others. `lms` has the weights of the true steps.
    """
    return multistep(tape, grid, order, _equal_steps_rule, noise_form=True)


@sampler(
    "ipndm_v",
    title="iPNDM-v",
    order=0,
    corrected_order=4,
    mistake="its weights of order 3 have a misplaced bracket, and those of order 4 also a wrong sign and a wrong last "
    "ratio: they do not add up to 1 unless all steps are equal",
    paper="Zhang, Chen 2022, arXiv:2204.13902; Zhou et al. 2023, arXiv:2312.00094",
    aliases=("sample_ipndm_v",),
)
def ipndm_v(tape: Tape, grid: Grid, order: Order = 4, corrected: Corrected = False) -> Vector:
    """The iPNDM method with weights for steps of any size, as they are published; corrected it is `lms`.

    On grids whose neighbouring steps differ little the published weights are nearly right and of second order; on
    others, where those of order 4 do not add up to 1, they do not converge. Orders 1 and 2 are right.
    """
    if order == 4 and not corrected:
        tape.declare_inexact("noise")
    return multistep(
        tape, grid, order, adams_rule if corrected else _published_rule, noise_form=True
    )


def _published_rule(x: Vector, noises: Sequence[Output[Vector]], s: Level) -> Vector:
    """The weights of diff-sampler and ComfyUI: Newton's form of Adams-Bashforth, the last two terms mistaken.

    With `a, b, c, d` the steps in r, the newest first, the right weight of the second difference is
    `(1 - a / (3 (a + b))) / 2` times `a (a + b) / (b (b + c))`. The published third difference adds what should be
    taken off, and ends with `far b / c` where `far c / d` belongs.
    """
    ratios = [s.ratio, *(n.level.ratio for n in noises)]
    a, b, c, d = [*np.diff(ratios), *[math.inf] * 3][:4]
    weights = np.array([1.0, 0.0, 0.0, 0.0])
    if len(noises) > 1:
        weights += a / (2 * b) * np.array([1, -1, 0, 0])
    if len(noises) > 2:
        second = (1 - a**2 / (3 * b * (b + c))) / 2
        weights += second * np.array([1, -1 - b / c, b / c, 0])
    if len(noises) > 3:
        third = (1 - a / (3 * (a + b))) / 2 + (1 - a / (2 * (a + b))) * a / (6 * (a + b + c))
        third *= a * (a + b) * (a + b + c) / (b * (b + c) * (b + c + d))
        far = b * (b + c) / (c * (c + d))
        weights += third * np.array([1, -1 - b / c - far, b / c + far * (1 + c / d), -far * b / c])
    return _average_step(x, noises, weights[: len(noises)].tolist(), s)


@sampler(
    "gradient_estimation",
    title="Gradient estimation",
    paper="Permenter, Yuan 2023, arXiv:2306.04848",
    aliases=("ge", "sample_gradient_estimation"),
)
def gradient_estimation(
    tape: Tape,
    grid: Grid,
    gamma: NewestWeight = 2.0,
) -> Vector:
    """Euler along `gamma noise + (1 - gamma) earlier noise`: it over-corrects on purpose, so it is of first order."""

    def rule(x: Vector, noises: Sequence[Output[Vector]], s: Level) -> Vector:
        return _average_step(x, noises, [1.0] if len(noises) == 1 else [gamma, 1 - gamma], s)

    return multistep(tape, grid, 2, rule, noise_form=True)


@sampler(
    "pndm",
    title="PNDM",
    order=1,
    paper="Liu et al. 2022, arXiv:2202.09778",
    aliases=("PNDMScheduler",),
    presets={"plms": {"warm_up": "plms"}},
)
def pndm(
    tape: Tape,
    grid: Grid,
    warm_up: Annotated[
        Literal["runge_kutta", "plms"],
        Option("the first steps: three of Runge-Kutta, four calls each; or Heun, two calls"),
    ] = "runge_kutta",
    middle: Annotated[
        Literal["log_snr", "time"],
        Option("what Runge-Kutta's middle stage halves: log_snr, or time as in diffusers"),
    ] = "log_snr",
) -> Vector:
    """Pseudo numerical methods: fourth-order Adams-Bashforth with the weights of equal steps, after a warm-up."""
    x, noises = tape.start, []
    for t, s in grid.steps:
        denoised = tape.denoise(x, t)
        if not is_open(t, s):
            x = exponential_step(x, denoised, t, s)
            continue
        noise = noise_estimate(x, denoised, t)
        noises = [Output(t, noise), *noises][:4]
        if warm_up == "runge_kutta" and len(noises) < 4:
            m = _middle(grid.process, t, s, middle)
            x = noise_step(x, _runge_kutta(tape, x, noise, t, m, s), t, s)
        elif len(noises) == 1:
            there = _noise_at(tape, x, noise, t, s)
            x = noise_step(x, (noise + there) / 2, t, s)
        else:
            x = _equal_steps_rule(x, noises, s)
    return x


def _middle(process: Process, t: Level, s: Level, of: str) -> Level:
    return process.level((t.t + s.t) / 2) if of == "time" else level_between(process, t, s, 0.5)


def _noise_at(tape: Tape, x: Vector, slope: Vector, t: Level, s: Level) -> Vector:
    """The noise at the end of a step from t to s along a slope: one network call."""
    point = noise_step(x, slope, t, s)
    return noise_estimate(point, tape.denoise(point, s), s)


def _runge_kutta(tape: Tape, x: Vector, noise: Vector, t: Level, m: Level, s: Level) -> Vector:
    """The mean noise of the classical Runge-Kutta method from t over m to s."""
    second = _noise_at(tape, x, noise, t, m)
    third = _noise_at(tape, x, second, t, m)
    fourth = _noise_at(tape, x, third, t, s)
    return (noise + 2 * second + 2 * third + fourth) / 6


@sampler(
    "deis",
    title="DEIS",
    order=2,
    paper="Zhang, Chen 2022, arXiv:2204.13902",
    aliases=("DEISMultistepScheduler", "sample_deis"),
)
def deis(
    tape: Tape,
    grid: Grid,
    order: Order = 2,
    variable: Annotated[
        Literal["log_rho", "rho", "t"],
        Option(
            "what the noise is a polynomial of; log of sigma/alpha, sigma/alpha, or the process's time"
        ),
    ] = "log_rho",
    lower_order_final: LowerOrderFinal = True,
) -> Vector:
    """Exponential integrator for noise that is polynomial in a variable of choice; in sigma/alpha it is `lms`.

    In the time of the process the integrals are done by quadrature, and the result depends on the process and not
    only on the levels. Where these lie outside its trained times, the order is lowered.
    """

    def rule(x: Vector, noises: list[Output[Vector]], s: Level) -> Vector:
        if variable == "log_rho":
            return exponential_rule(x, noises, s, noise_form=True)
        if variable == "rho":
            return adams_rule(x, noises, s)
        return _time_rule(grid.process, x, noises, s)

    return multistep(tape, grid, order, rule, noise_form=True, lower_order_final=lower_order_final)


def _time_rule(process: Process, x: Vector, noises: Sequence[Output[Vector]], s: Level) -> Vector:
    """`x^ + (r_s - r_t) sum_j c_j noise_j`, exact for noise that is polynomial in the time of the process.

    `sum_j c_j theta_j^k` is the mean of `theta^k` over the step in r, `theta` being 0 at the time of t and 1 at s.
    """
    t, span = noises[0].level, s.t - noises[0].level.t
    noises = noises[: len({n.level.t for n in noises}) if span else 1]

    def theta(log_snr: np.ndarray) -> np.ndarray:
        return (process.time(log_snr=torch.from_numpy(log_snr)).numpy() - t.t) / span

    def mean(k: int) -> float:
        whole = integral(lambda u: theta(u) ** k * np.exp(-u), t.log_snr, s.log_snr)
        return whole / (t.ratio - s.ratio)

    nodes = [0.0, *((n.level.t - t.t) / span for n in noises[1:])]
    moments = [1.0, *(mean(k) for k in range(1, len(noises)))]
    return _average_step(x, noises, quadrature_weights(nodes, moments), s)
