"""Problems whose solution is known, on which samplers are measured: a mixture for paths, a Gaussian for laws."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import fewstep as fs
from fewstep.plan import Plan

FIRST, LAST, RHO = 10.0, 0.05, 7.0
PROCESSES = {
    "vp": fs.process.vp_continuous(),
    "edm": fs.process.edm(),
    "flow": fs.process.flow(),
}


class Mixture(fs.exact.GaussianMixture):
    """An exact denoiser that counts as guided: by itself, which is guidance that is off, or away from another one."""

    weak: fs.exact.GaussianMixture | None = None

    def guided_pair(self, x: Tensor, level: fs.Level) -> tuple[Tensor, Tensor]:
        denoised = self(x, level)
        return denoised, denoised if self.weak is None else self.weak(x, level)


def mixture(process: fs.Process) -> Mixture:
    means, widths, weights = (
        torch.tensor(v, dtype=torch.float64)
        for v in ([[-1.0, 0.3], [0.8, -0.5], [0.2, 1.1]], [0.4, 0.5, 0.6], [0.3, 0.5, 0.2])
    )
    return Mixture(means, widths, weights, process=process)


def guided_mixture(process: fs.Process) -> Mixture:
    """The mixture, with guidance away from a single Gaussian."""
    denoiser = mixture(process)
    centre = torch.tensor([[0.1, 0.2]], dtype=torch.float64)
    denoiser.weak = fs.exact.GaussianMixture(centre, 0.9, process=process)
    return denoiser


def grid(process: fs.Process, steps: int, first: float = FIRST) -> fs.Grid:
    """Every second step twice as long, since smooth grids hide faults; short of clean data, where order is lost.

    From a noisier first level the first steps, which multistep methods take at lower orders, matter less.
    """
    path = np.cumsum([0.0, *(1.0 + np.arange(steps) % 2)])
    ends = first ** (1 / RHO), LAST ** (1 / RHO)
    return fs.Grid.from_ratios(process, (ends[0] + path / path[-1] * (ends[1] - ends[0])) ** RHO)


NORMAL = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
START = FIRST * NORMAL


@functools.cache
def truth(first: float = FIRST) -> Tensor:
    """The solution of `dx^ / dlog_snr = D - x^` in the coordinates of alpha = 1."""
    denoiser = mixture(PROCESSES["edm"])

    def slope(log_snr: float, flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat).view_as(NORMAL)
        ratio = math.exp(-log_snr)
        return (denoiser(x, fs.Level(ratio, 1.0, ratio)) - x).flatten().numpy()

    span, start = (-math.log(first), -math.log(LAST)), first * NORMAL
    solution = solve_ivp(
        slope, span, start.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12
    )
    return torch.from_numpy(solution.y[:, -1]).view_as(NORMAL)


def run(
    name: str, options: dict[str, Any], process: fs.Process, steps: int, first: float = FIRST
) -> Tensor:
    """The end of the path in the coordinates of alpha = 1."""
    levels = grid(process, steps, first)
    start = levels.levels[0].alpha * first * NORMAL
    plan = fs.plan(name, levels, **options)
    return plan.run(mixture(process), start) / levels.levels[-1].alpha


def measured_orders(
    name: str, options: dict[str, Any], process: fs.Process, counts: Sequence[int]
) -> list[float]:
    """Between neighbouring numbers of steps: the rate at which the largest error falls."""
    errors = [float((run(name, options, process, n) - truth()).abs().max()) for n in counts]
    return [
        math.log(a / b) / math.log(m / n)
        for a, b, n, m in zip(errors, errors[1:], counts, counts[1:], strict=False)
    ]


MEAN, WIDTH = 0.7, 0.5


def law_grid(process: fs.Process, steps: int) -> fs.Grid:
    """A smooth grid that stops short of clean data."""
    ratios = np.linspace(40.0 ** (1 / 7), 0.05 ** (1 / 7), steps + 1) ** 7
    return fs.Grid.from_ratios(process, ratios)


class Gaussian:
    """The exact denoiser of data N(mean, WIDTH^2), each element for itself: linear in the point."""

    def __init__(self, mean: Tensor | float = MEAN) -> None:
        self.mean = mean

    def __call__(self, x: Tensor, level: fs.Level) -> Tensor:
        variance = (level.alpha * WIDTH) ** 2 + level.sigma**2
        return (level.alpha * WIDTH**2 * x + level.sigma**2 * self.mean) / variance

    def guided_pair(self, x: Tensor, level: fs.Level) -> tuple[Tensor, Tensor]:
        return self(x, level), self(x, level)

    def derivative(self, x: Tensor, along: Tensor, level: fs.Level) -> Tensor:
        """By hand, in `x^` and the noise variance `r^2`, whose derivative is `-2 r^2`."""
        noise, variance = level.ratio**2, WIDTH**2 + level.ratio**2
        denoised = self(x, level)
        return (WIDTH**2 * along / level.alpha + 2 * noise * (denoised - self.mean)) / variance


def law(plan: Plan) -> tuple[float, float]:
    """Mean and standard deviation of the result for data N(MEAN, WIDTH^2), with no sampling.

    The estimate of x_0 is linear there, so each register is a vector: the constant, then its weights on the
    independent normal numbers that went into it.
    """
    size = 2 + plan.draws
    units = iter(torch.eye(size, dtype=torch.float64)[2:])

    constant = torch.zeros(size, dtype=torch.float64)
    constant[0] = MEAN
    first = plan.levels[0]
    x = torch.zeros(size, dtype=torch.float64)
    x[0], x[1] = first.alpha * MEAN, math.hypot(first.alpha * WIDTH, first.sigma)
    result = plan.run(Gaussian(constant), x, lambda a, b: next(units))
    return float(result[0]), float(result[1:].norm())


def true_law(plan: Plan) -> tuple[float, float]:
    """Mean and standard deviation of the data N(MEAN, WIDTH^2) at the last level."""
    last = plan.levels[-1]
    return last.alpha * MEAN, math.hypot(last.alpha * WIDTH, last.sigma)


def weak_orders(
    name: str, options: dict[str, Any], process: fs.Process, counts: Sequence[int]
) -> list[float]:
    """Between neighbouring numbers of steps: the rate at which the error of the standard deviation falls."""
    errors = []
    for n in counts:
        plan = fs.plan(name, law_grid(process, n), **options)
        errors.append(abs(law(plan)[1] - true_law(plan)[1]))
    return [
        math.log(a / b) / math.log(m / n)
        for a, b, n, m in zip(errors, errors[1:], counts, counts[1:], strict=False)
    ]


def label(value: object) -> str:
    """What a case is called in a test's name: the same in every process, which the text of a function is not."""
    return getattr(value, "__name__", str(value))
