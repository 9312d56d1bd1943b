"""Searches for levels: their costs against closed forms and hand computations, their optima, and every process."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import fewstep as fs
from exact_problems import NORMAL, PROCESSES, mixture
from fewstep.plan import Plan
from fewstep.samplers.steps import exponential_step
from fewstep.schedulers.ranges import ends
from fewstep.tuning.search import SEARCHES, searched_grids
from fewstep.tuning.search.bound import direct_weights, error_bound, least_bound
from fewstep.tuning.search.divergence import divergence_costs, estimates_of_noised
from fewstep.tuning.search.routes import cheapest_route
from fewstep.tuning.search.student import Student, student_route
from fewstep.tuning.teacher import Conditioned, Lesson, conditioned, lesson, path

VP = fs.process.vp_linear()
ALL = {
    **PROCESSES,
    "vp_linear": VP,
    "ve": fs.process.ve(),
    "zero_snr": fs.process.vp_linear(zero_terminal_snr=True),
}


def taught(process: fs.Process, count: int = 8) -> Lesson:
    model = fs.exact.GaussianMixture(
        torch.tensor([[-1.0, 0.3], [0.8, -0.5], [0.2, 1.1]]), 0.2, process=process
    )
    fine = fs.schedulers.make_grid("exponential", process, 48)
    return lesson(conditioned(model, count, 1.0), fs.Noise(range(count), (2,)), fine, 8)


# ---- the error bound -------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc", "ipndm"])
def test_direct_weights_are_those_that_the_plan_tells(sampler):
    grid = fs.Grid.from_ratios(VP, [100, 8, 2, 0.3, 0.02])
    told = fs.plan(sampler, grid).influence().direct.answers
    assert np.allclose(direct_weights(sampler, grid), told, rtol=1e-9, atol=1e-12)


def test_the_bound_of_ddim_in_two_steps_is_that_of_a_hand_computation():
    first, middle, last = 100.0, 3.0, 0.02
    # x^_1 = r_1/r_0 x^ + (1 - r_1/r_0) D_0, x^_2 = r_2/r_1 x^_1 + (1 - r_2/r_1) D_1
    weights = last / middle * (1 - middle / first), 1 - last / middle
    by_hand = weights[0] * first + weights[1] * middle
    for process in PROCESSES.values():
        found = error_bound("ddim", process, [first, middle, last])
        assert found == pytest.approx(by_hand, rel=1e-9)


def test_equal_steps_in_log_snr_have_the_least_bound_of_ddim():
    start = [100.0, 90.0, 2.0, 0.5, 0.02]
    found = least_bound("ddim", VP, start)
    assert found == pytest.approx(np.geomspace(100, 0.02, 5), rel=1e-3)


@pytest.mark.parametrize("steps", [3, 6, 12])
def test_the_least_bound_is_below_that_of_the_starts_and_nothing_beside_it_is_lower(steps):
    high, low = ends(VP)
    equal = np.geomspace(high, low, steps + 1)
    times = np.array([VP.ratio(t) for t in np.linspace(VP.t_max, VP.t_min, steps + 1)])
    best = min((least_bound("unipc", VP, start) for start in (equal, times)), key=_bound_of)
    assert np.all(np.diff(best) < 0) and best[[0, -1]] == pytest.approx([high, low])
    assert _bound_of(best) < 0.9 * min(map(_bound_of, (equal, times)))
    if steps == 3:
        for k, factor in itertools.product((1, 2), (0.9, 1.1)):
            moved = best.copy()
            moved[k] *= factor
            assert _bound_of(moved) > _bound_of(best) * (1 - 1e-3)


def _bound_of(ratios: np.ndarray) -> float:
    return error_bound("unipc", VP, ratios.tolist())


# ---- the divergence --------------------------------------------------------------------------

SPREAD = 0.5
RATIOS = np.geomspace(20.0, 0.05, 61)


def normal_costs(ratios: np.ndarray) -> np.ndarray:
    """The integral of `t^-3 E |D_t - D_i|^2` for normal data in closed form, with `E |D_t|^2 = c^4 / (c^2 + t^2)`."""
    c = SPREAD
    t, power = ratios, c**4 / (c**2 + ratios**2)
    # By parts: 1/2 t_j^-2 (power_j - power_i) plus the integral of 1/2 t^-2 dpower/dt, which is rational.
    rest = np.log(1 + (c / t) ** 2) / 2 - c**2 / (c**2 + t**2) / 2
    costs = (power[None] - power[:, None]) / (2 * t[None] ** 2) - (rest[None] - rest[:, None])
    costs[np.tril_indices(len(t))] = np.inf
    return costs


def test_the_costs_in_closed_form_are_the_integral():
    def integrand(t: np.ndarray, end: float) -> np.ndarray:
        return t**-3.0 * SPREAD**4 * (1 / (SPREAD**2 + t**2) - 1 / (SPREAD**2 + end**2))

    costs = normal_costs(np.array([20.0, 3.0, 0.2]))
    for i, j, high, low in ((0, 1, 20.0, 3.0), (1, 2, 3.0, 0.2), (0, 2, 20.0, 0.2)):
        t = np.linspace(low, high, 200_001)
        assert costs[i, j] == pytest.approx(np.trapezoid(integrand(t, high), t), rel=1e-5)


def test_estimates_and_costs_are_those_of_normal_data():
    process, generator = fs.process.edm(), torch.Generator().manual_seed(3)
    data = SPREAD * torch.randn(20_000, 1, dtype=torch.float64, generator=generator)
    model = fs.exact.GaussianMixture(torch.zeros(1, 1), SPREAD, process=process)
    levels = process.levels_at(RATIOS.tolist())
    estimates = estimates_of_noised(model, data, levels, generator)
    power = SPREAD**4 / (SPREAD**2 + RATIOS**2)
    for i, k in ((0, 30), (20, 40), (35, 40), (50, 60)):
        moved = float((estimates[k] - estimates[i]).square().mean())
        assert moved == pytest.approx(power[k] - power[i], rel=0.05)
    true, costs = normal_costs(RATIOS), divergence_costs(estimates, RATIOS.tolist())
    for i, j in ((0, 30), (20, 40), (30, 60), (55, 60)):
        assert costs[i, j] == pytest.approx(true[i, j], rel=0.05)


def test_the_least_divergence_of_normal_data_is_at_equal_factors_of_the_share_of_noise_and_not_kl_optimal():
    """Where `t^2 / (c^2 + t^2)` falls by equal factors; equal angles `atan(t / c)` are best for DDIM instead."""

    def total(ratios: np.ndarray) -> float:
        return float(np.diag(normal_costs(ratios), 1).sum())

    high, low = RATIOS[[0, -1]]
    shares = np.geomspace(*(t**2 / (SPREAD**2 + t**2) for t in (high, low)), 6)
    best = SPREAD * np.sqrt(shares / (1 - shares))
    for k, factor in itertools.product(range(1, 5), (0.98, 1.02)):
        moved = best.copy()
        moved[k] *= factor
        assert total(moved) > total(best)
    named = SPREAD * np.tan(np.linspace(*(math.atan(t / SPREAD) for t in (high, low)), 6))
    assert total(named) > 1.2 * total(best)
    route = cheapest_route(normal_costs(RATIOS), 5)
    assert np.log(RATIOS[route]) == pytest.approx(np.log(best), abs=0.15)


def test_a_discount_is_a_power_of_the_ratio():
    estimates = torch.tensor([[[1.0]], [[1.5]], [[3.0]]])
    plain, less = (divergence_costs(estimates, [2.0, 1.0, 0.5], d) for d in (0.0, 1.0))
    # u = 1/4, 1, 4 and |D - D_0|^2 = 0, 1/4, 4
    assert plain[0, 1:].tolist() == pytest.approx(
        [0.75 * 0.25 / 4, 0.75 * 0.25 / 4 + 3 * 4.25 / 4]
    )
    assert less[0, 1] == pytest.approx(0.75 * 0.25 / 4)
    assert less[0, 2] - less[0, 1] == pytest.approx(3 * (0.25 + 4 / 4) / 4)


# ---- students --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flow", "zero_snr"])
@pytest.mark.parametrize(
    ("order", "sampler", "options"),
    [(1, "ddim", {}), (2, "dpmpp_2m", {"solver_type": "heun"})],
)
def test_a_student_goes_where_the_sampler_goes(family, order, sampler, options):
    process = ALL[family]
    grid, denoiser = fs.schedulers.make_grid("trailing", process, 5), mixture(process)
    student = Student(grid.levels[0].sigma * NORMAL)
    for t, s in grid.steps:
        asked = student.asked(denoiser, t, order)
        student = Student(asked.at(s, order), asked.outputs)
    made = fs.plan(sampler, grid, **options)
    assert isinstance(made, Plan)
    end = made.run(denoiser, grid.levels[0].sigma * NORMAL)
    assert (student.x - end).abs().max() < 1e-10


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("family", PROCESSES)
def test_one_or_all_steps_leave_no_choice(family, order):
    process = PROCESSES[family]
    followed = path(mixture(process), NORMAL, fs.schedulers.make_grid("exponential", process, 6))
    assert student_route(mixture(process), followed, 1, order) == [0, 6]
    assert student_route(mixture(process), followed, 6, order) == list(range(7))


def test_two_steps_of_a_student_are_the_best_of_all():
    """With two steps nothing is greedy but the place after the first, to which one student only can come."""
    denoiser = mixture(VP)
    followed = path(denoiser, NORMAL, fs.schedulers.make_grid("exponential", VP, 20))

    def missed(middle: int) -> float:
        x, route = followed.points[0], [0, middle, 20]
        for i, j in itertools.pairwise(route):
            t, s = followed.levels[i], followed.levels[j]
            x = exponential_step(x, denoiser(x, t), t, s)
        return float((x - followed.points[-1]).square().mean())

    best = min(range(1, 20), key=missed)
    assert student_route(denoiser, followed, 2, 1) == [0, best, 20]


def test_a_student_of_first_order_ends_nearer_than_the_usual_grids():
    denoiser = mixture(VP)
    fine = fs.schedulers.make_grid("exponential", VP, 40)
    followed = path(denoiser, NORMAL, fine)

    def error(grid: fs.Grid) -> float:
        made = fs.plan("ddim", grid)
        assert isinstance(made, Plan)
        end = made.run(denoiser, grid.levels[0].sigma * NORMAL)
        return float((end - followed.points[-1]).square().mean())

    route = student_route(denoiser, followed, 5, 1)
    found = error(fs.Grid(VP, tuple(fine.levels[k] for k in route)))
    names = ("exponential", "karras", "trailing", "kl_optimal")
    assert found < 0.7 * min(error(fs.schedulers.make_grid(name, VP, 5)) for name in names)


# ---- all of them -----------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [2, 4])
@pytest.mark.parametrize("family", ALL)
def test_every_search_gives_grids_from_the_noisiest_level_to_clean_data(family, calls):
    process = ALL[family]
    grids = list(searched_grids(taught(process), calls))
    assert {grid.scheduler for grid in grids} <= {search.name for search in SEARCHES}
    assert len({grid.levels for grid in grids}) == len(grids)
    for grid in grids:
        assert len(grid.steps) == calls
        assert grid.ratios[0] == process.noisiest.ratio and grid.levels[-1].is_clean
        assert all(math.isfinite(r) for r in grid.ratios[1:])
        assert grid.ratios[-2] > process.least_noisy.ratio * (1 - 1e-9)
        made = fs.plan("unipc", grid)
        assert isinstance(made, Plan) and Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: search.name)
def test_searches_run_with_about_as_many_calls_as_fine_levels(search):
    few = taught(VP, 2)
    assert all(len(grid.steps) == 33 for grid in search.grids(few, 33))


def test_pictures_are_asked_with_their_own_conditions_and_guidance():
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x, t, labels):
            seen.append(labels.tolist())
            return x / 2 + 0.1 * labels.view(-1, 1)

    class Classes(fs.Denoiser):
        num_classes = 3

    model = Classes(Net(), VP, "data")
    few = Lesson(
        Conditioned(model, {"labels": torch.arange(4) % 3}, 2.0),
        torch.ones(4, 2),
        torch.ones(4, 2),
    )
    grids = list(searched_grids(few, 3))
    assert len(grids) > 3
    assert {tuple(labels) for labels in seen} <= {(0, 1, 2, 0), (3,) * 4, (0, 1, 2, 0, *(3,) * 4)}
