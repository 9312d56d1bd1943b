"""Measured order of convergence, on every path, against an adaptive solver of order eight."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import fewstep as fs
from fewstep.samplers import SAMPLERS

FIRST, LAST, RHO = 10.0, 0.05, 7.0
PROCESSES = {
    "vp": fs.process.vp_continuous(),
    "edm": fs.process.edm(),
    "flow": fs.process.flow(),
}
CASES: list[tuple[str, dict[str, Any], int]] = [
    *((e.name, {}, e.order) for e in SAMPLERS if not e.stochastic),
    ("ddim", {"eta": 0.0}, 1),
    ("euler_ancestral", {"eta": 0.0}, 1),
    *(("unipc", {"order": p, "variant": v}, p + 1) for p in (1, 2, 3) for v in ("bh1", "bh2")),
]


def mixture(process: fs.Process) -> fs.exact.GaussianMixture:
    means, widths, weights = (
        torch.tensor(v, dtype=torch.float64)
        for v in ([[-1.0, 0.3], [0.8, -0.5], [0.2, 1.1]], [0.4, 0.5, 0.6], [0.3, 0.5, 0.2])
    )
    return fs.exact.GaussianMixture(means, widths, weights, process=process)


def grid(process: fs.Process, steps: int) -> fs.Grid:
    """Every second step twice as long, since smooth grids hide faults; short of clean data, where order is lost."""
    path = np.cumsum([0.0, *(1.0 + np.arange(steps) % 2)])
    ends = FIRST ** (1 / RHO), LAST ** (1 / RHO)
    return fs.Grid.from_ratios(process, (ends[0] + path / path[-1] * (ends[1] - ends[0])) ** RHO)


START = FIRST * torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@functools.cache
def truth() -> Tensor:
    """The solution of `dx^ / dlog_snr = D - x^` in the coordinates of alpha = 1."""
    denoiser = mixture(PROCESSES["edm"])

    def slope(log_snr: float, flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat).view_as(START)
        ratio = math.exp(-log_snr)
        return (denoiser(x, fs.Level(ratio, 1.0, ratio)) - x).flatten().numpy()

    span = (-math.log(FIRST), -math.log(LAST))
    solution = solve_ivp(
        slope, span, START.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12
    )
    return torch.from_numpy(solution.y[:, -1]).view_as(START)


def run(name: str, options: dict[str, Any], process: fs.Process, steps: int) -> Tensor:
    """The end of the path in the coordinates of alpha = 1."""
    levels = grid(process, steps)
    plan = fs.plan(name, levels, **options)
    return plan.run(mixture(process), levels.levels[0].alpha * START) / levels.levels[-1].alpha


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("name", "options", "order"), CASES, ids=str)
def test_order_is_as_stated(
    name: str, options: dict[str, Any], order: int, process: fs.Process
) -> None:
    counts = (40, 80, 160)
    errors = [float((run(name, options, process, n) - truth()).abs().max()) for n in counts]
    assert errors[-1] > 1e-11, "too near rounding to tell"
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert measured[-1] == pytest.approx(order, abs=0.2)
    assert np.mean(measured) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("other", ["vp", "flow"])
@pytest.mark.parametrize(("name", "options"), [case[:2] for case in CASES], ids=str)
def test_every_path_is_the_same_path(name: str, options: dict[str, Any], other: str) -> None:
    """In `x / alpha` over `sigma / alpha` all processes have the same ODE, so all give the same points."""
    on_edm, on_other = (run(name, options, PROCESSES[process], 12) for process in ("edm", other))
    torch.testing.assert_close(on_other, on_edm, rtol=1e-10, atol=1e-10)


def test_more_orders_need_fewer_calls() -> None:
    """At equal network calls the error falls in the order that the metadata promises."""
    errors = [
        float((run(name, options, PROCESSES["edm"], 40) - truth()).abs().max())
        for name, options in (
            ("euler", {}),
            ("dpmpp_2m", {}),
            ("unipc", {}),
            ("unipc", {"order": 3}),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100
