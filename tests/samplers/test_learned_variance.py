"""DDPM with the variance that a network has learnt: its two ends, diffusers' own, and the best one on normal data."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.denoisers.exact import GaussianMixture
from fewstep.errors import InvalidInputError
from fewstep.process import Level, forward_kernel, posterior

PROCESS = fs.process.vp_linear()
STD = 0.3


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def denoiser(share_of: Callable[[Tensor, Tensor], Tensor], **options: str) -> fs.Denoiser:
    """Normal data of width STD, with a share of the variance for each pixel, as noise prediction."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        level = PROCESS.level(float(t[0]))
        variance = (level.alpha * STD) ** 2 + level.sigma**2
        return torch.cat([level.sigma * x / variance, 2 * share_of(x, t) - 1], 1)

    return fs.Denoiser(network, PROCESS, **options)


def draws(shape: tuple[int, ...]) -> Callable[[Level, Level], Tensor]:
    generator = random(5)
    return lambda start, end: torch.randn(shape, generator=generator, dtype=torch.float64)


def run(name: str, model: fs.Denoiser, **options: str) -> Tensor:
    """Ten steps on the table's entries 900, 800... 0."""
    shape = (3, 2, 4, 4)
    start = torch.randn(shape, generator=random(1), dtype=torch.float64)
    grid = fs.schedulers.leading(PROCESS, 10)
    return fs.plan(name, grid, **options).run(model, start, draws(shape))


@pytest.mark.parametrize(("share", "variance"), [(0.0, "posterior"), (1.0, "large")])
def test_the_ends_are_the_two_variances_of_ddpm(share, variance):
    model = denoiser(lambda x, t: torch.full_like(x, share))
    torch.testing.assert_close(
        run("ddpm_learned", model), run("ddpm", model, variance=variance), rtol=1e-10, atol=1e-12
    )


def test_against_diffusers():
    """Their scheduler, given the same network outputs and the same draws."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        beta_schedule="linear",
        variance_type="learned_range",
        timestep_spacing="leading",
        clip_sample=False,
    )
    theirs.set_timesteps(10)
    model = denoiser(lambda x, t: torch.sigmoid(3 * x.roll(1, 3)))
    shape = (3, 2, 4, 4)
    x, noise = torch.randn(shape, generator=random(1), dtype=torch.float64), draws(shape)
    place = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    with mock.patch(place, lambda *_, **__: noise(PROCESS.clean, PROCESS.clean)):
        for t in theirs.timesteps:
            output = model.network(x, t.double().expand(len(x)))
            x = theirs.step(output, t, x).prev_sample
    # Their table is in float32.
    torch.testing.assert_close(run("ddpm_learned", model), x, rtol=1e-4, atol=1e-5)


def best_share(steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Where the variance of `q(x_s | x_t)` lies for normal data: the posterior's plus what x_t leaves open of x_0."""
    grid = fs.schedulers.trailing(PROCESS, steps)
    below = dict(grid.steps)

    def share_of(x: Tensor, t: Tensor) -> Tensor:
        level = PROCESS.level(float(t[0]))
        s = below[level]
        if s.is_clean:
            return torch.zeros_like(x)
        open_ = (level.sigma * STD) ** 2 / ((level.alpha * STD) ** 2 + level.sigma**2)
        q = posterior(level, s)
        best = math.log(q.std**2 + q.on_x0**2 * open_) / 2
        small, large = math.log(q.std), math.log(forward_kernel(s, level).std)
        return torch.full_like(x, (best - small) / (large - small))

    return share_of


def test_the_best_variance_keeps_the_width_of_normal_data_in_any_number_of_steps():
    """Short of clean data; with either variance of DDPM five steps miss it."""
    steps, shape = 5, (20000, 1, 1, 1)
    model = denoiser(best_share(steps))
    levels = fs.schedulers.trailing(PROCESS, steps).levels[:-1]
    grid = fs.Grid(PROCESS, levels)
    last = levels[-1]
    width = math.hypot(last.alpha * STD, last.sigma)

    def off(name: str, **options: str) -> float:
        x = levels[0].sigma * torch.randn(shape, generator=random(1), dtype=torch.float64)
        return float(fs.plan(name, grid, **options).run(model, x, draws(shape)).std()) / width - 1

    assert abs(off("ddpm_learned")) < 0.015
    assert off("ddpm") < -0.04
    assert off("ddpm", variance="large") > 0.04


def test_guidance_pushes_the_estimate_and_keeps_the_variance_of_the_condition():
    asked = []

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        asked.append(len(x))
        own = labels.to(x).view(-1, 1, 1, 1)
        return torch.cat([0.1 * own * x, (own / 10).expand_as(x)], 1)

    given = fs.Denoiser(network, PROCESS, conditions={"labels": torch.tensor([4, 6])})
    guided = fs.ClassifierFree(given, 3.0, null={"labels": 0})
    x, level = torch.ones(2, 1, 2, 2, dtype=torch.float64), PROCESS.level(500.0)
    estimate, share = guided.variance_pair(x, level)
    assert asked == [4]
    torch.testing.assert_close(estimate, guided(x, level))
    assert share[:, 0, 0, 0].tolist() == pytest.approx([0.7, 0.8])
    clipped, same = fs.Clipped(guided, -0.1, 0.1).variance_pair(x, level)
    assert clipped.abs().max() <= 0.1 and torch.equal(same, share)
    weak = fs.AutoGuided(given, given.with_conditions(labels=torch.tensor([0, 0])), 3.0)
    both = weak.variance_pair(x, level)
    torch.testing.assert_close(both, (estimate, share))


@pytest.mark.parametrize(
    "model",
    [
        GaussianMixture(torch.zeros(1, 1, 2, 2), 0.3, process=PROCESS),
        fs.Denoiser(lambda x, t: torch.zeros_like(x), PROCESS),
        lambda x, level: x,
    ],
    ids=["exact", "network", "function"],
)
def test_a_model_without_a_variance_is_refused(model):
    plan = fs.plan("ddpm_learned", fs.schedulers.trailing(PROCESS, 3))
    with pytest.raises(InvalidInputError, match="train with --learned-variance, or take"):
        plan.run(model, torch.zeros(1, 1, 2, 2), draws((1, 1, 2, 2)))


def test_a_variance_that_is_not_finite_is_named():
    model = denoiser(lambda x, t: torch.full_like(x, math.nan))
    with pytest.raises(fs.errors.NonFiniteError, match="call 1"):
        run("ddpm_learned", model)


def test_pictures_of_a_batch_are_those_made_alone():
    model = denoiser(lambda x, t: torch.sigmoid(x))
    options = {"shape": (2, 4, 4), "sampler": "ddpm_learned", "steps": 5}
    asked = []
    together = fs.sample(model, n=3, **options, on_step=lambda step: asked.append(len(step.x)))
    assert asked == [3] * 5  # one batch, unlike a sampler that chooses its steps
    assert together.record["network_calls"] == [5, 5, 5]
    alone = [fs.sample(model, seed=k, **options).images for k in range(3)]
    torch.testing.assert_close(together.images, torch.cat(alone))
