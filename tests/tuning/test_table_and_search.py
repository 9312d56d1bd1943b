"""Tables are the plans they come from; routes are the cheapest there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import fewstep as fs
from exact_problems import NORMAL, PROCESSES, mixture
from fewstep.errors import InvalidInputError
from fewstep.plan import Plan
from fewstep.samplers.steps import exponential_step
from fewstep.tuning.search.gits import jump_costs, searched_levels
from fewstep.tuning.search.routes import cheapest_route
from fewstep.tuning.table import table_of
from fewstep.tuning.teacher import path


def traced(name: str, process: fs.Process, steps: int = 5, **options: object) -> Plan:
    made = fs.plan(name, fs.schedulers.make_grid("trailing", process, steps), **options)
    assert isinstance(made, Plan)
    return made


@pytest.mark.parametrize("family", PROCESSES)
@pytest.mark.parametrize("name", ["unipc", "dpmpp_2m", "ddim", "lms"])
def test_a_table_is_the_plan_it_comes_from(name, family):
    made = traced(name, PROCESSES[family])
    table = table_of(made)
    assert table.calls == made.calls
    levels = table.grid.levels
    assert np.allclose(table.starts, [level.sigma for level in levels], rtol=1e-8, atol=1e-12)
    kept = table.starts[1:] * levels[0].alpha / levels[0].sigma
    signal = [level.alpha for level in levels[1:]]
    assert np.allclose(kept + table.weights.sum(1), signal, rtol=1e-8, atol=1e-8)
    assert np.all(np.triu(table.weights, 1) == 0)
    x, denoiser = made.levels[0].sigma * NORMAL, mixture(made.process)
    again = table.plan("again", found="here")
    assert (again.run(denoiser, x) - made.run(denoiser, x)).abs().max() < 1e-10
    assert Plan.from_json(again.to_json()) == again


@pytest.mark.parametrize("family", PROCESSES)
def test_a_call_that_nothing_reads_changes_nothing_and_lies_on_the_path(family):
    made = traced("unipc", PROCESSES[family], 4)
    table = table_of(made)
    wider = table.widened()
    assert wider.calls == 5 and len(wider.grid.levels) == 6
    log_snrs, before = wider.log_snrs, table.log_snrs
    (k,) = np.flatnonzero(~np.isin(log_snrs, before))
    assert log_snrs[k] == pytest.approx(before[k - 1 : k + 1].mean())
    assert np.diff(before)[k - 1] == np.diff(before).max()
    x, denoiser = NORMAL, mixture(made.process)
    ends = [t.point(t.calls, x, t.estimates(denoiser, x)) for t in (table, wider, wider.widened())]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    level = wider.grid.levels[k]
    assert wider.starts[k] == level.sigma
    assert wider.weights[k - 1].sum() == pytest.approx(level.alpha)
    found = wider.estimates(denoiser, x)
    exact = mixture(made.process)(wider.point(k, x, found), level)
    assert torch.equal(found[k], exact)


@pytest.mark.parametrize("name", ["euler_ancestral", "heun", "ttm"])
def test_what_is_no_table_is_refused_with_the_remedy(name):
    with pytest.raises(InvalidInputError, match=r"cannot be tuned: .*take unipc"):
        table_of(traced(name, fs.process.vp_linear()))


def test_jump_costs_are_those_of_steps_taken_one_by_one():
    process = PROCESSES["flow"]
    grid = fs.schedulers.make_grid("trailing", process, 6)
    followed = path(mixture(process), NORMAL, grid)
    costs = jump_costs(followed)
    for i, j in itertools.product(range(7), range(7)):
        if i >= j:
            assert np.isinf(costs[i, j])
            continue
        t, s = grid.levels[i], grid.levels[j]
        step = exponential_step(followed.points[i], followed.estimates[i], t, s)
        missed = (step - followed.points[j]) / s.alpha
        assert costs[i, j] == pytest.approx(float(missed.square().mean().sqrt()), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_the_cheapest_route_is_that_of_trying_all(steps):
    costs = np.random.default_rng(steps).uniform(size=(8, 8))
    costs[np.tril_indices(8)] = np.inf

    def total(route: tuple[int, ...]) -> float:
        return sum(costs[i, j] for i, j in itertools.pairwise(route))

    routes = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), steps - 1)]
    assert tuple(cheapest_route(costs, steps)) == min(routes, key=total)


def test_searched_levels_do_better_than_the_worst_usual_ones():
    process = fs.process.vp_linear()
    denoiser = mixture(process)
    noise = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def end(grid: fs.Grid, name: str = "ddim") -> torch.Tensor:
        made = fs.plan(name, grid)
        assert isinstance(made, Plan)
        return made.run(denoiser, grid.levels[0].sigma * noise)

    fine = fs.schedulers.make_grid("exponential", process, 32)
    followed = path(denoiser, NORMAL, fine)
    levels = searched_levels(followed, jump_costs(followed), 4, 1.0)
    assert len(levels) == 5 and levels[-1].is_clean and set(levels) <= set(fine.levels)
    truth = end(fs.schedulers.make_grid("exponential", process, 200), "unipc")
    found = float((end(fs.Grid(process, levels)) - truth).square().mean())
    usual = [
        float((end(fs.schedulers.make_grid(name, process, 4)) - truth).square().mean())
        for name in ("exponential", "karras", "trailing", "simple")
    ]
    assert found < max(usual) / 2
