"""Multistep methods written a second way: by numerical integration of the interpolating polynomial, on tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor

import fewstep as fs
from exact_problems import LAST, PROCESSES, RHO, mixture

EDM = PROCESSES["edm"]
FIRST = 80.0
"""So noisy that the estimate hardly moves there: the first steps, of lower order, do not hide the order."""

START = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
ROUGH = [14.0, 9.0, 8.1, 4.0, 2.6, 1.1, 0.9, 0.4, 0.15, 0.1]


def steps_of_any_size(process: fs.Process) -> fs.Grid:
    """A short grid whose steps differ much, and that ends before clean data."""
    return fs.Grid.from_ratios(process, ROUGH)


def run(grid: fs.Grid, sampler: str, noise: Any = None, **options: Any) -> Tensor:
    """The end of the path from the common start, in the coordinates of alpha = 1."""
    first, last = grid.levels[0], grid.levels[-1]
    plan = fs.plan(sampler, grid, **options)
    return plan.run(mixture(grid.process), first.sigma * START, noise) / last.alpha


def estimate(x: Tensor, ratio: float) -> Tensor:
    """The estimate of x_0 in the coordinates of alpha = 1."""
    return mixture(EDM)(x, fs.Level(ratio, 1.0, ratio))


def slope(x: Tensor, ratio: float) -> Tensor:
    """The estimate of the noise in the same coordinates."""
    return (x - estimate(x, ratio)) / ratio


def lagrange_weights(
    nodes: Sequence[float], density: Callable[[float], float], low: float, high: float
) -> list[float]:
    """`int_low^high l_j(u) density(u) du` for each Lagrange polynomial l_j of the nodes."""

    def basis(u: float, j: int) -> float:
        others = [n for k, n in enumerate(nodes) if k != j]
        return math.prod((u - n) / (nodes[j] - n) for n in others)

    return [
        quad(lambda u, j=j: basis(u, j) * density(u), low, high, epsabs=0, epsrel=1e-12)[0]
        for j in range(len(nodes))
    ]


def by_quadrature(
    ratios: Sequence[float],
    order: int,
    place: Callable[[float], float],
    density: Callable[[float], float],
    *,
    data: bool,
) -> Tensor:
    """Integrate the polynomial through the last outputs in the variable `u = place(r)`.

    Noise form: `x^_s = x^_t + int noise (dr / du) du`; data form: `x^_s / r_s = x^_t / r_t + int D (d(1/r) / du) du`.
    The density is the derivative in the brackets.
    """
    x, outputs = ratios[0] * START, []
    for i in range(len(ratios) - 1):
        r, s = ratios[i], ratios[i + 1]
        outputs = [(estimate if data else slope)(x, r), *outputs][:order]
        nodes = [place(ratios[i - j]) for j in range(len(outputs))]
        weights = lagrange_weights(nodes, density, place(r), place(s))
        change = sum(w * o for w, o in zip(weights, outputs, strict=True))
        x = s / r * x + s * change if data else x + change
    return x


@functools.cache
def truth() -> Tensor:
    """The solution of `dx^ / dlog_snr = D - x^` from `FIRST` to `LAST`."""

    def fall(log_snr: float, flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat).view_as(START)
        return (estimate(x, math.exp(-log_snr)) - x).flatten().numpy()

    span = (-math.log(FIRST), -math.log(LAST))
    start = (FIRST * START).flatten().numpy()
    solution = solve_ivp(fall, span, start, method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(solution.y[:, -1]).view_as(START)


def order_of(
    sampler: str,
    options: dict[str, Any],
    process: fs.Process = EDM,
    rough: bool = True,
    counts: tuple[int, int] = (160, 320),
) -> float:
    """The rate at which the largest error falls; on a rough grid every second step is twice as long."""
    errors = []
    for n in counts:
        path = np.cumsum([0.0, *(1.0 + rough * (np.arange(n) % 2))])
        ends = FIRST ** (1 / RHO), LAST ** (1 / RHO)
        ratios = (ends[0] + path / path[-1] * (ends[1] - ends[0])) ** RHO
        grid = fs.Grid.from_ratios(process, ratios)
        errors.append(float((run(grid, sampler, **options) - truth()).abs().max()))
    assert errors[-1] > 1e-10, "too near rounding to tell"
    return math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0])
