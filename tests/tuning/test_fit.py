"""Least squares on tables: its vectors, its derivatives, where it ends, and what is not finite."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from exact_problems import NORMAL, PROCESSES, mixture
from fewstep.errors import NonFiniteError
from fewstep.plan import Plan
from fewstep.tuning.fit import LEAST_STEP, Batch, Numbers, Problem, fit
from fewstep.tuning.losses import pixels
from fewstep.tuning.table import Table, log_snr_bounds, table_of

GAUSSIAN_STD = 0.5


def start_of(process: fs.Process, calls: int = 3, name: str = "unipc") -> Table:
    made = fs.plan(name, fs.schedulers.make_grid("time_uniform", process, calls))
    assert isinstance(made, Plan)
    return table_of(made)


def result(table: Table, batch: Batch) -> Tensor:
    denoiser, noise, _ = batch
    return table.point(table.calls, noise, table.estimates(denoiser, noise))


def gaussian(process: fs.Process) -> Batch:
    """Normal data, whose flow is known: it ends at `GAUSSIAN_STD` times the noise, up to the noisiest level's rest."""
    denoiser = fs.exact.GaussianMixture(
        torch.zeros(1, 2, dtype=torch.float64), GAUSSIAN_STD, process=process
    )
    return denoiser, NORMAL, GAUSSIAN_STD * NORMAL


@pytest.mark.parametrize("family", PROCESSES)
def test_a_vector_is_its_table(family):
    process = PROCESSES[family]
    numbers, table = Numbers(process, 4), start_of(process, 4)
    again = numbers.table(numbers.of(table))
    low = log_snr_bounds(process)[0]
    if table.grid.levels[0].log_snr < low:  # pure noise is no level that can be moved
        assert again.grid.levels[0].log_snr == pytest.approx(low)
        return
    assert np.allclose(again.starts, table.starts, rtol=1e-9, atol=1e-12)
    assert np.allclose(again.weights, table.weights, rtol=1e-9, atol=1e-12)
    assert again.grid.ratios == pytest.approx(table.grid.ratios, rel=1e-9)


def test_levels_are_held_in_range_and_in_order():
    numbers = Numbers(fs.process.vp_linear(), 3)
    low, high = log_snr_bounds(numbers.process)
    for levels in ([-99.0, 50.0, -3.0], [99.0, 99.0, 99.0], [1.0, 1.0, 1.0]):
        held = numbers.held(np.array([*levels, *range(8)], dtype=float))
        assert low <= held[0] and held[2] <= high
        assert np.all(np.diff(held[:3]) >= LEAST_STEP - 1e-12)
        assert held[3:].tolist() == list(range(8))


@pytest.mark.parametrize("family", PROCESSES)
def test_derivatives_are_those_of_whole_runs(family):
    """Only the calls that a number reaches are made again; that must not change the derivative."""
    process = PROCESSES[family]
    numbers = Numbers(process, 4)
    batch = (mixture(process), NORMAL, torch.zeros_like(NORMAL))
    problem = Problem(numbers, [batch], pixels, math.inf, lambda share: None)
    vector = numbers.of(start_of(process, 4))
    vector += 0.05 * np.cos(np.arange(len(vector)))
    jacobian = problem.jacobian(vector)
    for k, move in enumerate(numbers.moves):
        moved = vector.copy()
        moved[k] += move
        change = result(numbers.table(moved), batch) - result(numbers.table(vector), batch)
        assert torch.allclose(jacobian[k], change.flatten(), rtol=1e-9, atol=1e-12)
        assert float(change.abs().max()) > 0


@pytest.mark.parametrize("family", PROCESSES)
def test_two_calls_are_exact_on_normal_data(family):
    """The estimate is a multiple of the point there, so there are numbers that make the result exact."""
    batch = gaussian(PROCESSES[family])
    *_, found = fit(start_of(PROCESSES[family], 2, "ddim"), [batch])
    assert (result(found, batch) - batch[2]).abs().max() < 1e-6


def test_each_iteration_comes_nearer_and_batches_do_not_matter():
    process = fs.process.vp_linear()
    denoiser = mixture(process)
    target = 0.7 * torch.tanh(NORMAL)
    whole: list[Batch] = [(denoiser, NORMAL, target)]
    rows = torch.arange(len(NORMAL)).split(3)
    parts: list[Batch] = [(denoiser, NORMAL[r], target[r]) for r in rows]
    errors = {}
    for name, batches in (("whole", whole), ("parts", parts)):
        tables = list(fit(start_of(process), batches))
        errors[name] = [
            float((result(t, whole[0]) - target).square().mean().sqrt()) for t in tables
        ]
        assert errors[name] == sorted(errors[name], reverse=True)
    assert errors["whole"][0] == pytest.approx(errors["parts"][0], rel=1e-6)
    assert errors["whole"][-1] == pytest.approx(errors["parts"][-1], rel=0.05)


def test_a_start_that_is_not_finite_is_refused():
    process = fs.process.vp_linear()
    batch = (mixture(process), NORMAL, torch.full_like(NORMAL, math.nan))
    with pytest.raises(NonFiniteError, match="before any fit"):
        next(fit(start_of(process), [batch]))


def test_tries_that_are_not_finite_are_stepped_back_from():
    """Results that leave the start's by too much are NaN: the fit stays inside, and still comes nearer."""
    process = fs.process.vp_linear()
    start, batch = start_of(process, 2, "ddim"), gaussian(process)
    begin, refused = result(start, batch), []
    fence = 0.3 * float((batch[2] - begin).square().mean())

    def fenced(x: Tensor, wanted: Tensor) -> Tensor:
        refused.append(bool((x - begin).square().mean() > fence))
        return pixels(x, wanted) + (math.nan if refused[-1] else 0.0)

    tables = []
    with contextlib.suppress(NonFiniteError):
        tables.extend(fit(start, [batch], loss=fenced))
    assert any(refused)
    wrong = [float((result(t, batch) - batch[2]).square().mean()) for t in [start, *tables]]
    assert tables and wrong[-1] < wrong[0]


def test_a_picture_that_goes_astray_does_not_decide_the_fit():
    process = fs.process.vp_linear()
    denoiser, noise, target = gaussian(process)
    astray = target.clone()
    astray[0] += 5.0
    *_, found = fit(start_of(process, 2, "ddim"), [(denoiser, noise, astray)], soften=True)
    *_, bent = fit(start_of(process, 2, "ddim"), [(denoiser, noise, astray)])

    def off(table: Table) -> float:
        return float(
            (result(table, (denoiser, noise, target)) - target)[1:].square().mean().sqrt()
        )

    assert off(found) < 0.8 * off(bent)
