"""Grids that need only the ends of the range of `sigma / alpha`, or of the time."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np

from fewstep.errors import InvalidInputError
from fewstep.process import Process
from fewstep.registry import Option
from fewstep.schedulers.grid import Grid
from fewstep.schedulers.ranges import Tail, apart, ends, places, ratio_grid
from fewstep.schedulers.registry import scheduler


@scheduler(
    "karras",
    title="Karras",
    paper="Karras et al. 2022, arXiv:2206.00364",
    aliases=("edm", "get_sigmas_karras", "use_karras_sigmas", "KarrasScheduler"),
)
def karras(
    process: Process,
    steps: int,
    *,
    rho: Annotated[
        float, Option("exponent; larger puts more steps at low noise", 1e-3, 1e3)
    ] = 7.0,
    tail: Tail = "zero",
) -> Grid:
    """Equally spaced in `(sigma / alpha)^(1 / rho)` from the noisiest to the least noisy level."""
    high, low = ends(process)
    return ratio_grid(process, steps, tail, lambda count: karras_curve(high, low, count, rho))


def karras_curve(high: float, low: float, count: int, rho: float = 7.0) -> np.ndarray:
    """Numbers from high down to low, equally spaced in the power `1 / rho`."""
    return high * np.linspace(1.0, (low / high) ** (1 / rho), count) ** rho


@scheduler(
    "exponential",
    title="Exponential",
    paper="Lu et al. 2022, arXiv:2206.00927; k-diffusion",
    aliases=(
        "log_snr",
        "uniform_log_snr",
        "uniform_lambda",
        "lu",
        "polyexponential",
        "edm_ve",
        "get_sigmas_exponential",
        "get_sigmas_polyexponential",
        "use_exponential_sigmas",
        "use_lu_lambdas",
        "ExponentialScheduler",
        "PolyexponentialScheduler",
    ),
    presets={"dpm_solver_log_snr": {"tail": "min"}},
)
def exponential(
    process: Process,
    steps: int,
    *,
    rho: Annotated[
        float,
        Option(
            "exponent of the way left; 1 for equal steps, larger for more at low noise", 0.1, 10
        ),
    ] = 1.0,
    tail: Tail = "zero",
) -> Grid:
    """Equally spaced in log_snr from the noisiest to the least noisy level, with rho for polynomially spaced.

    The logarithm of `sigma / alpha` lies at the share `(1 - i / (n - 1))^rho` of the way up from its lower end.
    """
    high, low = ends(process)
    return ratio_grid(process, steps, tail, lambda count: _exponential(high, low, count, rho))


def _exponential(high: float, low: float, count: int, rho: float = 1.0) -> np.ndarray:
    return low * (high / low) ** ((1 - places(count)) ** rho)


@scheduler(
    "kl_optimal",
    title="KL Optimal",
    paper="Sabour, Fidler, Kreis 2024, arXiv:2404.14507",
    presets={"kl_optimal_a1111": {"tail": "min"}},
)
def kl_optimal(
    process: Process,
    steps: int,
    *,
    data_std: Annotated[float, Option("standard deviation c of the data", 1e-3, 1e3)] = 1.0,
    tail: Tail = "zero",
) -> Grid:
    """Equally spaced in `atan(sigma / (alpha c))`: the best grid for Gaussian data of standard deviation c.

    Each step of DDIM makes their standard deviation too small by the factor `cos(step in the angle)`, and equal
    steps make the least of it.
    """
    first, last = (math.atan(end / data_std) for end in ends(process))
    return ratio_grid(
        process, steps, tail, lambda count: data_std * np.tan(np.linspace(first, last, count))
    )


@scheduler(
    "laplace",
    title="Laplace",
    paper="Hang, Gu 2024, arXiv:2407.03297; k-diffusion, ComfyUI",
    aliases=("get_sigmas_laplace", "LaplaceScheduler"),
)
def laplace(
    process: Process,
    steps: int,
    *,
    mu: Annotated[float, Option("log(sigma / alpha) at the middle", -10, 10)] = 0.0,
    beta: Annotated[float, Option("width; smaller keeps closer to the middle", 0.01, 10)] = 0.5,
    tail: Tail = "zero",
) -> Grid:
    """Quantiles of a Laplace distribution of log_snr: `exp(mu - beta sign(1/2 - r) log(1 - 2 |1/2 - r| + 1e-5))`.

    Here `r = i / (n - 1)`. Elsewhere the same levels come without clean data at the end; that is `tail=min`, which
    asks for one level more.
    """

    def curve(count: int) -> np.ndarray:
        below_middle = 0.5 - places(count)
        return np.exp(
            mu - beta * np.sign(below_middle) * np.log(1 - 2 * np.abs(below_middle) + 1e-5)
        )

    return ratio_grid(process, steps, tail, curve)


@scheduler(
    "vp",
    title="VP",
    paper="Song et al. 2021, arXiv:2011.13456; k-diffusion",
    aliases=("get_sigmas_vp", "VPScheduler"),
    presets={"edm_vp": {"fit": True}},
)
def vp(
    process: Process,
    steps: int,
    *,
    beta_d: Annotated[float, Option("rise of beta from t = 0 to t = 1", 0.1, 100)] = 19.9,
    beta_min: Annotated[float, Option("beta at t = 0", 0, 100)] = 0.1,
    t_min: Annotated[float, Option("time of the last level", 1e-6, 0.5)] = 1e-3,
    fit: Annotated[
        bool, Option("choose both betas so that the levels run over the range of the process")
    ] = False,
    tail: Tail = "zero",
) -> Grid:
    """Equally spaced in the time of a variance-preserving process: `sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)`.

    The levels belong to that process, whatever yours is; those outside its range move inside.
    """
    if fit:
        beta_d, beta_min = _fitted_betas(process, t_min)
    return ratio_grid(
        process,
        steps,
        tail,
        lambda count: np.sqrt(np.expm1(_decay(np.linspace(1.0, t_min, count), beta_d, beta_min))),
    )


def _decay(t: np.ndarray, beta_d: float, beta_min: float) -> np.ndarray:
    """Minus twice the logarithm of alpha."""
    return beta_d * t**2 / 2 + beta_min * t


def _fitted_betas(process: Process, t_min: float) -> tuple[float, float]:
    """beta_d and beta_min of the curve that runs from the noisiest level at t = 1 to the least noisy one at t_min.

    Raises:
        InvalidInputError: If that curve does not rise.
    """
    most, least = (math.log1p(end**2) for end in ends(process))
    beta_d = 2 * (most - least / t_min) / (1 - t_min)
    beta_min = most - beta_d / 2
    if beta_d * t_min + beta_min <= 0 or beta_d + beta_min <= 0:
        raise InvalidInputError(
            f"vp: fit=true finds no rising curve through the ends of {process.name} with t_min={t_min:g}; take a "
            "larger t_min, or fit=false"
        )
    return beta_d, beta_min


@scheduler(
    "time_uniform",
    title="Time uniform",
    paper="Song et al. 2021, arXiv:2011.13456; Lu et al. 2022, arXiv:2206.00927",
    aliases=("uniform_time",),
    presets={
        "time_quadratic": {"power": 2.0},
        "dpm_solver_time_uniform": {"tail": "min"},
        "dpm_solver_time_quadratic": {"power": 2.0, "tail": "min"},
    },
)
def time_uniform(
    process: Process,
    steps: int,
    *,
    power: Annotated[
        float, Option("exponent of the time; 1 for equal steps, 2 for quadratic ones", 0.1, 10)
    ] = 1.0,
    tail: Tail = "zero",
) -> Grid:
    """Equally spaced in `t^(1 / power)`, the process's own time, which counts from clean data."""
    origin = process.clean_time if math.isfinite(process.clean_time) else process.t_min
    first, last = ((t - origin) ** (1 / power) for t in (process.t_max, process.t_min))

    def curve(count: int) -> np.ndarray:
        times = origin + np.linspace(first, last, count) ** power
        held = np.clip(times, process.t_min, process.t_max)
        return np.array([level.ratio for level in process.levels(held.tolist())])

    return ratio_grid(process, steps, tail, curve)


@scheduler(
    "iddpm",
    title="iDDPM",
    paper="Nichol, Dhariwal 2021, arXiv:2102.09672; Karras et al. 2022, arXiv:2206.00364",
    aliases=("edm_iddpm",),
)
def iddpm(
    process: Process,
    steps: int,
    *,
    entries: Annotated[int, Option("entries of the table", 2, 100_000)] = 1000,
    least_alpha: Annotated[
        float, Option("smallest quotient of two neighbouring alpha^2", 1e-6, 0.5)
    ] = 0.001,
    offset: Annotated[float, Option("offset of the cosine", 0, 1)] = 0.008,
    tail: Tail = "zero",
) -> Grid:
    """Entries of iDDPM's table, as EDM writes it, at equal strides: those of them inside the process's range.

    With `a(j) = sin(pi j / (2 M (1 + offset)))^2` the table is `u_M = 0`,
    `u_(j-1) = sqrt((u_j^2 + 1) / max(a(j-1) / a(j), least_alpha) - 1)`.
    """
    high, low = ends(process)
    angles = np.arange(entries + 1) * (np.pi / 2 / entries / (1 + offset))
    squares = np.sin(angles) ** 2
    # u_j^2 + 1 is a product of quotients, from the last entry down.
    growth = -np.log(np.maximum(squares[:-1] / squares[1:], least_alpha))
    table = np.sqrt(np.expm1(np.cumsum(growth[::-1])))[::-1]
    kept = table[(table >= low) & (table <= high)]
    logs = np.log(kept if len(kept) > 1 else np.array([high, low]))
    size = len(logs)

    def curve(count: int) -> np.ndarray:
        strides = np.rint((size - 1) * places(count))
        return np.exp(np.interp(size - 1 - apart(size - 1 - strides, size), np.arange(size), logs))

    return ratio_grid(process, steps, tail, curve)
