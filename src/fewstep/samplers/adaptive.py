"""Solvers that choose their steps by the data, so that the error of each stays within a tolerance.

Of the grid only the first level, the last one with noise in it and the end count. A batch shares its steps, so a
picture depends on those beside it; `fewstep.sample` therefore runs one at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from fewstep.plan import EagerTape
from fewstep.process import Level, Process, log_snr_step
from fewstep.registry import Option
from fewstep.samplers.options import AncestralEta, NoiseFactor
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import (
    Output,
    ancestral_split,
    dpm_moments,
    exponential_rule,
    kept_level,
    level_between,
    noise_estimate,
    noise_step,
    raised,
    renoised,
    weighted,
)
from fewstep.schedulers import Grid

REST, SHORTEST = 1e-5, 5e-4
"""In log_snr: a rest of the way that is added to the step before it, and the shortest step that is tried."""

RelativeTolerance = Annotated[
    float, Option("allowed error of a step, relative to the size of x / alpha", 0, 1)
]
AbsoluteTolerance = Annotated[
    float, Option("allowed error of a step, in the unit of the data", 1e-12, 10)
]
FirstStep = Annotated[float, Option("length of the first step, in log_snr", 1e-3, 10)]
MostCalls = Annotated[int, Option("network calls after which it gives up", 1, math.inf)]
LastEstimate = Annotated[
    bool,
    Option(
        "at a clean end, return the last estimate of x_0; if not, x / alpha at the last level with noise"
    ),
]


@sampler(
    "dpm_adaptive",
    title="DPM adaptive",
    family="adaptive",
    order=3,
    calls_per_step=3,
    eager=True,
    paper="Lu et al. 2022, arXiv:2206.00927",
    aliases=("sample_dpm_adaptive",),
    presets={"dpm_solver_12": {"order": 2}, "dpm_solver_23": {"order": 3}},
)
def dpm_adaptive(
    tape: EagerTape,
    grid: Grid,
    order: Annotated[
        Literal[2, 3], Option("of the solution that is kept; the one below it tells the error")
    ] = 3,
    rtol: RelativeTolerance = 0.05,
    atol: AbsoluteTolerance = 0.0078,
    h_init: FirstStep = 0.05,
    pcoeff: Annotated[float, Option("step control: weight of the error's change", 0, 2)] = 0.0,
    icoeff: Annotated[float, Option("step control: weight of the error", 0, 2)] = 1.0,
    dcoeff: Annotated[float, Option("step control: weight of the change's change", 0, 2)] = 0.0,
    accept_safety: Annotated[
        float, Option("a step counts if the next one may be this much of its length", 0, 1)
    ] = 0.81,
    eta: AncestralEta = 0.0,
    s_noise: NoiseFactor = 1.0,
    max_calls: MostCalls = 1000,
    last_estimate: LastEstimate = True,
) -> Tensor:
    """DPM-Solver with two solutions of neighbouring orders, whose difference sets the length of the next step.

    Each try costs as many network calls as the order. Other programs stop at the last level with noise in it and leave
    that noise in the picture; here one more call gives the estimate of x_0, unless `last_estimate` is off. A step from
    pure noise is an ancestral Euler step to the grid's second level.
    """
    tape.limit = max_calls
    x, t, last = _first_open(tape, grid, eta, s_noise)
    control = _StepControl(h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    before = x / t.alpha
    while t is not last:
        s = _step_end(grid.process, t, last, control.h)
        down = kept_level(grid.process, t, s, eta)
        down = down if down.ratio > last.ratio else last
        low, high = _two_solutions(tape, grid.process, x, t, down, order)
        low = low / down.alpha
        allowed = (rtol * torch.maximum(low.abs(), before.abs())).clamp(min=atol)
        if control.accepts(_size((low - high / down.alpha) / allowed)):
            tape.accepted += 1
            x = high if down is s else raised(high, down, s, _fresh(tape, t, s, s_noise))
            t, before = s, low
        else:
            tape.rejected += 1
    if not grid.levels[-1].is_clean:
        return x
    return tape.denoise(x, t) if last_estimate or t.is_pure_noise else x / t.alpha


def _two_solutions(
    tape: EagerTape, process: Process, x: Tensor, t: Level, s: Level, order: int
) -> tuple[Tensor, Tensor]:
    """The step from t to s in the order below and in the order; they share their network calls."""

    def output(point: Tensor, level: Level) -> Output[Tensor]:
        return Output(level, noise_estimate(point, tape.denoise(point, level), level))

    first = output(x, t)
    place = level_between(process, t, s, 1 / order)
    second = output(noise_step(x, first.value, t, place), place)
    moments = dpm_moments(-log_snr_step(t, s), 1, "midpoint", corrected=False)
    midpoint = exponential_rule(x, [first, second], s, noise_form=True, moments=moments)
    if order == 2:
        return noise_step(x, first.value, t, s), midpoint
    place = level_between(process, t, s, 2 / 3)
    third = output(exponential_rule(x, [first, second], place, noise_form=True), place)
    return midpoint, exponential_rule(x, [first, third], s, noise_form=True)


@dataclass
class _StepControl:
    """A PID control of the step length h, in the logarithm of the error.

    `h *= 1 + atan(f - 1)` with `f = e^-(P + I + D) e1^(P + 2 D) e2^-D`, all to the power of 1 / order; e is the error
    in units of the tolerance, e1 and e2 are those of the last two steps that counted.

    Source: Soderlind 2003, ACM Transactions on Mathematical Software 29; limited as in k-diffusion.
    """

    h: float
    pcoeff: float
    icoeff: float
    dcoeff: float
    order: float
    accept_safety: float
    accuracies: tuple[float, float] | None = None

    def accepts(self, error: float) -> bool:
        """Whether the step counts; sets the length of the next one."""
        accuracy = 1 / (error + 1e-8)
        one, two = self.accuracies or (accuracy, accuracy)
        p, i, d = self.pcoeff, self.icoeff, self.dcoeff
        factor = accuracy ** (p + i + d) * one ** -(p + 2 * d) * two**d
        factor = 1 + math.atan(factor ** (1 / self.order) - 1)
        self.h *= factor
        if factor < self.accept_safety:
            return False
        self.accuracies = (accuracy, one)
        return True


@sampler(
    "rk45",
    title="RK45",
    family="adaptive",
    order=5,
    calls_per_step=6,
    eager=True,
    paper="Dormand, Prince 1980, J. Comput. Appl. Math. 6; Song et al. 2021, arXiv:2011.13456",
    aliases=("ode_adaptive", "dopri5", "Dormand-Prince"),
)
def rk45(
    tape: EagerTape,
    grid: Grid,
    rtol: RelativeTolerance = 1e-5,
    atol: AbsoluteTolerance = 1e-5,
    h_init: FirstStep = 0.05,
    max_calls: MostCalls = 1000,
    last_estimate: LastEstimate = True,
) -> Tensor:
    """The Runge-Kutta method of Dormand and Prince for `dx^ / dlog_snr = D - x^`, a ruler for other samplers.

    The difference from a solution of order 4 sets the length of the next step. Each try costs 6 network calls; the
    last one is made at the end of the step, so it serves the next step too, or is the estimate of x_0 at a clean end.
    The steps and their lengths are those of `scipy.integrate.RK45`. A step from pure noise is an Euler step.
    """
    tape.limit = max_calls
    x, t, last = _first_open(tape, grid)
    denoised, h, most = tape.denoise(x, t), h_init, _MOST_GROWTH
    while t is not last:
        s = _step_end(grid.process, t, last, h)
        point, estimate, difference = _dormand_prince(tape, grid.process, x, denoised, t, s)
        allowed = atol + rtol * torch.maximum(x.abs() / t.alpha, point.abs() / s.alpha)
        error = _size(difference / allowed)
        factor = 0.9 * max(error, 1e-10) ** (-1 / 5)
        h = log_snr_step(t, s)
        if error < 1:
            tape.accepted += 1
            x, t, denoised, h, most = point, s, estimate, h * min(factor, most), _MOST_GROWTH
        else:
            tape.rejected += 1
            h, most = h * max(factor, _MOST_SHRINKING), 1.0
    if not grid.levels[-1].is_clean:
        return x
    return denoised if last_estimate or t.is_pure_noise else x / t.alpha


def _dormand_prince(
    tape: EagerTape, process: Process, x: Tensor, denoised: Tensor, t: Level, s: Level
) -> tuple[Tensor, Tensor, Tensor]:
    """The point at s, the estimate there, and the difference of the two solutions in `x / alpha`."""
    h, start = log_snr_step(t, s), x / t.alpha
    point, slopes = start, [denoised - start]
    for node, row in zip(_NODES, _STAGES, strict=True):
        level = level_between(process, t, s, node) if node < 1 else s
        point = start + h * weighted(row, slopes)
        denoised = tape.denoise(level.alpha * point, level)
        slopes.append(denoised - point)
    return s.alpha * point, denoised, h * weighted(_ERROR, slopes)


_MOST_GROWTH, _MOST_SHRINKING = 10.0, 0.2
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # the solution of order 5
)
_ERROR = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
"""The solution of order 4 less that of order 5, over all seven slopes."""


# ---- the way from the first level to the last ------------------------------------------------


def _first_open(
    tape: EagerTape, grid: Grid, eta: float = 0.0, s_noise: float = 1.0
) -> tuple[Tensor, Level, Level]:
    """The point and the level from which log_snr is finite, and the last level with noise in it."""
    x, t = tape.start, grid.levels[0]
    last = grid.levels[-2 if grid.levels[-1].is_clean else -1]
    if t is last or not t.is_pure_noise:
        return x, t, last
    s = grid.levels[1]
    split, denoised = ancestral_split(t, s, eta), tape.denoise(x, t)
    fresh = _fresh(tape, t, s, s_noise) if split.up else None
    return renoised(denoised, noise_estimate(x, denoised, t), fresh, split, s), s, last


def _step_end(process: Process, t: Level, last: Level, h: float) -> Level:
    """The level one step ahead of t; a short rest of the way is part of the last step."""
    rest, h = log_snr_step(t, last), max(h, SHORTEST)
    return last if h > rest - REST else level_between(process, t, last, h / rest)


def _fresh(tape: EagerTape, t: Level, s: Level, s_noise: float) -> Tensor:
    return s_noise * tape.noise(t, s) if s_noise else torch.zeros_like(tape.start)


def _size(error: Tensor) -> float:
    """The root of the mean square over everything."""
    return float(error.square().mean().sqrt())
