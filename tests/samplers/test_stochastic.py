"""Samplers that draw noise, on Gaussian data, where the law of the result can be worked out exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fewstep as fs
from exact_problems import MEAN, PROCESSES, WIDTH, Gaussian, grid, law, law_grid, true_law
from fewstep.samplers import SAMPLERS
from sampler_cases import CASES, TRACED, Case, corrected, draws_noise

WEAK: list[tuple[Case, int]] = [
    *((Case(e), e.order) for e in TRACED if e.stochastic and e.order),
    *((corrected(e), e.corrected_order) for e in TRACED if e.stochastic and e.corrected_order),
    (Case(SAMPLERS.find("ddim"), {"eta": 1.0}), 1),
    (Case(SAMPLERS.find("ddim"), {"eta": 0.5}), 1),
    (Case(SAMPLERS.find("euler")), 1),
]
MORE_COUNTS = {"dpmpp_dual_sde_momentumized": (384, 768)}
"""Of what reaches its order late: this one comes to 1 from below."""

DRAWING = [case for case in CASES if draws_noise(case)]
OF_ANY_ORDER = [
    pytest.param(case, marks=[] if case.is_named else pytest.mark.slow)
    for case in DRAWING
    if case.entry.order
]
FIRST_DRAWING = list({case.name: case for case in reversed(DRAWING)}.values())[::-1]
"""Of each sampler that can draw noise the first case that does: the defaults, if they do."""


def errors_of_the_law(
    case: Case,
    process: fs.Process,
    *counts: int,
    levels: Callable[[fs.Process, int], fs.Grid] = law_grid,
) -> list[float]:
    """Errors of the standard deviation; the mean, which is checked here, converges as well."""
    errors = []
    for steps in counts:
        plan = fs.plan(case.name, levels(process, steps), **case.options)
        mean, std = law(plan)
        true_mean, true_std = true_law(plan)
        assert mean == pytest.approx(true_mean, abs=2 / steps)
        errors.append(std - true_std)
    return errors


@pytest.mark.parametrize(("case", "order"), WEAK, ids=str)
def test_the_law_of_the_result_converges_to_the_data_with_the_stated_order(
    case: Case, order: int
) -> None:
    """On uneven steps, since smooth grids hide faults."""
    counts = MORE_COUNTS.get(case.name, (192, 384))
    coarse, fine = errors_of_the_law(case, PROCESSES["vp"], *counts, levels=grid)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)
    limit = (2**order * fine - coarse) / (2**order - 1)  # extrapolated
    assert limit == pytest.approx(0, abs=3e-4)


@pytest.mark.parametrize("case", OF_ANY_ORDER, ids=str)
def test_with_any_option_the_law_converges(case: Case) -> None:
    if "noise" not in fs.plan(case.name, law_grid(PROCESSES["flow"], 8), **case.options).inexact:
        coarse, fine = map(abs, errors_of_the_law(case, PROCESSES["flow"], 40, 240))
        assert fine < max(coarse / 2, 1e-3)


@pytest.mark.parametrize("case", [c for c in DRAWING if c.is_path_invariant], ids=str)
def test_every_path_gives_the_same_law(case: Case) -> None:
    laws = []
    for process in PROCESSES.values():
        plan = fs.plan(case.name, law_grid(process, 12), **case.options)
        mean, std = law(plan)
        alpha = plan.levels[-1].alpha
        laws.append((mean / alpha, std / alpha))
    assert laws[1] == pytest.approx(laws[0], rel=1e-10)
    assert laws[2] == pytest.approx(laws[0], rel=1e-10)


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


@pytest.mark.parametrize("case", FIRST_DRAWING, ids=str)
def test_twenty_thousand_samples_have_the_mean_and_variance_of_the_law(case: Case) -> None:
    """The whole road, with fewstep.Noise: 20 seeds of 1000 numbers each."""
    process = PROCESSES["vp"]
    plan = fs.plan(case.name, law_grid(process, 40), **case.options)
    noise = fs.Noise(range(20), (1000,))
    first = plan.levels[0]
    generator = torch.Generator().manual_seed(0)
    x0 = MEAN + WIDTH * torch.randn(20, 1000, generator=generator)
    start = first.alpha * x0 + first.sigma * noise.initial()
    samples = plan.run(Gaussian(), start, noise).double()
    mean, std = law(plan)
    n = samples.numel()
    assert float(samples.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(n))
    assert float(samples.std()) == pytest.approx(std, abs=4 * std / math.sqrt(2 * n))
    if case.entry.order and case.is_named and not plan.inexact:
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
