"""Noise that is added and removed again at each step: against k-diffusion, and in law."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fewstep as fs
from exact_problems import PROCESSES, START, law_grid, mixture, weak_orders
from fewstep.plan import Denoise, Draw, Plan
from peer_support import Draws, k_diffusion

RATIOS = [10.0, 6.0, 4.5, 2.0, 1.3, 0.5, 0.3, 0.06, 0.0]
CHURNED = ("euler", "heun", "dpm_2", "heunpp2")
WINDOWS = [
    {"s_churn": 2.0},
    {"s_churn": 40.0},
    {"s_churn": 1.0, "s_tmin": 0.3, "s_tmax": 4.5, "s_noise": 1.1},
]


def grid(process: str, ratios: list[float] | None = None) -> fs.Grid:
    return fs.Grid.from_ratios(PROCESSES[process], ratios or RATIOS)


def plan(name: str, process: str = "edm", **options: float) -> Plan:
    traced = fs.plan(name, grid(process), **options)
    assert isinstance(traced, Plan)
    return traced


def end(name: str, process: str, draws: Draws, **options: float) -> Tensor:
    """The end of the path in the coordinates of alpha = 1."""
    traced = plan(name, process, **options)
    first, last = traced.levels[0], traced.levels[-1]
    denoiser = mixture(PROCESSES[process])
    levels = dict(zip(traced.levels, grid("edm").levels, strict=True))
    return traced.run(denoiser, first.alpha * START, lambda a, b: draws(levels[a], b)) / last.alpha


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_churn_is_that_of_k_diffusion(
    name: str, options: dict[str, float], process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matched: the peer draws at every step, also where it then adds none of it; so each step has its own draw."""
    peer, denoiser = k_diffusion(), mixture(PROCESSES["edm"])
    draws = Draws(grid("edm"), START.shape)
    got = end(name, process, draws, **options)
    monkeypatch.setattr(torch, "randn_like", lambda x: draws.next())

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        ratio = float(sigma[0])
        return denoiser(x, fs.Level(ratio, 1.0, ratio))

    sigmas = torch.tensor(RATIOS, dtype=torch.float64)
    wanted = getattr(peer, f"sample_{name}")(model, START, sigmas, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CHURNED)
def test_noise_is_added_inside_the_window_alone(name: str) -> None:
    """The network is called at `1 + gamma` times the ratio, gamma at most sqrt(2) - 1."""
    steps = len(RATIOS) - 1
    for churn, gamma in ((2.0, 2.0 / steps), (40.0, math.sqrt(2) - 1)):
        traced = plan(name, s_churn=churn, s_tmin=0.3, s_tmax=4.5)
        starts = [d.start.ratio for d in traced.instructions if isinstance(d, Draw)]
        assert starts == [4.5, 2.0, 1.3, 0.5, 0.3]
        called = [i.level.ratio for i in traced.instructions if isinstance(i, Denoise)]
        for ratio in starts:
            assert min(called, key=lambda r, at=(1 + gamma) * ratio: abs(r - at)) == pytest.approx(
                (1 + gamma) * ratio
            )


@pytest.mark.parametrize("name", CHURNED)
def test_raised_stretches_overlap_so_their_draws_are_of_different_laps(name: str) -> None:
    traced = plan(name, s_churn=8.0)
    draws = [d for d in traced.instructions if isinstance(d, Draw)]
    assert len({d.lap for d in draws}) == len(draws) == len(RATIOS) - 1
    assert all(d.lap > 0 for d in draws)


@pytest.mark.parametrize("name", CHURNED)
def test_without_churn_the_other_options_do_nothing(name: str) -> None:
    quiet = plan(name, s_churn=0.0, s_tmin=0.1, s_tmax=5.0, s_noise=1.5)
    assert quiet.draws == 0
    assert not quiet.inexact
    assert quiet.instructions == plan(name).instructions


@pytest.mark.parametrize("name", CHURNED)
def test_only_a_factor_on_the_noise_changes_the_noise_of_the_levels(name: str) -> None:
    assert plan(name, s_churn=8.0).inexact == ()
    assert plan(name, s_churn=8.0, s_noise=1.003).inexact == ("noise",)


def test_churn_so_small_that_its_stretch_has_no_noise_of_its_own_still_runs() -> None:
    traced = plan("heun", s_churn=1e-5)
    noise = fs.Noise(range(6), (2,), dtype=torch.float64)
    result = traced.run(mixture(PROCESSES["edm"]), START, noise)
    quiet = plan("heun").run(mixture(PROCESSES["edm"]), START)
    assert 0 < float((result - quiet).abs().max()) < 0.1


def test_pure_noise_is_not_raised() -> None:
    traced = fs.plan("euler", grid("flow", [math.inf, 3.0, 1.0, 0.0]), s_churn=1.0)
    assert isinstance(traced, Plan)
    starts = [d.start.ratio for d in traced.instructions if isinstance(d, Draw)]
    assert starts == [3.0, 1.0]


def test_presets_are_those_of_the_papers() -> None:
    options = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    assert plan("edm_stochastic_heun") == plan("heun", "edm", **options)
    assert plan("edm_heun") == plan("heun")


@pytest.mark.parametrize("process", ["edm", "flow"])
@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("heun", 2), ("dpm_2", 2), ("heunpp2", 1)]
)
def test_churn_keeps_the_order_in_law(name: str, order: int, process: str) -> None:
    """Small enough that gamma is nowhere cut short, which would make it another method on each grid."""
    measured = weak_orders(name, {"s_churn": 4.0}, PROCESSES[process], (100, 200))
    assert measured[-1] == pytest.approx(order, abs=0.2)


def test_churn_corrects_the_errors_of_earlier_steps() -> None:
    """What it is for: an error made at the start is forgotten, the more the larger the churn."""

    def reaction(churn: float) -> float:
        traced = fs.plan("heun", law_grid(PROCESSES["edm"], 40), s_churn=churn)
        noise = fs.Noise([0], (1,), dtype=torch.float64)
        denoiser = fs.exact.GaussianMixture(
            torch.tensor([[0.7]], dtype=torch.float64), 0.5, process=PROCESSES["edm"]
        )
        ends = [
            traced.run(denoiser, torch.full((1, 1), x, dtype=torch.float64), noise)
            for x in (10.0, 10.5)
        ]
        return float((ends[1] - ends[0]).abs())

    reactions = [reaction(churn) for churn in (0.0, 2.0, 8.0)]
    assert reactions == sorted(reactions, reverse=True)
    assert reactions[2] < 0.5 * reactions[0]
