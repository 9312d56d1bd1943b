"""Grids made for flow models, in the flow time `sigma / (alpha + sigma)`; by ratio they serve every process."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np

from fewstep.errors import InvalidInputError
from fewstep.process import Process
from fewstep.registry import Option
from fewstep.schedulers.grid import Grid
from fewstep.schedulers.ranges import Tail, held_grid, level_count
from fewstep.schedulers.registry import scheduler

Terminal = Annotated[
    float, Option("flow time that the last noisy level is stretched to; 0 leaves it alone", 0, 0.9)
]

GREATEST_MU = 20.0


def ratio_of(flow_time: np.ndarray) -> np.ndarray:
    """`sigma / alpha` at a flow time in [0, 1]."""
    with np.errstate(divide="ignore"):
        return flow_time / (1 - flow_time)


def _shifted_ratios(times: np.ndarray, shift: float, terminal: float) -> np.ndarray:
    """Flow times shifted, `s u / (1 + (s - 1) u)`, which multiplies the ratio by s, and stretched to the terminal."""
    ratios = shift * ratio_of(times)
    if not terminal or len(ratios) == 1:
        return ratios
    alphas = 1 / (1 + ratios)
    return ratio_of(1 - alphas * ((1 - terminal) / alphas[-1]))


@scheduler(
    "flow",
    title="Flow",
    paper="Esser et al. 2024, arXiv:2403.03206",
    aliases=("flow_uniform", "ModelSamplingSD3"),
    presets={
        "flow_match_euler": {"tail": "zero", "shift_twice": True},
        "use_flow_sigmas": {"start": 0.999},
        "sd3": {"shift": 3.0},
        "sd3_diffusers": {"shift": 3.0, "tail": "zero", "shift_twice": True},
        "aura_flow": {"shift": 1.73},
        "mochi": {"shift": 6.0},
        "hunyuan_video": {"shift": 7.0},
        "wan": {"shift": 8.0},
        "lumina2": {"shift": 6.0},
        "hidream": {"shift": 3.0},
        "omnigen2": {"shift": 2.6},
    },
)
def flow(
    process: Process,
    steps: int,
    *,
    shift: Annotated[
        float, Option("factor on sigma/alpha; larger puts more steps at high noise", 0.01, 100)
    ] = 1.0,
    start: Annotated[
        float, Option("flow time of the first level, before the shift", 1e-3, 1)
    ] = 1.0,
    shift_twice: Annotated[
        bool,
        Option("for tails other than cut: shift the least noisy level twice, as diffusers does"),
    ] = False,
    tail: Tail = "cut",
    terminal: Terminal = 0.0,
) -> Grid:
    """Equally spaced in flow time, then shifted by a constant: `s u / (1 + (s - 1) u)`, u from 1 to 1/n.

    SD3 shifts by 3 at 1024 x 1024 pixels; the presets have the shifts of other models.
    """
    if tail == "cut":
        times = np.linspace(start, 0.0, steps + 1)[:-1]
    else:
        last = process.least_noisy.ratio * (shift if shift_twice else 1 / shift)
        times = np.linspace(start, last / (1 + last), level_count(steps, tail))
    return held_grid(process, _shifted_ratios(times, shift, terminal), tail != "min")


@scheduler(
    "flow_dynamic",
    title="Flow, dynamic shift",
    paper="Esser et al. 2024, arXiv:2403.03206; Black Forest Labs 2024 (Flux)",
    aliases=("flux", "use_dynamic_shifting", "ModelSamplingFlux"),
    presets={
        "sd3_dynamic": {"rule": "root"},
        "ltx_video": {"mu": 0.95, "mu_large": 2.05, "tokens_small": 1024, "terminal": 0.1},
    },
)
def flow_dynamic(
    process: Process,
    steps: int,
    *,
    tokens: Annotated[
        int, Option("tokens of a picture; Flux and SD3 have (height / 16)(width / 16)", 1, 10**8)
    ] = 4096,
    rule: Annotated[
        Literal["linear", "root"],
        Option("log(shift) linear in the tokens (Flux), or the shift as their square root (SD3)"),
    ] = "linear",
    mu: Annotated[
        float, Option("logarithm of the shift for a small picture", -GREATEST_MU, GREATEST_MU)
    ] = 0.5,
    mu_large: Annotated[
        float, Option("logarithm of the shift for a large picture", -GREATEST_MU, GREATEST_MU)
    ] = 1.15,
    tokens_small: Annotated[int, Option("tokens of that small picture", 1, 10**8)] = 256,
    tokens_large: Annotated[int, Option("tokens of that large picture", 1, 10**8)] = 4096,
    terminal: Terminal = 0.0,
) -> Grid:
    """As `flow`, with a shift that grows with the size of the picture: `exp(mu)`, mu linear in the number of tokens.

    By the rule `root`, which knows no mu, it is `3 sqrt(tokens / tokens_large)`.
    """
    if rule == "root":
        shift = 3.0 * math.sqrt(tokens / tokens_large)
    else:
        shift = math.exp(_mu_for(tokens, (tokens_small, mu), (tokens_large, mu_large)))
    times = np.linspace(1.0, 0.0, steps + 1)[:-1]
    return held_grid(process, _shifted_ratios(times, shift, terminal))


def _mu_for(tokens: int, small: tuple[int, float], large: tuple[int, float]) -> float:
    """The straight line through two pairs (tokens, mu).

    Raises:
        InvalidInputError: If the pairs make no line, or it leads to a shift beyond all reason.
    """
    if not small[0] < large[0]:
        raise InvalidInputError(
            f"flow_dynamic: tokens_small={small[0]} must lie below tokens_large={large[0]}"
        )
    mu = small[1] + (large[1] - small[1]) * (tokens - small[0]) / (large[0] - small[0])
    if abs(mu) > GREATEST_MU:
        raise InvalidInputError(
            f"flow_dynamic: tokens={tokens} gives mu={mu:.4g}, beyond {-GREATEST_MU:g}..{GREATEST_MU:g}; give the "
            "tokens of one picture, (height / 16)(width / 16), or take mu and mu_large closer together"
        )
    return mu


@scheduler(
    "linear_quadratic",
    title="Linear quadratic",
    paper="Polyak et al. 2024 (Movie Gen), arXiv:2410.13720; Mochi",
)
def linear_quadratic(
    process: Process,
    steps: int,
    *,
    threshold: Annotated[
        float, Option("share of the flow time that the linear half of the steps covers", 1e-3, 0.5)
    ] = 0.025,
) -> Grid:
    """In flow time the first half of the steps small and equal, the second half growing quadratically.

    With L steps in the first half and Q in the second, `1 - c i / L` for `i <= L`, then less
    `(L - c n) (i - L)^2 / (L Q^2)` too.
    """
    linear = max(steps // 2, 1)
    i = np.arange(steps)
    later = np.maximum(i - linear, 0)
    rise = (linear - threshold * steps) / (linear * max(steps - linear, 1) ** 2)
    return held_grid(process, ratio_of(1 - threshold * i / linear - rise * later**2))


@scheduler(
    "bong_tangent",
    title="Bong tangent",
    paper="RES4LYF by ClownsharkBatwing",
)
def bong_tangent(
    process: Process,
    steps: int,
    *,
    pivot: Annotated[
        float, Option("where along the way both curves are steepest", 0.1, 0.9)
    ] = 0.6,
    slope: Annotated[float, Option("steepness for 40 levels", 0.01, 10)] = 0.2,
) -> Grid:
    """Two arcs of arctangents in flow time, from 1 to 1/2 and from 1/2 to 0."""
    if steps == 1:
        return held_grid(process, np.array([math.inf]))
    size = steps + 2
    middle = min(max(int(size * pivot), 2), size - 2)
    first = _arc(middle, slope * 40 / size, middle, 1.0, 0.5)
    second = _arc(size - middle, slope * 40 / size, 0, 0.5, 0.0)
    return held_grid(process, ratio_of(np.concatenate([first[:-1], second])[:-1]))


def _arc(count: int, slope: float, pivot: int, start: float, end: float) -> np.ndarray:
    """Arctangent around the pivot, scaled to fall from start to end."""
    curve = np.arctan(-slope * (np.arange(count) - pivot))
    return end + (start - end) * (curve - curve[-1]) / (curve[0] - curve[-1])
