"""Euler, Heun, Heun++, DPM2 and Restart against other implementations, in order and in law."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from exact_problems import PROCESSES, START, law_grid, measured_orders, mixture, weak_orders
from fewstep.plan import Draw, Plan
from peer_support import STEPS, Draws, assert_same, doubled, k_diffusion, ours, start

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EDM, FLOW = PROCESSES["edm"], PROCESSES["flow"]
RATIOS = [10.0, 6.0, 4.5, 2.0, 1.3, 0.5, 0.3, 0.06, 0.0]
TIMES = [1.0, 0.93, 0.8, 0.71, 0.5, 0.34, 0.3, 0.1, 0.0]


def plan(name: str, grid: fs.Grid, **options: Any) -> Plan:
    traced = fs.plan(name, grid, **options)
    assert isinstance(traced, Plan)
    return traced


def exact(x: Tensor, sigma: Tensor | float) -> Tensor:
    """The mixture's denoiser as k-diffusion calls it, with a sigma for each image."""
    ratio = float(sigma[0]) if isinstance(sigma, Tensor) else sigma
    return mixture(EDM)(x, fs.Level(ratio, 1.0, ratio))


def flow_exact(x: Tensor, time: float) -> Tensor:
    return mixture(FLOW)(x, fs.Level(time, 1 - time, time))


def sequence(seed: int = 5) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(START.shape, dtype=torch.float64, generator=generator)


def run_in_order(traced: Plan, process: fs.Process) -> Tensor:
    """Run on the mixture with noise in the order of the draws."""
    draws = sequence()
    x = traced.levels[0].alpha * START if traced.levels[0].alpha else START / START.std()
    return traced.run(mixture(process), x, lambda a, b: next(draws))


def flow_grid(times: list[float]) -> fs.Grid:
    return fs.Grid.from_times(FLOW, times)


# ---- against k-diffusion and diffusers -------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_deterministic_ones_are_those_of_k_diffusion(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matched: the peer draws noise for churn even where it adds none."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    grid = fs.Grid.from_ratios(EDM, RATIOS)
    sigmas = torch.tensor(RATIOS, dtype=torch.float64)
    wanted = getattr(k_diffusion(), f"sample_{name}")(exact, START, sigmas)
    torch.testing.assert_close(
        plan(name, grid).run(mixture(EDM), START), wanted, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 0.9)])
def test_dpm_2_ancestral_is_that_of_k_diffusion(eta: float, s_noise: float, process: str) -> None:
    levels = fs.Grid.from_ratios(PROCESSES[process], RATIOS)
    draws = Draws(levels, START.shape)
    traced = plan("dpm_2_ancestral", levels, eta=eta, s_noise=s_noise)
    got = traced.run(mixture(PROCESSES[process]), levels.levels[0].alpha * START, draws)
    wanted = k_diffusion().sample_dpm_2_ancestral(
        exact,
        START,
        torch.tensor(RATIOS, dtype=torch.float64),
        eta=eta,
        s_noise=s_noise,
        noise_sampler=lambda a, b: draws.next(),
    )
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def timeless(x: Tensor, t: Tensor) -> Tensor:
    """A network that sees no time: the peer rounds the times of inner levels otherwise than we do."""
    return torch.sin(1.3 * x)


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_dpm_2_is_that_of_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matched: the peer's state is x / alpha; its tables are made in float64."""
    schedulers = pytest.importorskip("diffusers", minversion="0.30").schedulers
    process = fs.process.vp_linear()
    peer = getattr(schedulers, name)(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    alpha = process.alpha(torch.arange(1000, dtype=torch.float64))
    peer.alphas_cumprod = alpha**2
    with monkeypatch.context() as patch:
        patch.setattr(np, "float32", np.float64)
        peer.set_timesteps(STEPS)
    ratios = list(dict.fromkeys(peer.sigmas.tolist()))
    grid = fs.Grid.from_ratios(process, ratios)
    draws = Draws(grid)
    x = start()
    got = ours(grid, name, x, draws, net=timeless)
    x, wanted = x / grid.levels[0].alpha, []
    if "Ancestral" in name:
        module = schedulers.scheduling_k_dpm_2_ancestral_discrete
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: draws.next())
    for t in peer.timesteps:
        point = peer.scale_model_input(x, t)
        wanted.append(point)
        x = peer.step(timeless(point, t), t, x).prev_sample
    assert_same(got, [*wanted, x])


def test_flow_heun_is_that_of_diffusers() -> None:
    """Matched: the levels. The network sees no time, since the peer's times are 1000 times ours."""
    schedulers = pytest.importorskip("diffusers", minversion="0.30").schedulers
    peer = schedulers.FlowMatchHeunDiscreteScheduler()
    peer.set_timesteps(STEPS)
    times = list(dict.fromkeys((peer.timesteps.double() / 1000).tolist()))
    twice = [times[0], *(t for t in times[1:] for _ in range(2)), 0.0]
    peer.sigmas = torch.tensor(twice, dtype=torch.float64)
    got = ours(flow_grid(times), "FlowMatchHeunDiscreteScheduler", start(), net=timeless)
    x, wanted = start(), []
    with doubled():
        for t in peer.timesteps:
            wanted.append(x)
            x = peer.step(timeless(x, t), t, x).prev_sample
    assert_same(got, [*wanted, x])


@pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (0.4, 1.0), (1.0, 1.0), (1.0, 1.1)])
def test_flow_euler_ancestral_is_that_of_diffusers(
    eta: float, s_noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matched: the levels. The peer adds 1e-12 to its divisors, and works in float32 where it can."""
    schedulers = pytest.importorskip("diffusers", minversion="0.36").schedulers
    peer = schedulers.LTXEulerAncestralRFScheduler(eta=eta, s_noise=s_noise)
    peer.set_timesteps(sigmas=TIMES)
    peer.sigmas = torch.tensor(TIMES, dtype=torch.float64)
    grid = flow_grid(TIMES)
    draws = Draws(grid)
    name = "LTXEulerAncestralRFScheduler"
    got = ours(grid, name, start(), draws, net=timeless, eta=eta, s_noise=s_noise)
    module = schedulers.scheduling_ltx_euler_ancestral_rf
    x, wanted = start(), []
    with doubled():
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: draws.next())
        for t in peer.timesteps[:-1]:
            wanted.append(x)
            x = peer.step(timeless(x, t), t, x).prev_sample
    assert_same(got, [*wanted, x])


# ---- against formulas written out on tensors, where no peer is installed ----------------------


def comfy_renoise(x: Tensor, s: float, down: float, z: Tensor) -> Tensor:
    """ComfyUI on flow models: scale the signal to the level s, and fill up the noise."""
    scale = (1 - s) / (1 - down)
    return scale * x + math.sqrt(s**2 - (scale * down) ** 2) * z


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_flow_dpm_2_ancestral_is_that_of_comfyui(eta: float) -> None:
    """In t as ComfyUI has it: midpoint in log t, slope `(x - D) / t`, the fresh noise rescaled."""
    draws, x = sequence(), START / START.std()
    for t, s in pairwise(TIMES):
        slope = (x - flow_exact(x, t)) / t
        down = s * (1 + (s / t - 1) * eta)
        if down > 0:
            middle = math.exp((math.log(t) + math.log(down)) / 2)
            inner = x + (middle - t) * slope
            slope = (inner - flow_exact(inner, middle)) / middle
        x = x + (down - t) * slope
        if s > 0:
            x = comfy_renoise(x, s, down, next(draws))
    got = run_in_order(plan("flow_dpm_2_ancestral", flow_grid(TIMES), eta=eta), FLOW)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


def test_flow_heun_is_heun_in_time() -> None:
    x = START / START.std()
    for t, s in pairwise(TIMES):
        first = (x - flow_exact(x, t)) / t
        there = x + (s - t) * first
        second = (there - flow_exact(there, s)) / s if s > 0 else first
        x = x + (s - t) * (first + second) / 2
    got = run_in_order(plan("flow_heun", flow_grid(TIMES)), FLOW)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


def heunpp2_weights(sigmas: list[float], i: int) -> list[float]:
    """The weights of the slopes at step i, by the number of levels left."""
    left = len(sigmas) - 2 - i
    if left == 0:
        return [1.0]
    if left == 1:
        return [1 - sigmas[i + 1] / (2 * sigmas[0]), sigmas[i + 1] / (2 * sigmas[0])]
    b, c = sigmas[i + 1] / (3 * sigmas[0]), sigmas[i + 2] / (3 * sigmas[0])
    return [1 - b - c, b, c]


@pytest.mark.parametrize("churn", [0.0, 2.0])
@pytest.mark.parametrize("ratios", [RATIOS, RATIOS[:-1], RATIOS[-3:]], ids=len)
def test_heunpp2_is_its_published_formula(ratios: list[float], churn: float) -> None:
    draws, x = sequence(), START.clone()
    gamma = min(churn / (len(ratios) - 1), 2**0.5 - 1)
    for i, (t, s) in enumerate(pairwise(ratios)):
        top = t * (1 + gamma)
        if gamma:
            x = x + (top**2 - t**2) ** 0.5 * next(draws)
        slopes, point, at = [], x, top
        weights = heunpp2_weights(ratios, i)
        for j in range(len(weights)):
            slopes.append((point - exact(point, at)) / at)
            ahead = ratios[min(i + 1 + j, len(ratios) - 1)]
            point, at = point + (ahead - at) * slopes[-1], ahead
        x = x + (s - top) * sum(w * d for w, d in zip(weights, slopes, strict=True))
    grid = fs.Grid.from_ratios(EDM, ratios)
    got = run_in_order(plan("heunpp2", grid, s_churn=churn), EDM)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


def karras(count: int, low: float, high: float) -> list[float]:
    ramp = np.linspace(0, 1, count)
    return ((high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7).tolist()


def a1111_steps(sigmas: list[float]) -> list[tuple[float, float]]:
    """The list of (old sigma, new sigma) that the restart sampler of A1111 runs through; sigmas end with 0."""
    steps = len(sigmas) - 1
    if steps < 20:
        return list(pairwise(sigmas))
    again, times = (steps // 4, 2) if steps >= 36 else (9, 1)
    sigmas = [*karras(steps - again * times, sigmas[-2], sigmas[0]), 0.0]
    low = int(np.argmin(np.abs(np.array(sigmas) - 0.1)))
    high = int(np.argmin(np.abs(np.array(sigmas) - 2.0)))
    pairs = list(pairwise(sigmas))
    inner = list(pairwise(karras(again + 1, sigmas[low], sigmas[high])))
    return pairs[:low] + times * inner + pairs[low:]


@pytest.mark.parametrize("steps", [12, 20, 30, 36, 50])
def test_restart_is_that_of_a1111(steps: int) -> None:
    """Heun on the list of steps; where it goes up, noise of the difference in variance is added first."""
    sigmas = [*np.geomspace(20.0, 0.03, steps).tolist(), 0.0]
    todo = a1111_steps(sigmas)
    assert len(todo) == steps
    draws, x, last = sequence(), START.clone(), sigmas[0]
    for old, new in todo:
        if old > last:
            x = x + (old**2 - last**2) ** 0.5 * next(draws)
        slope = (x - exact(x, old)) / old
        there = x + (new - old) * slope
        if new > 0:
            slope = (slope + (there - exact(there, new)) / new) / 2
        x, last = x + (new - old) * slope, new
    got = run_in_order(plan("restart", fs.Grid.from_ratios(EDM, sigmas)), EDM)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


def test_restarts_are_independent_and_cost_no_more_calls() -> None:
    grid = fs.Grid.from_ratios(EDM, [*np.geomspace(20.0, 0.03, 30).tolist(), 0.0])
    for restarts, share in ((1, 0.5), (3, 0.2), (4, 0.15)):
        traced = plan("restart", grid, restarts=restarts, share=share)
        draws = [d for d in traced.instructions if isinstance(d, Draw)]
        assert len(draws) == len({d.lap for d in draws}) == restarts
        assert len({(d.start, d.end) for d in draws}) == 1
        assert traced.calls == 2 * 30 - 1
    assert plan("restart", grid, s_noise=1.1).inexact == ("noise",)


def test_where_there_is_no_room_for_a_restart_there_is_none() -> None:
    for ratios in ([3.0, 0.0], [3.0, 1.0, 0.0], [math.inf, 2.0, 0.0], np.linspace(50, 20, 30)):
        grid = fs.Grid.from_ratios(FLOW, ratios)
        traced = plan("restart", grid, restarts=2)
        assert traced.draws == 0
        assert traced.calls == plan("heun", grid).calls


# ---- identities ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "relative"),
    [
        ("dpm_2_ancestral", {"eta": 0.0}, "dpm_2"),
        ("flow_dpm_2_ancestral", {"eta": 0.0}, "flow_dpm_2"),
        ("flow_euler_ancestral", {"eta": 0.0}, "euler"),
        ("dpm_2", {}, "dpm_solver_2"),
    ],
)
@pytest.mark.parametrize("process", PROCESSES)
def test_with_the_noise_off_it_is_its_relative(
    name: str, options: dict[str, Any], relative: str, process: str
) -> None:
    grid = fs.Grid.from_ratios(PROCESSES[process], RATIOS)
    one, other = (
        run_in_order(traced, PROCESSES[process])
        for traced in (plan(name, grid, **options), plan(relative, grid))
    )
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_all_the_noise_is_fresh_at_the_largest_eta() -> None:
    """Then every step starts from the estimate of x_0 alone, whatever eta counts in."""
    grid = fs.Grid.from_ratios(FLOW, [10.0, 2.0, 0.5, 0.1, 0.0])
    draws, x = sequence(), grid.levels[0].alpha * START
    for t, s in grid.steps:
        x = s.alpha * mixture(FLOW)(x, t)
        if not s.is_clean:
            x = x + s.sigma * next(draws)
    for name in ("flow_euler_ancestral", "dpm_2_ancestral"):
        got = run_in_order(plan(name, grid, eta=10.0), FLOW)
        torch.testing.assert_close(got, x, rtol=1e-11, atol=1e-11)


# ---- order ------------------------------------------------------------------------------------

DETERMINISTIC = [("heun", 2), ("flow_heun", 2), ("dpm_2", 2), ("flow_dpm_2", 2), ("heunpp2", 1)]
STOCHASTIC = [
    ("dpm_2_ancestral", 2),
    ("flow_dpm_2_ancestral", 2),
    ("flow_euler_ancestral", 1),
    ("restart", 2),
]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("name", "order"), DETERMINISTIC)
def test_order(name: str, order: int, process: str) -> None:
    measured = measured_orders(name, {}, PROCESSES[process], (80, 160))
    assert measured[-1] == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("name", "order"), STOCHASTIC)
def test_weak_order(name: str, order: int) -> None:
    measured = weak_orders(name, {}, FLOW, (80, 320))
    assert measured[-1] == pytest.approx(order, abs=0.2)


def test_more_restarts_remove_more_of_an_error_made_before() -> None:
    """Restart contracts: a disturbed start matters less, the more restarts there are."""
    grid = law_grid(EDM, 60)
    denoiser: Callable[..., Tensor] = fs.exact.GaussianMixture(
        torch.tensor([[0.7]], dtype=torch.float64), 0.5, process=EDM
    )
    effects = []
    for restarts in (1, 2, 4):
        traced = plan("restart", grid, restarts=restarts, share=0.15)
        noise = fs.Noise([0], (1,), dtype=torch.float64)
        ends = [traced.run(denoiser, torch.full((1, 1), x).double(), noise) for x in (40.0, 42.0)]
        effects.append(float((ends[1] - ends[0]).abs()))
    assert effects == sorted(effects, reverse=True)
    assert effects[2] < 0.1 * effects[0]
