"""Grids that walk the training table by index."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np

from fewstep.errors import InvalidInputError
from fewstep.process import Process
from fewstep.registry import Option
from fewstep.schedulers.grid import Grid
from fewstep.schedulers.ranges import Tail, ends, index_grid, level_count, ratio_grid
from fewstep.schedulers.registry import scheduler


@scheduler(
    "trailing",
    title="Trailing",
    paper="Lin et al. 2023, arXiv:2305.08891",
    aliases=("sgm trailing", "turbo"),
)
def trailing(process: Process, steps: int) -> Grid:
    """Equal strides counted from the noisiest index: `round(T - i T / n) - 1`."""
    return index_grid(process, steps, "zero", lambda count: _trailing(process, count))


def _trailing(process: Process, count: int) -> np.ndarray:
    size = process.training_steps
    # Halves round as in diffusers, whose expression this is; for some n it yields one entry too many.
    return np.round(np.arange(size, 0, -size / count))[:count] - 1


@scheduler(
    "leading",
    title="Leading",
    paper="Song, Meng, Ermon 2021, arXiv:2010.02502",
    aliases=("ddim_linear",),
    presets={"stable_diffusion_leading": {"offset": 1}},
)
def leading(
    process: Process,
    steps: int,
    *,
    offset: Annotated[int, Option("added to every index; Stable Diffusion uses 1", 0, 1000)] = 0,
    tail: Tail = "zero",
) -> Grid:
    """Equal strides counted from index 0: `i floor(T / n) + offset`; the linear subsequence of DDIM.

    It stops short of the noisiest index, so it does not suit models whose table ends in pure noise. With `tail=cut`
    the strides are `floor(T / (n + 1))` and the lowest index is left out, as diffusers does for its multistep solvers.
    """
    size = process.training_steps
    count = min(level_count(steps, tail), size)
    top = (count - 1) * (size // count)
    if top + offset > size - 1:
        raise InvalidInputError(
            f"leading: offset={offset} runs past the table; with {steps} steps at most {size - 1 - top}"
        )
    return index_grid(
        process, steps, tail, lambda n: np.arange(n)[::-1] * max(size // n, 1) + offset
    )


@scheduler("linspace", title="Linspace", paper="Nichol, Dhariwal 2021, arXiv:2102.09672")
def linspace(process: Process, steps: int, *, tail: Tail = "zero") -> Grid:
    """Equally spaced from the noisiest index to index 0, rounded: `round((T - 1) (1 - i / (n - 1)))`.

    With `tail=cut` it is what diffusers does for its multistep solvers.
    """
    top = process.training_steps - 1

    def indices(count: int) -> np.ndarray:
        rising = np.round(np.linspace(0, top, count))  # from below: halves round as in diffusers
        rising[-1] = top  # a single step starts at the noisiest index
        return rising[::-1]

    return index_grid(process, steps, tail, indices)


@scheduler(
    "normal",
    title="Normal",
    paper="k-diffusion, ComfyUI",
    aliases=("uniform", "get_sigmas"),
    presets={"sgm_uniform": {"tail": "cut"}},
)
def normal(process: Process, steps: int, *, tail: Tail = "zero") -> Grid:
    """Equally spaced from the noisiest index to index 0, between the entries where need be."""
    top = process.training_steps - 1
    return index_grid(process, steps, tail, lambda count: np.linspace(top, 0, count))


@scheduler("simple", title="Simple", paper="ComfyUI")
def simple(process: Process, steps: int) -> Grid:
    """Equal strides from the noisiest index, rounded up: `T - 1 - floor(i T / n)`."""
    return index_grid(process, steps, "zero", lambda count: simple_indices(process, count))


def simple_indices(process: Process, count: int) -> np.ndarray:
    """The indices of `simple`, in its own floating-point expression."""
    size = process.training_steps
    return size - 1 - np.floor(np.arange(count) * (size / count))


@scheduler(
    "ddim_uniform",
    title="DDIM uniform",
    paper="Rombach et al. 2022, arXiv:2112.10752; ComfyUI",
    aliases=("ddim",),
)
def ddim_uniform(process: Process, steps: int) -> Grid:
    """Every c-th index from 1 up, `c = floor(T / n)`.

    As everywhere under this name, the number of steps is `ceil((T - 1) / c)`, which up to `n = T` is n only where n
    divides T, and the first level is not the noisiest one.
    """
    size = process.training_steps

    def indices(count: int) -> np.ndarray:
        return np.arange(1, size, size // count)[::-1] if count <= size else np.arange(count)[::-1]

    return index_grid(process, steps, "zero", indices)


@scheduler(
    "quadratic",
    title="Quadratic",
    paper="Song, Meng, Ermon 2021, arXiv:2010.02502",
    aliases=("ddim_quadratic", "quad"),
)
def quadratic(
    process: Process,
    steps: int,
    *,
    reach: Annotated[float, Option("share of the table that is used", 0.01, 1.0)] = 0.8,
) -> Grid:
    """Squares: `floor(reach T (i / (n - 1))^2)`; the quadratic subsequence of DDIM."""
    last = reach * process.training_steps

    def indices(count: int) -> np.ndarray:
        squares = np.linspace(0, last**0.5, count) ** 2 if count > 1 else np.array([last])
        return np.floor(squares)[::-1]

    return index_grid(process, steps, "zero", indices)


@scheduler(
    "beta",
    title="Beta",
    paper="Lee, Lee, Gye, Kim 2024, arXiv:2407.12173",
    aliases=("BetaSamplingScheduler",),
    presets={
        "beta57": {"alpha": 0.5, "beta": 0.7},
        "beta_1_1": {"alpha": 1.0, "beta": 1.0},
        "beta_sigma": {"variable": "ratio", "tail": "zero"},
        "use_beta_sigmas": {"variable": "ratio", "tail": "zero"},
    },
)
def beta(
    process: Process,
    steps: int,
    *,
    alpha: Annotated[
        float, Option("first shape; smaller puts more steps at low noise", 0.1, 10)
    ] = 0.6,
    beta: Annotated[
        float, Option("second shape; smaller puts more steps at high noise", 0.1, 10)
    ] = 0.6,
    variable: Annotated[
        Literal["index", "ratio"],
        Option("what the quantiles are of: the table's index, or sigma/alpha"),
    ] = "index",
    tail: Tail = "cut",
) -> Grid:
    """Quantiles of a Beta distribution over the table: `round((T - 1) Q(1 - i / n))`.

    ComfyUI's is the default. That of diffusers and A1111, `beta_sigma`, takes the quantiles over `sigma / alpha`
    itself, which leaves few steps for low noise.
    """
    from scipy.special import betaincinv

    def quantiles(count: int) -> np.ndarray:
        return betaincinv(alpha, beta, np.linspace(1.0, 0.0, count))

    if variable == "ratio":
        high, low = ends(process)
        return ratio_grid(
            process, steps, tail, lambda count: low + (high - low) * quantiles(count)
        )
    top = process.training_steps - 1
    return index_grid(process, steps, tail, lambda count: np.rint(top * quantiles(count)))


@scheduler(
    "lcm",
    title="LCM",
    paper="Luo et al. 2023, arXiv:2310.04378; diffusers",
    aliases=("tcd", "LCMScheduler", "TCDScheduler"),
)
def lcm(
    process: Process,
    steps: int,
    *,
    original_steps: Annotated[
        int, Option("steps that the model was distilled from", 1, 10_000)
    ] = 50,
) -> Grid:
    """Every `floor(i m / n)`-th of the m indices that a consistency model was distilled on: `k T / m - 1`.

    More steps than those are `trailing`.
    """

    def indices(count: int) -> np.ndarray:
        distilled = max(original_steps, count)
        return _trailing(process, distilled)[np.arange(count) * distilled // count]

    return index_grid(process, steps, "zero", indices)


@scheduler(
    "sd_turbo",
    title="SD Turbo",
    paper="Sauer et al. 2023, arXiv:2311.17042; ComfyUI",
    aliases=("SDTurboScheduler",),
)
def sd_turbo(
    process: Process,
    steps: int,
    *,
    original_steps: Annotated[int, Option("number of indices to choose from", 1, 10_000)] = 10,
) -> Grid:
    """The first n of ten trailing indices, 999, 899, ..., then clean data at once.

    More steps than those are `trailing`.
    """
    return index_grid(
        process,
        steps,
        "zero",
        lambda count: _trailing(process, max(original_steps, count))[:count],
    )
