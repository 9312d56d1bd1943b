"""Samplers for models that were taught to jump to the data: LCM, consistency models, TrigFlow, TCD and CTM.

They renew a share of the noise at every step, however short it is. So with an ordinary model they converge neither to
the ODE nor to an SDE: more steps only make a distilled model's estimate better.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from fewstep.plan import Tape, Vector
from fewstep.process import DiscreteVP, Level, Process
from fewstep.registry import Option
from fewstep.samplers.options import NoiseFactor
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import exponential_step, renewed
from fewstep.schedulers import Grid

DATA_STD = 0.5
"""Standard deviation of the data that the boundary condition of LCM assumes."""

ROUNDING = 1e-6
"""By how much of an entry a time may lie below an entry of the table and still count as it."""


@sampler(
    "lcm",
    title="LCM",
    family="distilled",
    order=0,
    stochastic=True,
    paper="Song et al. 2023, arXiv:2303.01469; Luo et al. 2023, arXiv:2310.04378",
    aliases=(
        "sample_lcm",
        "lcm_custom_noise",
        "sample_lcm_custom_noise",
        "FlowMatchLCMScheduler",
        "trigflow",
        "scm",
        "SCMScheduler",
    ),
    presets={
        "LCMScheduler": {"boundary": "time"},
        "consistency_multistep": {"sigma_min": 0.002},
        "CMStochasticIterativeScheduler": {"sigma_min": 0.002},
    },
)
def lcm(
    tape: Tape,
    grid: Grid,
    boundary: Annotated[
        Literal["none", "time"],
        Option("blend the estimate with the point as LCM does near time 0: c_skip x + c_out D"),
    ] = "none",
    timestep_scaling: Annotated[
        float, Option("factor on the time, counted in table entries, in that blend", 0, 1e6)
    ] = 10.0,
    sigma_min: Annotated[
        float, Option("sigma/alpha that the model's estimate still has, as in EDM's units", 0, 1)
    ] = 0.0,
    s_noise: NoiseFactor = 1.0,
    s_noise_end: Annotated[
        float | None, Option("the factor at the last step, if not s_noise; linear between", 0, 10)
    ] = None,
) -> Vector:
    """Jump to the data and put all the noise of the next level on it, fresh: `alpha_s D + sigma_s z`.

    In `x / alpha` this is one method for all processes: multistep sampling of consistency models, of latent consistency
    models on flows, and of TrigFlow with its cosine and sine. The noise is what the run is given, of whatever kind.
    """
    end = s_noise if s_noise_end is None else s_noise_end
    if s_noise != 1.0 or end != 1.0 or sigma_min > 0:
        tape.declare_inexact("noise")
    if boundary == "time":
        tape.declare_inexact("signal")
        tape.declare_inexact("noise")
    least = grid.process.levels_at([sigma_min])[0]
    x, last = tape.start, max(1, len(grid.steps) - 1)
    for i, (t, s) in enumerate(grid.steps):
        estimate = tape.denoise(x, t)
        if boundary == "time":
            skip, out = _boundary(grid.process, t, timestep_scaling)
            estimate = skip * x + out * estimate
        left = least if least.ratio < s.ratio else s
        factor = s_noise + (end - s_noise) * i / last
        x = renewed(tape, left.alpha * estimate, left, t, s, factor)
    return x


def _boundary(process: Process, t: Level, scaling: float) -> tuple[float, float]:
    """`c_skip = d^2 / (v^2 + d^2)` and `c_out = v / sqrt(v^2 + d^2)` with d = DATA_STD and the scaled time v."""
    entry = t.t / process.t_max * (process.training_steps - 1)
    size = math.hypot(scaling * entry, DATA_STD)
    return (DATA_STD / size) ** 2, scaling * entry / size


@sampler(
    "tcd",
    title="TCD",
    family="distilled",
    order=0,
    stochastic=True,
    paper="Zheng et al. 2024, arXiv:2402.19159; Kim et al. 2023, arXiv:2310.02279",
    aliases=("sample_tcd", "strategic stochastic sampling"),
    presets={"TCDScheduler": {"middle": "time"}, "ctm": {"middle": "variance"}},
)
def tcd(
    tape: Tape,
    grid: Grid,
    eta: Annotated[
        float, Option("how far below the next level it jumps: 0 is DDIM, 1 (nearly) LCM", 0, 1)
    ] = 0.3,
    middle: Annotated[
        Literal["ratio", "variance", "time"],
        Option("of what the jump keeps 1 - eta: sigma/alpha, time; variance: keeps sqrt(1-eta^2)"),
    ] = "ratio",
) -> Vector:
    """Jump along the ODE to below the next level, then up to it with fresh noise.

    The level between has `1 - eta` times the next one's sigma/alpha, which is the same on every process. With `time` it
    has `1 - eta` times its time, rounded down to an entry where there is a table, as in diffusers. With `variance` it
    has `sqrt(1 - eta^2)` times its sigma/alpha, so that eta is the share of fresh noise: the gamma-sampling of
    consistency trajectory models.
    """
    x = tape.start
    for t, s in grid.steps:
        u = s if s.is_clean or eta == 0 else _below(grid.process, s, eta, middle)
        x = renewed(tape, exponential_step(x, tape.denoise(x, t), t, u), u, t, s)
    return x


def _below(
    process: Process, s: Level, eta: float, middle: Literal["ratio", "variance", "time"]
) -> Level:
    """The level to jump to before noise raises the point to s."""
    if middle == "time":
        time = max((1 - eta) * s.t, process.clean_time)
        if isinstance(process, DiscreteVP):
            time = math.floor(time + ROUNDING)
        below = process.level(time)
        return below if below.ratio < s.ratio else s
    share = math.sqrt((1 - eta) * (1 + eta)) if middle == "variance" else 1 - eta
    return process.levels_at([share * s.ratio])[0]
