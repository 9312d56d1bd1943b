"""Exponential solvers with inner levels: DPM-Solver and DPM-Solver++ singlestep, DPM fast, DPM++ 2S ancestral."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

from fewstep.errors import InvalidInputError
from fewstep.plan import Tape, Vector
from fewstep.process import Level, Process, log_snr_step
from fewstep.registry import Option
from fewstep.samplers.options import AncestralEta, NoiseFactor, SolverType, Variable
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import (
    Output,
    declare_noise_factor,
    dpm_moments,
    exponential_rule,
    exponential_step,
    is_open,
    kept_level,
    level_between,
    noise_estimate,
    renewed,
)
from fewstep.schedulers import Grid

Order = Annotated[int, Option("network calls of a step, and the order of the method", 1, 3)]
FirstNode = Annotated[
    float, Option("where in a step, in log_snr, the first inner level lies", 0.05, 1.0)
]
SecondNode = Annotated[
    float,
    Option("where the second inner level lies; order 3 needs 2/3, others give order 2", 0.05, 1.0),
]
Inner = Annotated[
    Literal["between", "grid"],
    Option("inner levels: new ones in each step, or the grid's own, `order` steps making one"),
]

NODES = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}
"""Where the inner levels lie in a step of each order, unless options say otherwise."""


class Stretch(NamedTuple):
    """One step of a singlestep method, and the levels inside it at which the network is called too."""

    t: Level
    inner: Sequence[Level]
    s: Level


def stretch(process: Process, t: Level, s: Level, nodes: Sequence[float]) -> Stretch:
    """The step from t to s with inner levels at these fractions of it in log_snr; none where it is infinite."""
    inner = [level_between(process, t, s, node) for node in nodes] if is_open(t, s) else []
    return Stretch(t, inner, s)


def singlestep(
    tape: Tape,
    x: Vector,
    step: Stretch,
    *,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    noise_form: bool = False,
) -> Vector:
    """One step of DPM-Solver (noise form) or DPM-Solver++ (data form), of one order more than it has inner levels.

    Each inner point comes from the outputs before it. The step then takes the slope from the first and the last
    output (midpoint; of two, with half its exact weight), or interpolates all of them (heun).

    Source: Lu et al. 2022, arXiv 2206.00927, algorithms 1 and 2; arXiv 2211.01095.
    """
    t, inner, s = step

    def output(point: Vector, level: Level) -> Output[Vector]:
        denoised = tape.denoise(point, level)
        return Output(level, noise_estimate(point, denoised, level) if noise_form else denoised)

    if not inner:
        return exponential_step(x, tape.denoise(x, t), t, s)
    outputs = [output(x, t)]
    for level in inner:
        point = exponential_rule(x, outputs, level, noise_form=noise_form)
        outputs.append(output(point, level))
    if solver_type == "heun":
        return exponential_rule(x, outputs, s, noise_form=noise_form)
    h = log_snr_step(t, s)
    kind = "midpoint" if len(inner) == 1 else "heun"
    moments = dpm_moments(-h if noise_form else h, 1, kind, corrected=True)
    return exponential_rule(
        x, [outputs[0], outputs[-1]], s, noise_form=noise_form, moments=moments
    )


def _divided(grid: Grid, order: int, r1: float, r2: float) -> Iterator[Stretch]:
    """The grid's steps, with new levels inside."""
    nodes = (r1, r2)[: order - 1]
    if len(set(nodes)) < len(nodes):
        raise InvalidInputError(
            f"the inner levels of a step of order 3 must differ, got r1=r2={r1:g}; order 3 needs r2=2/3"
        )
    for t, s in grid.steps:
        yield stretch(grid.process, t, s, nodes)


def _merged(grid: Grid, order: int) -> Iterator[Stretch]:
    """Steps that each take as many of the grid's as the order; those from pure noise and to clean data stay alone."""
    levels = list(grid.levels)
    if levels[0].is_pure_noise:
        yield Stretch(levels[0], [], levels[1])
        del levels[0]
    clean = [levels.pop()] if levels[-1].is_clean else []
    for k in range(0, len(levels) - 1, order):
        t, *inner, s = levels[k : k + order + 1]
        yield Stretch(t, inner, s)
    if levels and clean:
        yield Stretch(levels[-1], [], clean[0])


@sampler(
    "dpm_solver_singlestep",
    title="DPM-Solver singlestep",
    order=2,
    calls_per_step=2,
    paper="Lu et al. 2022, arXiv:2206.00927",
    aliases=("dpm_solver_2",),
    presets={"dpm_solver_1": {"order": 1}, "dpm_solver_3": {"order": 3, "r1": 1 / 3}},
)
def dpm_solver_singlestep(
    tape: Tape,
    grid: Grid,
    order: Order = 2,
    solver_type: SolverType = "midpoint",
    r1: FirstNode = 1 / 2,
    r2: SecondNode = 2 / 3,
) -> Vector:
    """Exponential Runge-Kutta method on the noise prediction, with as many calls for each step as its order.

    A step from pure noise or to clean data is of first order. With order 1 it is DDIM, with order 2 and r1 = 1/2 it is
    `dpm_2`.
    """
    x = tape.start
    for step in _divided(grid, order, r1, r2):
        x = singlestep(tape, x, step, solver_type=solver_type, noise_form=True)
    return x


@sampler(
    "dpmpp_singlestep",
    title="DPM++ singlestep",
    order=2,
    calls_per_step=2,
    paper="Lu et al. 2022, arXiv:2211.01095",
    aliases=("dpmpp_2s", "DPM-Solver++(2S)", "DPM++ 2S"),
    presets={
        "dpmpp_3s": {"order": 3, "r1": 1 / 3},
        "DPM-Solver++(3S)": {"order": 3, "r1": 1 / 3},
        "DPMSolverSinglestepScheduler": {"inner": "grid"},
    },
)
def dpmpp_singlestep(
    tape: Tape,
    grid: Grid,
    order: Order = 2,
    solver_type: SolverType = "midpoint",
    r1: FirstNode = 1 / 2,
    r2: SecondNode = 2 / 3,
    inner: Inner = "between",
) -> Vector:
    """Exponential Runge-Kutta method on the data prediction, with as many calls for each step as its order.

    A step from pure noise or to clean data is of first order. Diffusers counts the steps by their calls: there the
    inner levels are the grid's own, on which order 3 is of second order unless the grid is even in log_snr. (With order
    3 its midpoint type also steps to the second inner level by the midpoint rule, which the paper does not.)
    """
    x = tape.start
    for step in _merged(grid, order) if inner == "grid" else _divided(grid, order, r1, r2):
        x = singlestep(tape, x, step, solver_type=solver_type)
    return x


@sampler(
    "dpmpp_2s_ancestral",
    title="DPM++ 2S a",
    family="SDE",
    order=2,
    calls_per_step=2,
    stochastic=True,
    paper="Lu et al. 2022, arXiv:2211.01095; k-diffusion",
    aliases=("sample_dpmpp_2s_ancestral",),
    presets={
        "flow_dpmpp_2s_ancestral": {"variable": "flow_time"},
        "sample_dpmpp_2s_ancestral_RF": {"variable": "flow_time"},
    },
)
def dpmpp_2s_ancestral(
    tape: Tape,
    grid: Grid,
    eta: AncestralEta = 1.0,
    s_noise: NoiseFactor = 1.0,
    variable: Variable = "ratio",
) -> Vector:
    """A step of DPM-Solver++(2S) to the kept part of the noise, then fresh noise up to the level.

    The variable says what eta counts in; ComfyUI takes the flow time on flow models. The step itself is in log_snr.
    """
    declare_noise_factor(tape, eta, s_noise)
    x = tape.start
    for t, s in grid.steps:
        kept = kept_level(grid.process, t, s, eta, variable)
        x = singlestep(tape, x, stretch(grid.process, t, kept, NODES[2]))
        x = renewed(tape, x, kept, t, s, s_noise)
    return x


@sampler(
    "dpm_fast",
    title="DPM fast",
    order=2,
    paper="Lu et al. 2022, arXiv:2206.00927",
    aliases=("DPM-Solver-fast", "sample_dpm_fast"),
)
def dpm_fast(
    tape: Tape, grid: Grid, eta: AncestralEta = 0.0, s_noise: NoiseFactor = 1.0
) -> Vector:
    """DPM-Solver in steps of third order with one call for each step of the grid, whose inner levels it does not use.

    Its steps are of equal length in log_snr between the first and the last noisy level. The last ones are of lower
    order, so that the calls add up. Published to stop at the last noisy level; here a grid that goes on to clean
    data spends its last call on the estimate of x_0 there, so that no noise is left in the result.
    """
    declare_noise_factor(tape, eta, s_noise)
    noisy = [level for level in grid.levels if not level.is_clean]
    x, last = tape.start, noisy[-1]

    def advance(x: Vector, t: Level, s: Level, order: int) -> Vector:
        lowest = min(s, last, key=lambda level: level.ratio)
        kept = max(lowest, kept_level(grid.process, t, s, eta), key=lambda level: level.ratio)
        x = singlestep(tape, x, stretch(grid.process, t, kept, NODES[order]), noise_form=True)
        return renewed(tape, x, kept, t, s, s_noise)

    if noisy[0].is_pure_noise:
        x = advance(x, *grid.steps[0], order=1)
        del noisy[0]
    if not noisy:
        return x
    orders = _fast_orders(len(noisy) - 1)
    parts = [k / len(orders) for k in range(1, len(orders))]
    path = [noisy[0], *(level_between(grid.process, noisy[0], last, k) for k in parts), last]
    for (t, s), order in zip(pairwise(path), orders, strict=False):
        x = advance(x, t, s, order)
    end = grid.levels[-1]
    return exponential_step(x, tape.denoise(x, last), last, end) if end.is_clean else x


def _fast_orders(calls: int) -> list[int]:
    """Orders that add up to the number of calls: all 3, but at the end 2 and 1, or 1, or 2."""
    if calls and calls % 3 == 0:
        return [3] * (calls // 3 - 1) + [2, 1]
    return [3] * (calls // 3) + [calls % 3] * (calls > 0)
