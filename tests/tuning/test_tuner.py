"""Tuning: its gains, its guard, and what it does when something is amiss."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.errors import InvalidInputError
from fewstep.plan import Plan
from fewstep.tuned import OPTION, mismatches
from fewstep.tuning import Stage, Tuning, tune
from fewstep.tuning.losses import pixels, pseudo_huber
from tiny_model import tiny_model

SMALL: dict[str, Any] = {"images": 64, "held_out": 64, "iterations": 60, "batch_size": 64}


def problem(process: fs.Process) -> fs.exact.GaussianMixture:
    centres = torch.tensor([[-1.0, 0.3], [0.8, -0.5], [0.2, 1.1]])
    return fs.exact.GaussianMixture(centres, torch.tensor([0.1, 0.2, 0.15]), process=process)


@pytest.mark.parametrize("process", [fs.process.vp_linear(), fs.process.edm(), fs.process.flow()])
def test_tuning_gains_on_noise_that_it_never_saw(process):
    model, stages = problem(process), []
    tuned = tune(model, 3, **SMALL, on_stage=stages.append)
    assert tuned.method == "learn" and tuned.plan.calls == 3
    assert tuned.start_error == min(tuned.untuned.values())
    assert stages[-1].name == "learning, last" and stages[-1].best is not None
    noise = fs.Noise(range(9_000, 9_200), (2,)).initial()

    def end(made: Any) -> Tensor:
        return made.run(model, made.levels[0].sigma * noise)

    truth = end(fs.plan("unipc", fs.schedulers.make_grid("exponential", process, 150)))
    sampler, scheduler = tuned.start.split("/")
    start = end(fs.plan(sampler, fs.schedulers.make_grid(scheduler, process, 3)))
    before, after = ((x - truth).square().mean().sqrt() for x in (start, end(tuned.plan)))
    assert before > 1.6 * after


def test_the_plan_says_what_it_was_tuned_for_and_survives_json():
    tuned = fs.tune(problem(fs.process.vp_linear()), 3, method="search", images=16, held_out=16)
    facts = tuned.plan.options[OPTION]
    assert facts["error"] == tuned.error <= tuned.start_error == facts["start_error"]
    assert (facts["model"], facts["guidance"]) == ("GaussianMixture", 1.0)
    assert (facts["method"], facts["start"]) == (tuned.method, tuned.start)
    assert Plan.from_json(tuned.plan.to_json()) == tuned.plan
    assert not list(mismatches(tuned.plan, "GaussianMixture", 1.0))
    assert len(list(mismatches(tuned.plan, "other", 2.0))) == 2


@pytest.mark.parametrize("name", ["learn", "search"])
def test_it_is_never_worse_than_the_start(name):
    """With one picture to fit on, learning fits that picture; the held-out ones tell."""
    few = {"images": 1, "held_out": 64, "iterations": 40}
    tuned = tune(problem(fs.process.vp_linear()), 4, **few, method=name)
    assert tuned.error <= tuned.start_error


def test_it_goes_on_from_an_earlier_result():
    model = problem(fs.process.vp_linear())
    first = tune(model, 3, **SMALL)
    again = tune(model, 3, **{**SMALL, "iterations": 1}, start=first.plan)
    assert again.error <= first.error and again.method in ("given", "learn")
    assert (again.start, again.start_error) == (first.start, first.start_error)
    with pytest.raises(InvalidInputError, match="has 3 calls on .* must have 2 or fewer"):
        tune(model, 2, start=first.plan)


def test_a_plan_of_fewer_calls_is_a_start_that_it_is_never_worse_than():
    model = problem(fs.process.vp_linear())
    first = tune(model, 3, **SMALL)
    wider = tune(model, 4, **{**SMALL, "iterations": 1}, start=first.plan)
    assert wider.plan.calls == 4
    assert wider.error <= first.error


class Network(torch.nn.Module):
    """The flow of data N(0, 1/4) with a bend in it, as a network that predicts data."""

    def __init__(self, gradients: bool = True) -> None:
        super().__init__()
        self.gradients = gradients

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            return torch.tanh(2 * x) / (1 + t.view(-1, *(1,) * (x.ndim - 1)) / 200)


def test_a_network_without_gradients_is_learned_for_like_any_other():
    process = fs.process.vp_linear()
    few: dict[str, Any] = {"shape": (1, 2, 2), "images": 8, "held_out": 8, "iterations": 4}
    found = [
        tune(fs.Denoiser(Network(gradients), process, "data"), 3, **few)
        for gradients in (True, False)
    ]
    assert found[0].plan == found[1].plan
    assert found[0].method == "learn" and not found[0].notes


def test_a_denoiser_that_remembers_earlier_calls_is_searched_and_the_result_says_so():
    model = problem(fs.process.vp_linear())
    weak = fs.exact.GaussianMixture(torch.zeros(1, 2), 1.0, process=model.process)
    guided = fs.AutoGuided(model, weak, 2.0, projection=fs.Projection(momentum=-0.5))
    tuned = tune(guided, 3, images=8, held_out=8, iterations=1)
    assert any("searched, not learned" in note for note in tuned.notes)
    assert tuned.method != "learn"


def test_a_loss_that_breaks_down_ends_the_fit_with_the_last_good_plan():
    calls = itertools.count()

    def broken(x: Tensor, target: Tensor) -> Tensor:
        return pixels(x, target) * (float("nan") if next(calls) >= 120 else 1.0)

    model = problem(fs.process.vp_linear())
    tuned = tune(model, 3, **SMALL, loss=broken)
    assert next(calls) > 120
    assert any("ended early" in note and "not finite" in note for note in tuned.notes)
    assert tuned.method == "learn" and tuned.error < tuned.start_error


def test_the_loss_decides_what_is_near():
    """The pseudo-Huber loss gives up pictures that go another way; the mean square does not."""
    model = problem(fs.process.vp_linear())
    square, robust = (tune(model, 3, **SMALL, loss=loss) for loss in (pixels, pseudo_huber(0.02)))
    assert robust.error < square.error and robust.plan != square.plan


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


@pytest.mark.global_rng  # a network is made with weights of torch's
@pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "flow"])
def test_a_model_with_classes_is_tuned_for_a_guidance(predicts):
    model = tiny_model(predicts=predicts)
    few: dict[str, Any] = {"images": 3, "held_out": 3, "iterations": 1, "batch_size": 3}
    tuned = tune(model, 2, guidance=2.0, **few)
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
        ({"guidance": float("nan")}, "must be a finite number"),
        ({"guidance": 2.0}, "guidance=2 needs a model with classes"),
    ],
)
def test_bad_input_is_told_with_the_remedy(options, message):
    with pytest.raises(InvalidInputError, match=message):
        tune(problem(fs.process.vp_linear()), **{"steps": 3, **options})


def test_an_unknown_shape_is_asked_for():
    with pytest.raises(InvalidInputError, match="give shape="):
        tune(fs.Denoiser(Network(), fs.process.edm(), "data"), 3)
