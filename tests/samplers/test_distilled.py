"""Samplers of distilled models: against diffusers at every network call, and as renewed noise in `x / alpha`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from exact_problems import PROCESSES, law, law_grid, mixture, true_law
from fewstep.plan import Plan
from fewstep.plan.rules import expand
from fewstep.samplers import SAMPLERS
from peer_support import STEPS, Draws, Peer, assert_same, doubled, network, ours, start

EDM = fs.process.edm()


def table(plan: Any) -> np.ndarray:
    assert isinstance(plan, Plan)
    rows = expand(plan.instructions, plan.result, plan.levels[-1])
    return np.array([[row.start, *row.outputs, *row.draws] for row in rows])


def grids() -> list[fs.Grid]:
    rough = [50.0, 7.0, 6.5, 2.0, 0.9, 0.3, 0.29]
    return [
        fs.Grid.from_ratios(EDM, rough),
        fs.Grid.from_ratios(fs.process.vp_linear(), [*rough, 0.0]),
        fs.Grid.from_ratios(fs.process.flow(), [math.inf, *rough, 0.0]),
    ]


# ---- against diffusers -----------------------------------------------------------------------


def test_lcm_is_that_of_diffusers() -> None:
    """Matched: the blend with the point near time 0, whose weights the peer has in float32 alone; no clipping."""
    peer = Peer("LCMScheduler", clip_sample=False)
    blend = peer.scheduler.get_scalings_for_boundary_condition_discrete
    peer.scheduler.get_scalings_for_boundary_condition_discrete = lambda t: blend(t.double())
    draws, x = Draws(peer.grid), start()
    wanted = peer.run(x, scaled=False, noise=draws.next)
    assert_same(ours(peer.grid, "LCMScheduler", x, draws), wanted)


def test_without_the_blend_lcm_is_nearly_that_of_diffusers() -> None:
    """The blend acts at the first few times alone, so other programs leave it out."""
    peer = Peer("LCMScheduler", clip_sample=False)
    draws, x = Draws(peer.grid), start()
    wanted = peer.run(x, scaled=False, noise=draws.next)[-1]
    got = ours(peer.grid, "lcm", x, draws)[-1]
    assert 1e-9 < float(((got - wanted) / wanted).abs().max()) < 1e-4


def test_lcm_on_flows_is_that_of_diffusers() -> None:
    """Matched: the peer's times are 1000 times ours, which the network undoes; its last noise is multiplied by 0."""
    from diffusers import schedulers as peers

    scheduler = peers.FlowMatchLCMScheduler()
    scheduler.set_timesteps(STEPS)
    process = fs.process.flow()
    times = (scheduler.timesteps.double() / 1000).tolist()
    grid = fs.Grid.from_times(process, times)
    scheduler.sigmas = torch.tensor([*times, 0.0], dtype=torch.float64)
    draws, x = Draws(grid), start()
    point, wanted = x, []
    with doubled(draws.next):
        for t in scheduler.timesteps:
            wanted.append(point)
            velocity = network(point, (t.double() / 1000).view(1))
            point = scheduler.step(velocity, t, point).prev_sample
    assert_same(ours(grid, "FlowMatchLCMScheduler", x, draws), [*wanted, point])


def test_trigflow_is_that_of_diffusers() -> None:
    """Matched: with data of standard deviation d the peer's `cos u x_0 + d sin u z` has sigma/alpha = d tan u."""
    from diffusers import schedulers as peers

    spread = 0.5
    scheduler = peers.SCMScheduler(sigma_data=spread)
    angles = torch.linspace(1.5, 0.0, 6, dtype=torch.float64)
    scheduler.set_timesteps(5, timesteps=angles, max_timesteps=None, intermediate_timesteps=None)
    scheduler.timesteps = angles
    ratios = [float(spread * torch.tan(u)) for u in angles[:-1]]
    grid = fs.Grid.from_ratios(fs.process.vp_continuous(), [*ratios, 0.0])
    draws, x = Draws(grid), spread * start()
    point, wanted = x, []
    with doubled(draws.next):
        for u in angles[:-1]:
            wanted.append(point / u.cos())
            output = torch.tanh(point / spread) * u
            point = scheduler.step(output, u, point).prev_sample
    angle = dict(zip(grid.levels, angles.tolist(), strict=True))

    def denoiser(x: Tensor, level: fs.Level) -> Tensor:
        u = angle[level]
        point = x / level.alpha * math.cos(u)
        return math.cos(u) * point - math.sin(u) * torch.tanh(point / spread) * u

    seen: list[Tensor] = []
    plan = fs.plan("trigflow", grid)
    first = grid.levels[0].alpha / math.cos(1.5) * x
    end = plan.run(denoiser, first, draws, lambda p: seen.append(p.x / p.level.alpha))
    assert_same([*seen, end], [*wanted, point])


def test_consistency_models_are_those_of_diffusers() -> None:
    """Matched: no clipping; the peer ends at the noise sigma_min that the model's estimate still has."""
    from diffusers import schedulers as peers

    scheduler = peers.CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(STEPS)
    ratios = [*np.geomspace(80.0, 0.01, STEPS).tolist(), 0.002]
    scheduler.sigmas = torch.tensor(ratios, dtype=torch.float64)
    grid = fs.Grid.from_ratios(EDM, ratios)
    draws, x = Draws(grid), 80.0 * start()
    point, wanted = x, []
    with doubled(draws.next):
        for t in scheduler.timesteps:
            wanted.append(point)
            output = torch.tanh(scheduler.scale_model_input(point, t))
            point = scheduler.step(output, t, point).prev_sample

    def denoiser(x: Tensor, level: fs.Level) -> Tensor:
        size, above = math.hypot(level.sigma, 0.5), level.sigma - 0.002
        return 0.25 / (above**2 + 0.25) * x + above * 0.5 / size * torch.tanh(x / size)

    seen: list[Tensor] = []
    end = fs.plan("consistency_multistep", grid).run(
        denoiser, x, draws, lambda p: seen.append(p.x)
    )
    assert_same([*seen, end], [*wanted, point])


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_tcd_is_that_of_diffusers(eta: float) -> None:
    """Matched: the peer ends at time 0, which is not clean, and rounds the time between down to a whole number."""
    peer = Peer("TCDScheduler", last=0.0)
    draws, x = Draws(peer.grid), start()
    step = peer.scheduler.step
    peer.scheduler.step = lambda *args: step(*args, eta=eta)
    wanted = peer.run(x, scaled=False, noise=draws.next)
    assert_same(ours(peer.grid, "TCDScheduler", x, draws, eta=eta), wanted)


# ---- identities ------------------------------------------------------------------------------


def test_other_names_are_the_same_sampler() -> None:
    lcm = SAMPLERS.find("lcm")
    for name in ("LCM", "lcm_custom_noise", "SCMScheduler", "FlowMatchLCMScheduler", "trigflow"):
        assert SAMPLERS.find(name) is lcm
    assert SAMPLERS.find("consistency_multistep").function is lcm.function


@pytest.mark.parametrize("grid", grids(), ids=str)
def test_a_consistency_model_that_reaches_clean_data_is_sampled_as_lcm(grid: fs.Grid) -> None:
    got = table(fs.plan("consistency_multistep", grid, sigma_min=0.0))
    np.testing.assert_array_equal(got, table(fs.plan("lcm", grid)))


@pytest.mark.parametrize("grid", grids(), ids=str)
def test_tcd_lies_between_ddim_and_lcm(grid: fs.Grid) -> None:
    lcm, ddim = table(fs.plan("lcm", grid)), table(fs.plan("ddim", grid))
    for middle in ("ratio", "variance"):
        np.testing.assert_allclose(
            table(fs.plan("tcd", grid, eta=1.0, middle=middle)), lcm, rtol=1e-12, atol=1e-14
        )
        assert fs.plan("tcd", grid, eta=0.0, middle=middle).draws == 0
        np.testing.assert_allclose(table(fs.plan("tcd", grid, eta=0.0, middle=middle)), ddim)


@pytest.mark.parametrize(
    ("middle", "kept"), [("ratio", 1 - 0.3), ("variance", math.sqrt(1 - 0.3**2))]
)
def test_the_level_between_is_a_share_of_the_next_ones_noise(middle: str, kept: float) -> None:
    """From the estimate D and the noise e: `D + (kept r_s) e + sqrt(r_s^2 - (kept r_s)^2) z`, in `x / alpha`."""
    t, s = 5.0, 2.0
    on_x = kept * s / t
    wanted = [on_x, 1 - on_x, s * math.sqrt(1 - kept**2)]
    for process in PROCESSES.values():
        grid = fs.Grid.from_ratios(process, [t, s])
        got = table(fs.plan("tcd", grid, middle=middle))[-1] / grid.levels[-1].alpha
        got[0] *= grid.levels[0].alpha
        assert got == pytest.approx(wanted, rel=1e-12)


def test_tcd_by_time_on_a_flow_halves_the_time() -> None:
    grid = fs.Grid.from_times(fs.process.flow(), [1.0, 0.5], end_clean=False)
    got = table(fs.plan("tcd", grid, eta=0.5, middle="time"))[-1]
    # Down to t = 1/4, where alpha = 3/4, then scaled to alpha = 1/2 and noised to t = 1/2.
    scale = 0.5 / 0.75
    noise = math.sqrt(0.5**2 - (scale * 0.25) ** 2)
    assert got == pytest.approx([scale * 0.25, scale * 0.75, noise], rel=1e-12)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_lcm_with_any_noise_is_the_estimate_plus_the_noise(process: fs.Process) -> None:
    """The recursion of the paper, with Laplace noise and a factor that rises along the run."""
    ratios = [20.0, 6.0, 2.5, 1.0, 0.3, 0.1, 0.0]
    grid, denoiser = fs.Grid.from_ratios(process, ratios), mixture(process)
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(6, 4, 2, dtype=torch.float64, generator=generator) - 0.5
    laplace = uniform.sign() * -torch.log1p(-2 * uniform.abs()) / math.sqrt(2)
    draws = dict(zip(grid.levels[:-1], laplace, strict=True))
    x = first = 20 * grid.levels[0].alpha * laplace[-1]
    for i, (t, s) in enumerate(grid.steps):
        x = s.alpha * denoiser(x, t) + (0.5 + i / 5) * s.sigma * draws[t]
    plan = fs.plan("lcm_custom_noise", grid, s_noise=0.5, s_noise_end=1.5)
    got = plan.run(denoiser, first, lambda a, b: draws[a])
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)
    assert "noise" in plan.inexact  # type: ignore[union-attr]


def test_a_constant_factor_stays_constant() -> None:
    grid = grids()[0]
    np.testing.assert_array_equal(
        table(fs.plan("lcm", grid, s_noise=0.7)),
        table(fs.plan("lcm", grid, s_noise=0.7, s_noise_end=0.7)),
    )


def test_levels_below_the_noise_of_the_estimate_get_no_noise() -> None:
    grid = fs.Grid.from_ratios(EDM, [1.0, 0.1, 0.05, 0.0])
    plan = fs.plan("lcm", grid, sigma_min=0.06)
    assert plan.draws == 1
    assert table(plan)[1, -1] == pytest.approx(math.sqrt(0.1**2 - 0.06**2))


@pytest.mark.parametrize(
    ("name", "options"),
    [("lcm", {}), ("consistency_multistep", {}), ("tcd", {"eta": 0.6}), ("ctm", {"eta": 0.9})],
)
def test_more_steps_do_not_bring_the_law_of_the_data(name: str, options: dict[str, Any]) -> None:
    """Noise that is renewed at every step leaves no order of convergence, as the metadata says."""
    assert SAMPLERS.find(name).order == 0
    errors = []
    for steps in (80, 320):
        plan = fs.plan(name, law_grid(EDM, steps), **options)
        assert isinstance(plan, Plan)
        errors.append(abs(law(plan)[1] - true_law(plan)[1]))
    assert errors[1] > 0.6 * errors[0] > 0.02
