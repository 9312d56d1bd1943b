"""The guided and the weak estimate at once: what guidance gives, and how both reach a sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.errors import InvalidInputError, NonFiniteError
from fewstep.plan import Denoise, EagerTape, Plan, Progress

VP = fs.process.vp_linear()
LEVEL = VP.level(500.0)
LABELS = torch.tensor([1, 2, 3, 1])


class Network:
    """Predicts x_0 as `sin(x) + 0.3 label cos(x)`, and keeps the sizes of its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.batches.append(len(x))
        return x.sin() + 0.3 * labels.to(x).view(-1, 1, 1, 1) * x.cos()


def by_hand(x: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Guided, weak and strong estimate of that network, the weak one with label 0."""
    strong, weak = x.sin() + 0.3 * LABELS.to(x).view(-1, 1, 1, 1) * x.cos(), x.sin()
    return weak + scale * (strong - weak), weak, strong


def classifier_free(
    network: Callable[..., Tensor], scale: float = 3.0, process: fs.Process = VP, **options: Any
) -> fs.ClassifierFree:
    bound = fs.Denoiser(network, process, "data", {"labels": LABELS})
    return fs.ClassifierFree(bound, scale, {"labels": 0}, **options)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def assert_pair(pair: tuple[Tensor, Tensor], guided: Tensor, weak: Tensor) -> None:
    torch.testing.assert_close(pair[0], guided, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pair[1], weak, rtol=1e-12, atol=1e-12)


# ---- the pair --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.6, 1.0, 7.5])
def test_classifier_free_gives_both_in_one_call(x: Tensor, scale: float) -> None:
    """At scale 1 too: there the guided estimate is the conditional one, and the weak one is still another."""
    network = Network()
    guided, weak, _ = by_hand(x, scale)
    denoiser = classifier_free(network, scale)
    assert_pair(denoiser.guided_pair(x, LEVEL), guided, weak)
    assert network.batches == [8]
    torch.testing.assert_close(denoiser(x, LEVEL), guided, rtol=1e-12, atol=1e-12)


def test_autoguidance_gives_the_weak_models_estimate(x: Tensor) -> None:
    strong, weak = (fs.Denoiser(lambda x, t, a=a: a * x, VP, "data") for a in (1.0, 0.25))
    assert_pair(fs.AutoGuided(strong, weak, 3.0).guided_pair(x, LEVEL), 2.5 * x, 0.25 * x)


@pytest.mark.parametrize(
    ("ratio", "acts"), [(0.5, False), (0.51, True), (2.0, True), (2.1, False)]
)
def test_outside_the_interval_both_are_the_denoisers_own(
    x: Tensor, ratio: float, acts: bool
) -> None:
    network = Network()
    level = VP.levels_at([ratio])[0]
    pair = classifier_free(network, interval=(0.5, 2.0)).guided_pair(x, level)
    guided, weak, strong = by_hand(x, 3.0)
    assert_pair(pair, *((guided, weak) if acts else (strong, strong)))
    assert network.batches == [8 if acts else 4]


def test_rescaling_and_projection_change_the_guided_estimate_alone(x: Tensor) -> None:
    guided, weak, strong = by_hand(x, 3.0)
    each, size = (1, 2, 3), (4, 1, 1, 1)

    rescaled = guided * (strong.std(each, correction=0) / guided.std(each, correction=0)).view(
        size
    )
    wanted = 0.7 * rescaled + 0.3 * guided
    assert_pair(classifier_free(Network(), rescale=0.7).guided_pair(x, LEVEL), wanted, weak)

    push = strong - weak
    along = ((push * strong).sum(each) / strong.square().sum(each)).view(size) * strong
    wanted = strong + 2.0 * (push - 0.6 * along)
    denoiser = classifier_free(Network(), projection=fs.Projection(parallel=0.4))
    assert_pair(denoiser.guided_pair(x, LEVEL), wanted, weak)


def test_momentum_lasts_for_one_run(x: Tensor) -> None:
    projection = fs.Projection(parallel=1.0, momentum=-0.5)
    denoiser = classifier_free(Network(), projection=projection)
    guided, weak, strong = by_hand(x, 3.0)
    run = denoiser.for_run()
    assert_pair(run.guided_pair(x, LEVEL), guided, weak)
    assert_pair(run.guided_pair(x, LEVEL), strong + 2.0 * 0.5 * (strong - weak), weak)
    assert_pair(denoiser.guided_pair(x, LEVEL), guided, weak)


@pytest.mark.parametrize(
    "limit",
    [
        lambda d: fs.Clipped(d, -0.4, 0.3),
        lambda d: fs.DynamicThreshold(d, 0.8),
        lambda d: fs.DynamicThreshold(fs.Clipped(d, -1.7, 1.9), 0.9),
    ],
)
def test_limits_around_guidance_limit_both(
    x: Tensor, limit: Callable[[fs.denoisers.BaseDenoiser], fs.denoisers.BaseDenoiser]
) -> None:
    guided, weak, _ = by_hand(x, 3.0)
    wanted = [
        limit(fs.Denoiser(lambda x, t, v=v: v, VP, "data"))(x, LEVEL) for v in (guided, weak)
    ]
    got = limit(classifier_free(Network())).guided_pair(x, LEVEL)
    assert_pair(got, wanted[0], wanted[1])
    assert not torch.equal(got[0], guided)


def test_guidance_around_limits_pushes_what_was_limited(x: Tensor) -> None:
    bound = fs.Denoiser(Network(), VP, "data", {"labels": LABELS})
    _, weak, strong = by_hand(x, 3.0)
    weak, strong = weak.clamp(-0.5, 0.5), strong.clamp(-0.5, 0.5)
    denoiser = fs.ClassifierFree(fs.Clipped(bound, -0.5, 0.5), 3.0, {"labels": 0})
    assert_pair(denoiser.guided_pair(x, LEVEL), weak + 3.0 * (strong - weak), weak)


# ---- through executor and tape ---------------------------------------------------------------


def mixed(tape: Any, grid: fs.Grid) -> Any:
    """Two calls whose pairs are told apart by their coefficients."""
    t, s, _ = grid.levels
    guided, weak = tape.denoise_pair(tape.start, t)
    x = s.alpha * (3.0 * guided - 2.0 * weak)
    again, weaker = tape.denoise_pair(x, s)
    tape.declare_inexact("noise")
    return 0.5 * again + 0.1 * weaker + 0.7 * guided - 0.3 * weak


@pytest.mark.parametrize("eager", [False, True])
def test_both_estimates_reach_their_places(x: Tensor, eager: bool) -> None:
    grid = fs.Grid.from_ratios(VP, [5.0, 1.0, 0.0])
    network, seen = Network(), []
    denoiser = classifier_free(network)
    if eager:
        tape = EagerTape("mixed", denoiser, x, None, seen.append)
        got = mixed(tape, grid)
        assert tape.calls == 2
    else:
        plan = fs.plan(mixed, grid)
        assert (plan.calls, plan.draws) == (2, 0)
        got = plan.run(denoiser, x, on_step=seen.append)
        assert Plan.from_json(plan.to_json()) == plan
        assert plan.run(denoiser, x.float()).dtype == torch.float32
    guided, weak, _ = by_hand(x, 3.0)
    between = grid.levels[1].alpha * (3.0 * guided - 2.0 * weak)
    again, weaker, _ = by_hand(between, 3.0)
    wanted = 0.5 * again + 0.1 * weaker + 0.7 * guided - 0.3 * weak
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    previews = [step for step in seen if isinstance(step, Progress)]
    torch.testing.assert_close(previews[0].denoised, guided, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(previews[1].x, between, rtol=1e-12, atol=1e-12)
    assert set(network.batches) == {8}


def test_each_estimate_counts_as_x0_for_the_signal_rule() -> None:
    grid = fs.Grid.from_ratios(VP, [5.0, 0.0])

    def sampler(share: float) -> Callable[..., Any]:
        def of(tape: Any, grid: fs.Grid) -> Any:
            guided, weak = tape.denoise_pair(tape.start, grid.levels[0])
            return 2.0 * guided + share * weak

        return of

    assert isinstance(fs.plan(sampler(-1.0), grid).instructions[0], Denoise)
    with pytest.raises(InvalidInputError, match="breaks the signal rule"):
        fs.plan(sampler(-0.9), grid)


def test_a_weak_estimate_that_is_not_finite_is_found(x: Tensor) -> None:
    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.where(labels.view(-1, 1, 1, 1) > 0, x, torch.nan)

    plan = fs.plan("euler_cfg_pp", fs.Grid.from_ratios(VP, [5.0, 1.0, 0.5]))
    with pytest.raises(NonFiniteError, match="holds a NaN or infinity|overflowed"):
        plan.run(classifier_free(network), x)


# ---- without guidance ------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda network: lambda x, level: x, "function"),
        (lambda network: fs.Denoiser(network, VP, "data", {"labels": LABELS}), "Denoiser"),
        (
            lambda network: fs.Clipped(fs.Denoiser(network, VP, "data", {"labels": LABELS})),
            "Denoiser",
        ),
        (
            lambda network: fs.exact.GaussianMixture(torch.zeros(1, 2, 3, 3), 1.0, process=VP),
            "GaussianMixture",
        ),
    ],
)
def test_a_denoiser_without_guidance_is_refused_with_the_remedy(
    x: Tensor, make: Callable[[Network], Any], name: str
) -> None:
    network = Network()
    plan = fs.plan("euler_cfg_pp", fs.schedulers.karras(VP, 4))
    with pytest.raises(InvalidInputError) as error:
        plan.run(make(network), x)
    message = one_line(error)
    assert f"{name} is not guided" in message
    assert "fewstep.ClassifierFree" in message and "guidance other than 1" in message
    assert network.batches == []


@pytest.mark.parametrize("clip", [False, True])
def test_the_front_door_refuses_likewise_and_runs_a_guided_model(clip: bool) -> None:
    network = Network()
    bound = fs.Denoiser(network, VP, "data", {"labels": torch.tensor([1, 2])})
    options: dict[str, Any] = {"shape": (2, 3, 3), "steps": 4, "clip": clip}
    with pytest.raises(InvalidInputError) as error:
        fs.sample(bound, n=2, sampler="dpmpp_2m_cfg_pp", guidance=1.0, **options)
    assert "Denoiser is not guided" in one_line(error)
    assert network.batches == []

    guided = fs.ClassifierFree(bound, 0.8, {"labels": 0})
    samples = fs.sample(guided, n=2, sampler="dpmpp_2m_cfg_pp", **options)
    assert samples.images.shape == (2, 2, 3, 3)
    assert samples.record["sampler"] == "dpmpp_2m_cfg_pp"
    assert len(network.batches) == 4 == samples.record["network_calls"]
    assert math.isfinite(float(samples.images.sum()))
