"""Levels between which the estimate of x_0 changes little: a bound on the Kullback-Leibler divergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fewstep.denoisers import BaseDenoiser
from fewstep.process import Level
from fewstep.schedulers import Grid, make_grid
from fewstep.schedulers.ranges import ends
from fewstep.tuning.search.routes import cheapest_route
from fewstep.tuning.teacher import Lesson

FINE_STEPS = 64
"""Levels that are chosen among, at least."""

DISCOUNTS = (0.0, 1.0)
"""Exponents d of a weight `(sigma / alpha)^2d`: 0 for the divergence itself, 1 for equal weight along log_snr.

The divergence demands as much of what is finer than the eye sees as of the rest; with less weight there, results are
far nearer to the converged ones.
"""


@torch.no_grad()
def estimates_of_noised(
    denoiser: BaseDenoiser, data: Tensor, levels: Sequence[Level], generator: torch.Generator
) -> Tensor:
    """Estimates of x_0 for data under more and more of the same noise, shape (levels, B, ...).

    In `x / alpha` the noise is one Brownian path over `(sigma / alpha)^2`, so that the points at two levels are
    jointly those of the forward process.

    Args:
        denoiser: The denoiser of the data.
        data: Shape (B, ...).
        levels: From noisy to almost clean.
        generator: On the CPU, where the noise is drawn for every device.
    """
    denoiser = denoiser.for_run()
    estimates, noise, below = [], torch.zeros_like(data), 0.0
    for level in reversed(levels):
        kept = below / level.ratio
        fresh = torch.randn(data.shape, generator=generator, dtype=data.dtype).to(data.device)
        noise = kept * noise + (1 - kept**2) ** 0.5 * fresh
        estimates.append(denoiser(level.alpha * data + level.sigma * noise, level))
        below = level.ratio
    return torch.stack(estimates[::-1])


def divergence_costs(
    estimates: Tensor, ratios: Sequence[float], discount: float = 0.0
) -> np.ndarray:
    """What a step of the reverse SDE with a constant estimate adds to the divergence, shape (levels, levels).

    `1/2 int_{u_i}^{u_j} E |D_t - D_i|^2 u^-discount du` over `u = (alpha / sigma)^2`, in mean over the elements, by
    the trapezoid rule over the levels between i and j; infinite unless i < j. Without discount it adds up over the
    steps of a grid to a bound on the Kullback-Leibler divergence of the discretised reverse SDE's path from the true
    one (Girsanov); with `t = sigma / alpha` it is the paper's integral of `t^-3 E |D_t - D_i|^2 dt`. For normal data
    of standard deviation c it is least where `t^2 / (c^2 + t^2)` falls by equal factors.

    Args:
        estimates: Those of `estimates_of_noised`.
        ratios: `sigma / alpha` of their levels, all finite.
        discount: Less weight on low noise, 0 or more.

    Source: Sabour, Fidler, Kreis 2024, arXiv 2404.14507; the discount is ours.
    """
    count = len(ratios)
    u = np.array(ratios) ** -2.0
    costs = np.full((count, count), np.inf)
    for i in range(count - 1):
        moved = (estimates[i:] - estimates[i]).square().flatten(1).mean(1).double().cpu().numpy()
        density = moved * u[i:] ** -discount / 2
        costs[i, i + 1 :] = np.cumsum(np.diff(u[i:]) * (density[1:] + density[:-1]) / 2)
    return costs


def least_divergence(lesson: Lesson, calls: int) -> Iterator[Grid]:
    """Grids of the least bound on the divergence, exactly so among fine levels; the lesson's ends are the data.

    The bound is infinite for a step to clean data. So the last level that it counts, the least noisy one, is replaced
    by clean data. `max(64, 2 calls)` network calls for each picture.

    Source: Sabour, Fidler, Kreis 2024, arXiv 2404.14507 (Align Your Steps).
    """
    denoiser, _, data = lesson.part(torch.arange(len(lesson)))
    process = denoiser.process
    levels = make_grid("exponential", process, max(FINE_STEPS, 2 * calls)).levels[:-1]
    generator = torch.Generator().manual_seed(0)
    estimates = estimates_of_noised(denoiser, data, levels, generator)
    ratios = [min(level.ratio, ends(process)[0]) for level in levels]
    for discount in DISCOUNTS:
        route = cheapest_route(divergence_costs(estimates, ratios, discount), calls)
        chosen = (*(levels[k] for k in route[:-1]), process.clean)
        yield Grid(process, chosen, options={"discount": discount})
