"""Samplers that draw noise, on Gaussian data, where the law of the result can be worked out exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep as fs
from exact_problems import MEAN, PROCESSES, WIDTH, law, law_grid, true_law

CASES: list[tuple[str, dict[str, Any]]] = [
    ("ddpm", {}),
    ("ddim", {"eta": 1.0}),
    ("ddim", {"eta": 0.5}),
    ("euler_ancestral", {}),
    ("euler", {}),
]


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_law_of_the_result_converges_to_the_data(
    name: str, options: dict[str, Any], process: fs.Process
) -> None:
    errors = []
    for steps in (80, 160, 320):
        plan = fs.plan(name, law_grid(process, steps), **options)
        mean, std = law(plan)
        true_mean, true_std = true_law(plan)
        assert mean == pytest.approx(true_mean, abs=2 / steps)
        errors.append(std - true_std)
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert 2 * errors[2] - errors[1] == pytest.approx(0, abs=3e-4)  # the limit, extrapolated
    assert orders[-1] == pytest.approx(1.0, abs=0.1)  # first weak order, as their metadata says


def test_the_large_variance_is_right_in_the_limit_of_many_steps() -> None:
    errors = []
    for steps in (80, 160, 320):
        plan = fs.plan("ddpm", law_grid(PROCESSES["vp"], steps), variance="large")
        errors.append(abs(law(plan)[1] - true_law(plan)[1]))
    assert errors[0] > 1.8 * errors[1] > 3.0 * errors[2]


def test_extra_noise_widens_the_result() -> None:
    grid = law_grid(PROCESSES["vp"], 80)
    more, plain, less = (
        law(fs.plan("euler_ancestral", grid, s_noise=s))[1] for s in (1.05, 1.0, 0.95)
    )
    assert more > plain > less


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_twenty_thousand_samples_have_the_mean_and_variance_of_the_law(
    name: str, options: dict[str, Any]
) -> None:
    """The whole road, with fewstep.Noise: 40 seeds of 500 numbers each."""
    process = PROCESSES["vp"]
    denoiser = fs.exact.GaussianMixture(torch.full((1, 500), MEAN), WIDTH, process=process)
    plan = fs.plan(name, law_grid(process, 40), **options)
    noise = fs.Noise(range(40), (500,))
    first = plan.levels[0]
    generator = torch.Generator().manual_seed(0)
    x0 = denoiser.sample(40, generator)
    samples = plan.run(denoiser, first.alpha * x0 + first.sigma * noise.initial(), noise).double()
    mean, std = law(plan)
    n = samples.numel()
    assert float(samples.mean()) == pytest.approx(mean, abs=4.5 * std / math.sqrt(n))
    assert float(samples.std()) == pytest.approx(std, abs=4.5 * std / math.sqrt(2 * n))
    true_mean, true_std = true_law(plan)
    assert float(samples.mean()) == pytest.approx(true_mean, abs=0.06)
    assert float(samples.std()) == pytest.approx(true_std, abs=0.06)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_ten_and_forty_steps_of_ddpm_follow_one_path(process: fs.Process) -> None:
    """With a constant estimate of x_0 the points at shared levels are the same points."""
    fine = law_grid(process, 40).levels
    coarse = fine[::4]
    x0 = torch.tensor([[0.3, -0.8, 1.0]] * 2, dtype=torch.float64)
    seen: list[dict[fs.Level, Tensor]] = []
    for levels in (fine, coarse):
        points: dict[fs.Level, Tensor] = {}
        plan = fs.plan("ddpm", fs.Grid(process, levels))
        noise = fs.Noise([1, 2], (3,), dtype=torch.float64)
        x = levels[0].alpha * x0 + levels[0].sigma * noise.initial()

        def keep(step: fs.Progress, points: dict[fs.Level, Tensor] = points) -> None:
            points[step.level] = step.x

        points[levels[-1]] = plan.run(lambda x, level: x0, x, noise, keep)
        seen.append(points)
    assert set(seen[1]) == set(coarse)
    for level in coarse:
        torch.testing.assert_close(seen[0][level], seen[1][level], rtol=1e-9, atol=1e-9)


def test_paths_of_different_lengths_stay_together_with_a_real_estimate() -> None:
    """The same seed at 30 and 120 steps gives nearly the same sample; another seed does not."""
    process = PROCESSES["vp"]
    denoiser = fs.exact.GaussianMixture(
        torch.tensor([[0.8, 0.1], [-0.6, -0.9]]), 0.3, process=process
    )

    def sample(seed: int, steps: int) -> Tensor:
        plan = fs.plan("ddpm", law_grid(process, steps))
        noise = fs.Noise(range(seed, seed + 16), (2,))
        return plan.run(denoiser, plan.levels[0].sigma * noise.initial(), noise)

    near = (sample(0, 30) - sample(0, 120)).norm(dim=1).median()
    far = (sample(0, 30) - sample(100, 120)).norm(dim=1).median()
    assert near < 0.25 * far
