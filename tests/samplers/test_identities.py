"""Samplers with different names and formulas that are the same method give the same tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep as fs
from fewstep.plan import Plan
from fewstep.plan.rules import expand
from fewstep.process import forward_kernel

PROCESSES = {
    "vp": fs.process.vp_linear(),
    "edm": fs.process.edm(),
    "flow": fs.process.flow(),
}


def table(plan: Plan) -> np.ndarray:
    """Every evaluated point and the result, written out in the start, the outputs and the draws."""
    rows = expand(plan.instructions, plan.result, plan.levels[-1])
    return np.array([[row.start, *row.outputs, *row.draws] for row in rows])


def assert_same(a: Plan, b: Plan) -> None:
    np.testing.assert_allclose(table(a), table(b), rtol=1e-10, atol=1e-13)


def grids(process: fs.Process) -> list[fs.Grid]:
    smooth = np.geomspace(30, 0.02, 9).tolist()
    rough = [50.0, 7.0, 6.5, 2.0, 0.9, 0.3, 0.29]
    pure = [] if process.name == "edm" else [math.inf]
    return [
        fs.Grid.from_ratios(process, ratios)
        for ratios in (smooth, [*smooth, 0.0], [*pure, *rough, 0.0])
    ]


def euler_in_ratio(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
    """`x^ += (r_s - r_t) noise` with `x^ = x / alpha`, as k-diffusion writes it."""
    x = tape.start / grid.levels[0].alpha
    for t, s in grid.steps:
        slope = (x - tape.denoise(t.alpha * x, t)) / t.ratio
        x = x + (s.ratio - t.ratio) * slope
    return grid.levels[-1].alpha * x


def euler_in_flow_time(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
    """`x += (s - t) v` with `v = noise - x_0`, as rectified flow writes it."""
    x = tape.start
    for t, s in grid.steps:
        denoised = tape.denoise(x, t)
        velocity = (x - t.alpha * denoised) / t.sigma - denoised
        x = x + (s.sigma - t.sigma) * velocity
    return x


def ddim_of_the_paper(tape: fs.Tape, grid: fs.Grid, eta: float = 0.0) -> fs.Vector:
    """Song, Meng, Ermon 2021, equations 12 and 16, in their alphas (ours squared)."""
    x = tape.start
    for t, s in grid.steps:
        a_t, a_s = t.alpha**2, s.alpha**2
        predicted = tape.denoise(x, t)
        noise = (x - math.sqrt(a_t) * predicted) / math.sqrt(1 - a_t)
        std = eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
        x = math.sqrt(a_s) * predicted + math.sqrt(max(0.0, 1 - a_s - std**2)) * noise
        if std > 1e-12:
            x = x + std * tape.noise(t, s)
    return x


def two_m_of_the_paper(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2."""
    x, previous, h_previous = tape.start, None, math.nan
    for t, s in grid.steps:
        denoised = tape.denoise(x, t)
        h = math.log(s.alpha / s.sigma) - math.log(t.alpha / t.sigma)
        d = denoised
        if previous is not None:
            r = h_previous / h
            d = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * previous
        x = s.sigma / t.sigma * x - s.alpha * (math.exp(-h) - 1) * d
        previous, h_previous = denoised, h
    return x


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_deterministic_ddim_is_euler(process: fs.Process) -> None:
    for grid in grids(process):
        assert_same(fs.plan("ddim", grid), fs.plan("euler", grid))
        assert_same(fs.plan("euler_ancestral", grid, eta=0.0), fs.plan("euler", grid))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_stochastic_ddim_is_the_posterior_of_ddpm(process: fs.Process) -> None:
    for grid in grids(process):
        assert_same(fs.plan("ddim", grid, eta=1.0), fs.plan("ddpm", grid))
        assert_same(fs.plan("euler_ancestral", grid), fs.plan("ddpm", grid))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 2.0])
def test_ddim_and_euler_ancestral_share_eta(eta: float) -> None:
    for grid in grids(PROCESSES["flow"]):
        assert_same(fs.plan("ddim", grid, eta=eta), fs.plan("euler_ancestral", grid, eta=eta))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_euler_is_the_step_in_the_ratio(process: fs.Process) -> None:
    for grid in grids(process):
        if not grid.levels[0].is_pure_noise:
            assert_same(fs.plan("euler", grid), fs.plan(euler_in_ratio, grid))


def test_euler_on_flow_is_the_step_in_time() -> None:
    for grid in grids(PROCESSES["flow"]):
        assert_same(fs.plan("euler", grid), fs.plan(euler_in_flow_time, grid))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_the_formula_of_the_paper(eta: float) -> None:
    for grid in grids(PROCESSES["vp"]):
        assert_same(fs.plan("ddim", grid, eta=eta), fs.plan(ddim_of_the_paper, grid, eta=eta))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_dpmpp_2m_is_the_algorithm_of_the_paper(process: fs.Process) -> None:
    grid = grids(process)[0]
    assert_same(fs.plan("dpmpp_2m", grid), fs.plan(two_m_of_the_paper, grid))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_one_step_of_anything_deterministic_to_clean_data_is_the_estimate(
    process: fs.Process,
) -> None:
    grid = fs.Grid.from_ratios(process, [5.0, 0.0])
    for name in ("ddim", "euler", "heun", "dpmpp_2m", "unipc"):
        assert_same(fs.plan(name, grid), fs.plan("ddpm", grid))


def test_heun_with_one_step_is_the_trapezoid_rule() -> None:
    grid = fs.Grid.from_ratios(fs.process.edm(), [3.0, 1.0])

    def trapezoid(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
        t, s = grid.levels
        x = tape.start
        slope = (x - tape.denoise(x, t)) / 3.0
        there = x - 2.0 * slope
        return x - 2.0 * (slope / 2 + (there - tape.denoise(there, s)) / 2)

    assert_same(fs.plan("heun", grid), fs.plan(trapezoid, grid))


def test_first_order_unipc_predicts_as_euler() -> None:
    for grid in grids(PROCESSES["vp"]):
        first = fs.plan("unipc", grid, order=1)
        assert table(first)[1] == pytest.approx(table(fs.plan("euler", grid))[1])


def test_without_the_closed_forms_unipc_does_not_depend_on_the_weight() -> None:
    """From the third step on, with order 3, every weight is solved for."""
    grid = grids(PROCESSES["edm"])[0]
    tables = [
        table(fs.plan("unipc", grid, order=3, variant=v, lower_order_final=False))
        for v in ("bh1", "bh2")
    ]
    # the first three points hold the closed forms; a later row differs from them only through those points
    steps = [np.diff(t, axis=0) for t in tables]
    assert not np.allclose(steps[0][1], steps[1][1], rtol=1e-6)
    newest = [[t[k + 1][k + 1] for k in range(3, 8)] for t in tables]
    np.testing.assert_allclose(*newest, rtol=1e-10)


@given(st.integers(0, 990), st.integers(1, 9))
@settings(max_examples=50)
def test_the_large_variance_is_the_training_beta(t: int, stride: int) -> None:
    """On neighbouring entries `q(x_t | x_s)` has the variance beta_t."""
    process = PROCESSES["vp"]
    grid = fs.Grid.from_times(process, [float(t + stride), float(t)])
    plan = fs.plan("ddpm", grid, variance="large")
    s, noisier = process.level(float(t)), process.level(float(t + stride))
    std = table(plan)[1][-1]
    assert std == pytest.approx(forward_kernel(s, noisier).std, rel=1e-12)
    betas = 1 - np.prod(1 - process.betas[t + 1 : t + stride + 1])  # type: ignore[attr-defined]
    assert std**2 == pytest.approx(betas, rel=1e-8)


def test_ddpm_on_the_full_table_is_the_algorithm_of_the_paper() -> None:
    """Ho, Jain, Abbeel 2020, algorithm 2 with beta tilde: `(x - beta / sqrt(1 - abar) eps) / sqrt(1 - beta) + ...`."""
    process = fs.process.vp_linear(steps=20, beta_end=0.3)
    betas = np.linspace(1e-4, 0.3, 20)
    bars = np.cumprod(1 - betas)
    grid = fs.schedulers.trailing(process, 20)
    noise = fs.Noise([0], (4,), dtype=torch.float64)
    x = x0 = noise.initial()

    def eps(x: Any, t: Any) -> Any:
        return torch.tanh(x) * (0.5 + 0.01 * t)

    for t in reversed(range(20)):
        mean = (x - betas[t] / math.sqrt(1 - bars[t]) * eps(x, t)) / math.sqrt(1 - betas[t])
        x = mean
        if t > 0:
            std = math.sqrt(betas[t] * (1 - bars[t - 1]) / (1 - bars[t]))
            x = mean + std * noise(process.level(float(t)), process.level(float(t - 1)))
    denoiser = fs.Denoiser(lambda x, t: eps(x, t[0]), process, "noise")
    got = fs.plan("ddpm", grid).run(denoiser, x0, noise)
    torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-10)
