"""Tuning: its gradients, its gains, its guard, and what it does when something is amiss."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from exact_problems import NORMAL, PROCESSES, mixture
from fewstep.errors import InvalidInputError
from fewstep.plan import Plan
from fewstep.tuned import OPTION, mismatches
from fewstep.tuning import Stage, Tuning, tune
from fewstep.tuning.fit import Base, Levels, TunedTable, fit, mean_square
from fewstep.tuning.table import table_of

SMALL: dict[str, Any] = {"images": 32, "held_out": 32, "iterations": 60}


def problem(process: fs.Process) -> fs.exact.GaussianMixture:
    centres = torch.tensor([[-1.0, 0.3], [0.8, -0.5], [0.2, 1.1]])
    return fs.exact.GaussianMixture(centres, torch.tensor([0.1, 0.2, 0.15]), process=process)


def start_of(process: fs.Process, steps: int = 4) -> TunedTable:
    made = fs.plan("unipc", fs.schedulers.make_grid("trailing", process, steps))
    assert isinstance(made, Plan)
    return TunedTable(Base(made.sampler, dict(made.options), process), table_of(made))


@pytest.mark.parametrize("family", PROCESSES)
def test_what_is_fitted_is_what_the_plan_does(family):
    tuned, denoiser = start_of(PROCESSES[family]), mixture(PROCESSES[family])
    with torch.no_grad():
        tuned.change.add_(0.1 * torch.sin(torch.arange(16.0)).view(4, 4))
        tuned.levels.increments.add_(0.3 * torch.cos(torch.arange(4.0)))
        result = tuned(denoiser, NORMAL)
    made = tuned.table().plan("tuned")
    planned = made.run(denoiser, made.levels[0].sigma * NORMAL)
    assert (result - planned).abs().max() < 1e-10


def test_levels_start_where_they_are_told_and_stay_in_order_whatever_the_increments():
    process = fs.process.vp_linear()
    told = [process.noisiest.log_snr, -2.0, 0.5, 3.0]
    levels = Levels(process, told)
    assert levels().tolist() == pytest.approx(told, abs=1e-9)
    with torch.no_grad():
        levels.increments.copy_(torch.tensor([0.0, 1e4, -1e4, 50.0]))
    assert levels.grid().levels[0].log_snr == pytest.approx(told[0])
    assert len(levels.grid().levels) == 5


@pytest.mark.parametrize("family", PROCESSES)
def test_gradients_are_those_of_finite_differences(family):
    tuned, denoiser = start_of(PROCESSES[family]), mixture(PROCESSES[family])
    target = torch.zeros_like(NORMAL)

    def loss() -> Tensor:
        return mean_square(tuned(denoiser, NORMAL), target)

    loss().backward()
    for parameter, step, tolerance in (
        (tuned.change, 1e-6, 1e-6),
        (tuned.levels.increments, 1e-4, 0.05),  # the levels' slope is one of nearby levels
    ):
        slopes = np.zeros(parameter.numel())
        with torch.no_grad():
            flat = parameter.view(-1)
            for k, sign in itertools.product(range(len(flat)), (1, -1)):
                flat[k] += sign * step
                slopes[k] += sign * float(loss()) / (2 * step)
                flat[k] -= sign * step
        assert parameter.grad is not None
        difference = np.abs(parameter.grad.flatten().numpy() - slopes).max()
        assert difference < tolerance * np.abs(slopes).max()


@pytest.mark.parametrize("process", [fs.process.vp_linear(), fs.process.edm(), fs.process.flow()])
def test_tuning_gains_on_noise_that_it_never_saw(process):
    model, stages = problem(process), []
    tuned = tune(model, 3, **SMALL, on_stage=stages.append)
    assert tuned.method == "learn" and tuned.plan.calls == 3
    assert tuned.start_error == min(tuned.untuned.values())
    assert [s.name for s in stages][-1] == "learning" and stages[-1].done == 1
    noise = fs.Noise(range(9_000, 9_200), (2,)).initial()

    def end(made: Any) -> Tensor:
        return made.run(model, made.levels[0].sigma * noise)

    truth = end(fs.plan("unipc", fs.schedulers.make_grid("exponential", process, 150)))
    sampler, scheduler = tuned.start.split("/")
    start = end(fs.plan(sampler, fs.schedulers.make_grid(scheduler, process, 3)))
    before, after = ((x - truth).square().mean().sqrt() for x in (start, end(tuned.plan)))
    assert before > 1.5 * after


def test_the_plan_says_what_it_was_tuned_for_and_survives_json():
    tuned = fs.tune(problem(fs.process.vp_linear()), 3, method="search", images=16, held_out=16)
    facts = tuned.plan.options[OPTION]
    assert facts["error"] == tuned.error <= tuned.start_error == facts["start_error"]
    assert (facts["model"], facts["guidance"]) == ("GaussianMixture", 1.0)
    assert (facts["method"], facts["start"]) == (tuned.method, tuned.start)
    assert Plan.from_json(tuned.plan.to_json()) == tuned.plan
    assert not list(mismatches(tuned.plan, "GaussianMixture", 1.0))
    assert len(list(mismatches(tuned.plan, "other", 2.0))) == 2


@pytest.mark.parametrize("rate", [1e3, 1e12])
def test_it_is_never_worse_than_the_start(rate):
    tuned = tune(problem(fs.process.vp_linear()), 3, **SMALL, rate=rate)
    assert tuned.error <= tuned.start_error


def test_it_goes_on_from_an_earlier_result():
    model = problem(fs.process.vp_linear())
    first = tune(model, 3, **SMALL)
    again = tune(model, 3, **{**SMALL, "iterations": 1}, start=first.plan)
    assert again.error <= first.error and again.method in ("given", "learn")
    assert (again.start, again.start_error) == (first.start, first.start_error)
    assert again.plan.options["base"] == first.plan.options["base"]
    with pytest.raises(InvalidInputError, match="has 3 calls on .* must have 4"):
        tune(model, 4, start=first.plan)


class Network(torch.nn.Module):
    """The flow of data N(0, 1/4) with a bend in it, as a network that predicts data."""

    def __init__(self, gradients: bool = True) -> None:
        super().__init__()
        self.gradients = gradients

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            return torch.tanh(2 * x) / (1 + t.view(-1, *(1,) * (x.ndim - 1)) / 200)


def test_a_network_without_gradients_is_searched_and_the_result_says_so():
    process = fs.process.vp_linear()
    for gradients in (True, False):
        denoiser = fs.Denoiser(Network(gradients), process, "data")
        guided = fs.Clipped(denoiser)
        tuned = tune(guided, 3, shape=(1, 2, 2), images=8, held_out=8, iterations=1)
        said = any("searched, not learned" in note for note in tuned.notes)
        assert said is not gradients
        assert not gradients or not tuned.notes


def test_a_loss_that_breaks_down_goes_back_and_lowers_the_rate_then_ends():
    calls = itertools.count()

    def broken(x: Tensor, target: Tensor) -> Tensor:
        return mean_square(x, target) * (float("nan") if next(calls) >= 25 else 1.0)

    model = problem(fs.process.vp_linear())
    tuned = tune(model, 3, **SMALL, loss=broken)
    assert next(calls) == 27
    lowered, ended = tuned.notes
    assert "at step 26" in lowered and "rate was lowered" in lowered
    assert "at step 1;" in ended and "learning ended" in ended
    assert tuned.method == "learn" and tuned.error < tuned.start_error


def test_a_step_that_is_not_finite_is_not_taken():
    tuned = start_of(fs.process.vp_linear())
    before = [p.clone() for p in tuned.parameters()]
    denoiser = mixture(fs.process.vp_linear())
    batches = iter([(denoiser, NORMAL, torch.full_like(NORMAL, float("nan")))])
    with pytest.raises(fs.errors.NonFiniteError, match="not finite at step 1"):
        next(fit(tuned, batches, 1))
    assert all(torch.equal(p, q) for p, q in zip(tuned.parameters(), before, strict=True))


def test_what_the_listener_raises_ends_it_and_the_best_so_far_is_known():
    latest: list[Tuning] = []

    def listen(stage: Stage) -> None:
        if stage.best is not None:
            latest.append(stage.best)
        if stage.name == "learning":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(problem(fs.process.vp_linear()), 3, **SMALL, on_stage=listen)
    assert latest[-1].error < latest[0].start_error


def test_a_model_with_classes_is_tuned_for_a_guidance():
    model = fs.load("digits")
    tuned = tune(model, 2, guidance=2.0, images=2, held_out=2, iterations=1, batch_size=2)
    assert tuned.error <= tuned.start_error
    assert tuned.plan.options[OPTION]["guidance"] == 2.0
    assert not tuned.notes


def test_own_conditions_are_taken_in_turn():
    seen = set()

    def network(x: Tensor, t: Tensor, *, style: Tensor) -> Tensor:
        assert len(style) == len(x)
        seen.update(style.tolist())
        return 0.5 * x + style.view(-1, 1)

    styles = torch.tensor([1.0, 2.0, 3.0])
    denoiser = fs.Denoiser(network, fs.process.edm(), "data").with_conditions(style=styles)
    tune(denoiser, 2, shape=(2,), images=4, held_out=4, iterations=1, batch_size=2)
    assert seen == {1.0, 2.0, 3.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps=1 must be a whole number of at least 2"),
        ({"steps": 2.5}, "steps=2.5 must be"),
        ({"images": 0}, "images=0 must be"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"method": "lern"}, "did you mean 'learn'"),
        ({"guidance": float("nan")}, "must be finite"),
        ({"guidance": 2.0}, "guidance=2 needs a model with classes"),
        ({"rate": 0.0}, "the rate above 0"),
    ],
)
def test_bad_input_is_told_with_the_remedy(options, message):
    with pytest.raises(InvalidInputError, match=message):
        tune(problem(fs.process.vp_linear()), **{"steps": 3, **options})


def test_an_unknown_shape_is_asked_for():
    with pytest.raises(InvalidInputError, match="give shape="):
        tune(fs.Denoiser(Network(), fs.process.edm(), "data"), 3)
