"""AMED: with its plain numbers the log-midpoint method; learned numbers and predictors reach every step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep as fs
from exact_problems import PROCESSES, START, grid, measured_orders, mixture
from fewstep.errors import InvalidInputError
from fewstep.plan import EagerPlan, Plan

FRACTIONS, SCALES = [0.35, 0.6, 0.5, 0.8, 0.45], [1.02, 0.97, 1.0, 1.1, 0.9]


def amed_of_the_paper(levels: fs.Grid, x: Tensor) -> Tensor:
    """Equation 11 on tensors, in sigma = sigma / alpha."""
    denoiser = mixture(PROCESSES["edm"])
    ratios = levels.ratios
    for a, b, r, c in zip(ratios, ratios[1:], FRACTIONS, SCALES, strict=False):
        d = (x - denoiser(x, fs.Level(a, 1.0, a))) / a
        if b == 0:
            return x - a * d
        middle = b**r * a ** (1 - r)
        there = x + (middle - a) * d
        x = x + c * (b - a) * (there - denoiser(there, fs.Level(middle, 1.0, middle))) / middle
    return x


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_plain_numbers_make_it_dpm_2(process: fs.Process) -> None:
    for ratios in ([9.0, 3.0, 0.7, 0.0], grid(process, 6).ratios):
        levels = fs.Grid.from_ratios(process, ratios)
        amed, dpm_2 = fs.plan("amed", levels), fs.plan("dpm_2", levels)
        assert isinstance(amed, Plan)
        assert isinstance(dpm_2, Plan)
        x = levels.levels[0].alpha * START
        denoiser = mixture(process)
        torch.testing.assert_close(
            amed.run(denoiser, x), dpm_2.run(denoiser, x), rtol=1e-13, atol=1e-13
        )
        assert amed.calls == dpm_2.calls


def test_the_plain_numbers_have_second_order() -> None:
    orders = measured_orders("amed", {}, PROCESSES["vp"], (40, 80, 160))
    assert orders == pytest.approx([2.0, 2.0], abs=0.2)
    first = measured_orders("amed", {"fraction": 0.3}, PROCESSES["vp"], (80, 160, 320))
    assert first[-1] == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("end", [0.05, 0.0])
@pytest.mark.parametrize("by", ["numbers", "predictor"])
def test_learned_numbers_are_those_of_the_paper(by: str, end: float, process: fs.Process) -> None:
    levels = fs.Grid.from_ratios(process, [10.0, 4.0, 1.5, 0.6, 0.2, end])
    pairs = iter(zip(FRACTIONS, SCALES, strict=True))
    options: dict[str, Any] = {
        "numbers": {"fraction": FRACTIONS, "scale": SCALES},
        "predictor": {"predictor": lambda x, denoised, t, s: next(pairs)},
    }[by]
    plan = fs.plan("amed", levels, **options)
    assert isinstance(plan, EagerPlan if by == "predictor" else Plan)
    got = plan.run(mixture(process), levels.levels[0].alpha * START)
    wanted = amed_of_the_paper(levels, START)
    torch.testing.assert_close(got / levels.levels[-1].alpha, wanted, rtol=1e-12, atol=1e-12)


def test_a_predictor_sees_the_point_the_estimate_and_both_levels() -> None:
    process = PROCESSES["flow"]
    levels = fs.Grid.from_ratios(process, [math.inf, 4.0, 1.0, 0.3, 0.0])
    denoiser, seen = mixture(process), []

    def predictor(x: Tensor, denoised: Tensor, t: fs.Level, s: fs.Level) -> Tensor:
        torch.testing.assert_close(denoised, denoiser(x, t))
        seen.append((t, s))
        return torch.tensor([0.5, 1.0])

    got = fs.plan("amed", levels, predictor=predictor).run(denoiser, START)
    assert seen == list(
        levels.steps[1:-1]
    )  # there is no midpoint from pure noise or to clean data
    torch.testing.assert_close(got, fs.plan("dpm_2", levels).run(denoiser, START))


def test_a_scale_is_declared_and_the_numbers_are_saved_with_the_plan() -> None:
    levels = grid(PROCESSES["vp"], 5)
    plain = fs.plan("amed", levels, fraction=FRACTIONS)
    scaled = fs.plan("amed", levels, fraction="0.4", scale=SCALES)
    assert isinstance(plain, Plan)
    assert isinstance(scaled, Plan)
    assert (plain.inexact, scaled.inexact) == ((), ("noise",))
    assert scaled.options == {"predictor": None, "fraction": [0.4], "scale": SCALES}
    assert Plan.from_json(scaled.to_json()) == scaled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.5}, r"fraction=1.5 is not a list of numbers in 0..1"),
        ({"fraction": [0.5, "x"]}, "is not a list of numbers"),
        ({"fraction": []}, "is not a list of numbers"),
        ({"scale": [1.0, 1.0]}, "scale has 2 numbers for 5 steps; give one, or one for each"),
        ({"predictor": "amed.pkl"}, r"predictor='amed.pkl' is not a function \(default None\)"),
    ],
)
def test_bad_numbers_are_refused_when_the_plan_is_made(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        fs.plan("amed", grid(PROCESSES["vp"], 5), **options)


@pytest.mark.parametrize("answer", [0.5, (0.5,), (-0.1, 1.0), (0.5, math.nan), "ab", None])
def test_a_bad_answer_of_the_predictor_is_named(answer: Any) -> None:
    levels = grid(PROCESSES["vp"], 3)
    plan = fs.plan("amed", levels, predictor=lambda *_: answer)
    with pytest.raises(InvalidInputError, match="the predictor gave .* a fraction in 0..1"):
        plan.run(mixture(PROCESSES["vp"]), START)


def test_pictures_can_be_made_with_a_predictor_and_record_their_calls() -> None:
    process = PROCESSES["vp"]
    denoiser = fs.exact.GaussianMixture(torch.zeros(2, 3), 0.5, process=process)
    asked = itertools.count()

    def predictor(x: Tensor, denoised: Tensor, t: fs.Level, s: fs.Level) -> tuple[float, float]:
        next(asked)
        return 0.5, 1.0

    options = {"predictor": predictor}
    made = fs.sample(denoiser, n=2, steps=4, sampler="amed", sampler_options=options)
    assert made.record["network_calls"] == [7, 7]
    assert next(asked) == 2 * 3
    plain = fs.sample(denoiser, n=2, steps=4, sampler="amed")
    torch.testing.assert_close(made.images, plain.images, rtol=1e-5, atol=1e-5)
