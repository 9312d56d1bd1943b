"""One-step solvers of the probability-flow ODE, with noise added on the way if asked: Euler, Heun, DPM2, Restart.

With `x^ = x / alpha` and `r = sigma / alpha` the ODE is `dx^ / dr = noise`; with `y = x / (alpha + sigma)` and the flow
time `u = sigma / (alpha + sigma)` it is `dy / du = velocity`. An Euler step is the same in both, others are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated

from fewstep.plan import Tape, Vector
from fewstep.process import Level, Process
from fewstep.registry import Option
from fewstep.samplers.options import (
    AncestralEta,
    Churn,
    ChurnFrom,
    ChurnTo,
    NoiseFactor,
    Variable,
)
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import (
    Form,
    declare_noise_factor,
    exponential_step,
    flow_level,
    flow_time,
    kept_level,
    level_between,
    noise_estimate,
    noise_step,
    raised,
    renewed,
    velocity_estimate,
    velocity_step,
    weighted,
)
from fewstep.schedulers import Grid
from fewstep.schedulers.ratios import karras_curve

FORMS = {
    "ratio": (noise_estimate, noise_step),
    "flow_time": (velocity_estimate, velocity_step),
}
"""The slope in each variable, and the step with a given slope."""


def churning(
    tape: Tape, grid: Grid, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> Callable[[Vector, Level, Level], tuple[Vector, Level]]:
    """Algorithm 2 of EDM: what each step from t to s begins with, `x, t = churn(x, t, s)`.

    Where `s_tmin <= r_t <= s_tmax`, fresh noise raises the point from t to the ratio `(1 + gamma) r_t` with
    `gamma = min(s_churn / steps, sqrt(2) - 1)`. From pure noise nothing can be raised.

    Args:
        tape: The tape.
        grid: The grid.
        s_churn: Noise that is added over all steps together, >= 0; 0 adds none.
        s_tmin: Smallest ratio that is raised.
        s_tmax: Largest ratio that is raised.
        s_noise: Factor on the fresh noise.

    Source: Karras et al. 2022, arXiv 2206.00364.
    """
    gamma = min(s_churn / len(grid.steps), math.sqrt(2) - 1)
    declare_noise_factor(tape, gamma, s_noise)

    def churn(x: Vector, t: Level, s: Level) -> tuple[Vector, Level]:
        if gamma == 0 or t.is_pure_noise or not s_tmin <= t.ratio <= s_tmax:
            return x, t
        higher = grid.process.levels_at([(1 + gamma) * t.ratio])[0]
        # What lies above t belongs to the steps before too, so each step has a path of its own.
        fresh = tape.noise(t, s, lap=1 + grid.levels.index(t))
        return raised(x, t, higher, s_noise * fresh), higher

    return churn


def _is_euler(t: Level, s: Level, variable: Form) -> bool:
    """Whether there is no second slope: at clean data, or in sigma/alpha at pure noise."""
    return s.is_clean or (t.is_pure_noise and variable == "ratio")


def heun_step(tape: Tape, x: Vector, t: Level, s: Level, variable: Form = "ratio") -> Vector:
    """A step with the mean of the slope at t and of that where an Euler step arrives."""
    denoised = tape.denoise(x, t)
    predicted = exponential_step(x, denoised, t, s)
    if _is_euler(t, s, variable):
        return predicted
    slope, step = FORMS[variable]
    there = slope(predicted, tape.denoise(predicted, s), s)
    return step(x, (slope(x, denoised, t) + there) / 2, t, s)


def midpoint_step(
    tape: Tape, process: Process, x: Vector, t: Level, s: Level, variable: Form = "ratio"
) -> Vector:
    """A step with the slope at the geometric mean of the two levels, to which an Euler step leads."""
    denoised = tape.denoise(x, t)
    if _is_euler(t, s, variable):
        return exponential_step(x, denoised, t, s)
    if variable == "ratio":
        middle = level_between(process, t, s, 0.5)
    else:
        middle = flow_level(process, math.sqrt(flow_time(t) * flow_time(s)))
    point = exponential_step(x, denoised, t, middle)
    slope, step = FORMS[variable]
    return step(x, slope(point, tape.denoise(point, middle), middle), t, s)


@sampler(
    "euler",
    title="Euler",
    paper="Karras et al. 2022, arXiv:2206.00364",
    aliases=(
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "EDMEulerScheduler",
        "sample_euler",
        "flow_euler",
    ),
)
def euler(
    tape: Tape,
    grid: Grid,
    s_churn: Churn = 0.0,
    s_tmin: ChurnFrom = 0.0,
    s_tmax: ChurnTo = 1e9,
    s_noise: NoiseFactor = 1.0,
) -> Vector:
    """Euler's method in sigma/alpha; on flow models the same as Euler's method in t."""
    churn = churning(tape, grid, s_churn, s_tmin, s_tmax, s_noise)
    x = tape.start
    for t, s in grid.steps:
        x, top = churn(x, t, s)
        x = exponential_step(x, tape.denoise(x, top), top, s)
    return x


@sampler(
    "heun",
    title="Heun",
    order=2,
    calls_per_step=2,
    paper="Karras et al. 2022, arXiv:2206.00364",
    aliases=("HeunDiscreteScheduler", "sample_heun", "edm_heun"),
    presets={
        "edm_stochastic_heun": {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
        "flow_heun": {"variable": "flow_time"},
        "FlowMatchHeunDiscreteScheduler": {"variable": "flow_time"},
    },
)
def heun(
    tape: Tape,
    grid: Grid,
    s_churn: Churn = 0.0,
    s_tmin: ChurnFrom = 0.0,
    s_tmax: ChurnTo = 1e9,
    s_noise: NoiseFactor = 1.0,
    variable: Variable = "ratio",
) -> Vector:
    """Heun's method in sigma/alpha: an Euler step, corrected by half the change of slope.

    A step to clean data is an Euler step, and so is one from pure noise unless the variable is the flow time, in which
    diffusers and ComfyUI solve flow models. `edm_stochastic_heun` churns as EDM does for images.
    """
    churn = churning(tape, grid, s_churn, s_tmin, s_tmax, s_noise)
    x = tape.start
    for t, s in grid.steps:
        x, top = churn(x, t, s)
        x = heun_step(tape, x, top, s, variable)
    return x


@sampler(
    "heunpp2",
    title="Heun++ 2",
    order=1,
    calls_per_step=3,
    paper="Carzit 2023, sd-webui-samplers-scheduler; ComfyUI",
    aliases=("sample_heunpp2",),
)
def heunpp2(
    tape: Tape,
    grid: Grid,
    s_churn: Churn = 0.0,
    s_tmin: ChurnFrom = 0.0,
    s_tmax: ChurnTo = 1e9,
    s_noise: NoiseFactor = 1.0,
) -> Vector:
    """Euler steps with a slope that is averaged over the next two levels, the more the noisier they are.

    The slopes at the levels ahead weigh `r / (m r_0)`, m the number of slopes and r_0 the noisiest finite ratio; the
    last step looks at none, the one before it at one. These weights meet no condition for second order, so the method
    is of first order at three times the calls of Euler's.
    """
    churn = churning(tape, grid, s_churn, s_tmin, s_tmax, s_noise)
    noisiest = next(level.ratio for level in grid.levels if not level.is_pure_noise)
    x = tape.start
    for i, (t, s) in enumerate(grid.steps):
        x, top = churn(x, t, s)
        denoised = tape.denoise(x, top)
        ahead = [] if t.is_pure_noise else grid.levels[i + 1 : -1][:2]
        if not ahead:
            x = exponential_step(x, denoised, top, s)
            continue
        noises = [noise_estimate(x, denoised, top)]
        point = x
        for a, b in pairwise((top, *ahead)):
            point = noise_step(point, noises[-1], a, b)
            noises.append(noise_estimate(point, tape.denoise(point, b), b))
        weights = [level.ratio / (len(noises) * noisiest) for level in ahead]
        x = noise_step(x, weighted([1 - sum(weights), *weights], noises), top, s)
    return x


@sampler(
    "dpm_2",
    title="DPM2",
    order=2,
    calls_per_step=2,
    paper="Karras et al. 2022, arXiv:2206.00364; Lu et al. 2022, arXiv:2206.00927; k-diffusion",
    aliases=("KDPM2DiscreteScheduler", "sample_dpm_2"),
    presets={
        "dpm_2_ancestral": {"eta": 1.0},
        "DPM2 a": {"eta": 1.0},
        "KDPM2AncestralDiscreteScheduler": {"eta": 1.0},
        "sample_dpm_2_ancestral": {"eta": 1.0},
        "flow_dpm_2": {"variable": "flow_time"},
        "flow_dpm_2_ancestral": {"eta": 1.0, "variable": "flow_time"},
        "sample_dpm_2_ancestral_RF": {"eta": 1.0, "variable": "flow_time"},
    },
)
def dpm_2(
    tape: Tape,
    grid: Grid,
    eta: AncestralEta = 0.0,
    s_churn: Churn = 0.0,
    s_tmin: ChurnFrom = 0.0,
    s_tmax: ChurnTo = 1e9,
    s_noise: NoiseFactor = 1.0,
    variable: Variable = "ratio",
) -> Vector:
    """The midpoint rule in sigma/alpha with the geometric mean for a midpoint: DPM-Solver-2 in EDM's variables.

    With eta > 0 it is ancestral: each step solves down to the kept part of the noise, then adds the fresh part. Only
    the last step, to clean data, is an Euler step, and one from pure noise unless the variable is the flow time.
    ComfyUI solves flow models in flow time, where eta counts too. It also drops the last but one of the levels.
    """
    declare_noise_factor(tape, eta, s_noise)
    churn = churning(tape, grid, s_churn, s_tmin, s_tmax, s_noise)
    x = tape.start
    for t, s in grid.steps:
        x, top = churn(x, t, s)
        kept = kept_level(grid.process, top, s, eta, variable)
        x = midpoint_step(tape, grid.process, x, top, kept, variable)
        x = renewed(tape, x, kept, t, s, s_noise)
    return x


@sampler(
    "flow_euler_ancestral",
    title="Flow Euler a",
    family="SDE",
    stochastic=True,
    paper="ComfyUI; HaCohen et al. 2024, arXiv:2501.00103",
    aliases=("LTXEulerAncestralRFScheduler", "sample_euler_ancestral_RF"),
)
def flow_euler_ancestral(
    tape: Tape, grid: Grid, eta: AncestralEta = 1.0, s_noise: NoiseFactor = 1.0
) -> Vector:
    """Euler ancestral with eta counted in flow time: an Euler step to less than u_s, then fresh noise.

    The step goes to `u_s (1 - eta (1 - u_s / u_t))`. This is what ComfyUI runs on flow models under the name
    `euler_ancestral`. With the same eta it adds less fresh noise than our `euler_ancestral`, which is the posterior of
    the forward process on flow models too; both keep the noise of the levels.
    """
    declare_noise_factor(tape, eta, s_noise)
    x = tape.start
    for t, s in grid.steps:
        kept = kept_level(grid.process, t, s, eta, "flow_time")
        x = exponential_step(x, tape.denoise(x, t), t, kept)
        x = renewed(tape, x, kept, t, s, s_noise)
    return x


@sampler(
    "restart",
    title="Restart",
    family="SDE",
    order=2,
    calls_per_step=2,
    stochastic=True,
    paper="Xu et al. 2023, arXiv:2306.14878",
    aliases=("restart_sampler",),
)
def restart(
    tape: Tape,
    grid: Grid,
    restarts: Annotated[
        int, Option("how many; 0 chooses the number and their steps as A1111 does", 0, 100)
    ] = 0,
    share: Annotated[
        float, Option("of the grid's steps, what each restart takes if restarts is not 0", 0, 1)
    ] = 0.25,
    restart_from: Annotated[float, Option("sigma/alpha after which it restarts", 0, 1e9)] = 0.1,
    restart_to: Annotated[float, Option("sigma/alpha up to which it restarts", 0, 1e9)] = 2.0,
    s_noise: NoiseFactor = 1.0,
) -> Vector:
    """Heun's method that goes back up from low noise to middle noise with fresh noise, and solves down again.

    Restarts lie between the two levels that are nearest to `restart_from` and `restart_to`. They take their steps from
    those of the grid; the levels of the rest and of each restart are spaced as Karras et al. do, whatever the
    scheduler. A1111 restarts once for 9 steps from 20 steps on, twice for a quarter of them from 36 steps on; below
    20 steps it is Heun's method.
    """
    x, levels = tape.start, grid.levels
    if levels[0].is_pure_noise:
        x, levels = heun_step(tape, x, levels[0], levels[1]), levels[1:]
    noisy = [level for level in levels if not level.is_clean]
    steps, laps = _restart_plan(len(levels) - 1, restarts, share)
    steps = min(steps, (len(noisy) - 2) // max(laps, 1))
    if steps < 1:
        return _heun_path(tape, x, levels)
    path = _spaced(grid.process, noisy[0], noisy[-1], len(noisy) - 1 - steps * laps)
    low, high = (
        min(path, key=lambda level, r=r: abs(level.ratio - r)) for r in (restart_from, restart_to)
    )
    if not low.ratio < high.ratio:
        return _heun_path(tape, x, levels)
    declare_noise_factor(tape, laps, s_noise)
    turn = path.index(low)
    x = _heun_path(tape, x, path[: turn + 1])
    again = _spaced(grid.process, high, low, steps)
    for lap in range(1, laps + 1):
        x = raised(x, low, high, s_noise * tape.noise(high, low, lap=lap))
        x = _heun_path(tape, x, again)
    return _heun_path(tape, x, [*path[turn:], *levels[len(noisy) :]])


def _restart_plan(steps: int, restarts: int, share: float) -> tuple[int, int]:
    """Steps of each restart and their number, for as many steps in all; with 0 restarts those of A1111."""
    if restarts:
        return round(share * steps), restarts
    if steps < 20:
        return 0, 0
    return (9, 1) if steps < 36 else (steps // 4, 2)


def _spaced(process: Process, t: Level, s: Level, steps: int) -> list[Level]:
    """The levels of so many steps from t to s, spaced as Karras et al. do."""
    inner = karras_curve(t.ratio, s.ratio, steps + 1)[1:-1].tolist()
    return [t, *process.levels_at(inner), s]


def _heun_path(tape: Tape, x: Vector, levels: Sequence[Level]) -> Vector:
    for t, s in pairwise(levels):
        x = heun_step(tape, x, t, s)
    return x
