"""Solvers of the reverse SDE: against k-diffusion, diffusers and the published formulas, with the same noise."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import fewstep as fs
from exact_problems import (
    PROCESSES,
    law,
    law_grid,
    measured_orders,
    mixture,
    true_law,
    weak_orders,
)
from fewstep.plan import Draw
from fewstep.plan.rules import expand
from peer_support import doubled, k_diffusion

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SMOOTH = (np.linspace(20.0 ** (1 / 7), 0.05 ** (1 / 7), 11) ** 7).tolist()
ROUGH = [30.0, 12.0, 11.0, 4.0, 1.5, 1.3, 0.5, 0.2]
GRIDS = {"smooth": SMOOTH, "rough to clean": [*ROUGH, 0.0]}
START = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Model = Callable[[Tensor, float], Tensor]


class Path:
    """A noise source that keeps what it gave, so that another implementation can be given the same path."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(4)
        self.pieces: list[tuple[float, float, Tensor]] = []

    def __call__(self, start: fs.Level, end: fs.Level) -> Tensor:
        z = torch.randn(START.shape, dtype=torch.float64, generator=self.generator)
        self.pieces.append((start.ratio, end.ratio, z))
        return z

    def brownian(self, high: Any, low: Any) -> Tensor:
        """The same path as k-diffusion asks for it: Brownian in sigma/alpha, its increments scaled to size 1."""
        high, low = float(high), float(low)
        total, covered = torch.zeros_like(START), 0.0
        for a, b, z in self.pieces:
            if a <= high * (1 + 1e-9) and b >= low * (1 - 1e-9):
                total, covered = total + math.sqrt(a - b) * z, covered + a - b
        assert covered == pytest.approx(high - low, rel=1e-9)
        return total / math.sqrt(high - low)


def ours(
    name: str, ratios: list[float], process: fs.Process, **options: Any
) -> tuple[Tensor, Path]:
    """The end of the path in the coordinates of alpha = 1, and its noise."""
    grid, path = fs.Grid.from_ratios(process, ratios), Path()
    first, last = grid.levels[0], grid.levels[-1]
    x = fs.plan(name, grid, **options).run(mixture(process), first.sigma * START, path)
    return x / last.alpha, path


def model(process: fs.Process) -> Model:
    """The estimate in the coordinates of alpha = 1, where every other implementation works."""

    def denoise(x: Tensor, ratio: Any) -> Tensor:
        number = ratio.flatten()[0] if isinstance(ratio, Tensor) else ratio
        level = process.levels_at([float(number)])[0]
        return mixture(process)(level.alpha * x, level)

    return denoise


def assert_same(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- k-diffusion -----------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("ratios", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpmpp_2m_sde", {"solver_type": "midpoint"}),
        ("dpmpp_2m_sde", {"solver_type": "heun"}),
        ("dpmpp_3m_sde", {}),
        ("dpmpp_sde", {}),
        ("dpmpp_sde", {"r": 0.3}),
    ],
    ids=str,
)
def test_k_diffusion(
    name: str, options: dict[str, Any], eta: float, ratios: list[float], process: fs.Process
) -> None:
    """Matched: its state is x / alpha, and its noise comes from a path that is Brownian in sigma / alpha."""
    got, path = ours(name, ratios, process, eta=eta, s_noise=1.1, **options)
    peer = getattr(k_diffusion(), f"sample_{name}")
    noise = path.brownian if eta else lambda *_: torch.zeros_like(START)
    x, sigmas = ratios[0] * START, torch.tensor(ratios, dtype=torch.float64)
    wanted = peer(model(process), x, sigmas, eta=eta, s_noise=1.1, noise_sampler=noise, **options)
    assert_same(got, wanted)


# ---- diffusers -------------------------------------------------------------------------------


def diffusers_multistep(
    ratios: list[float], path: Path, algorithm: str, order: int, solver_type: str
) -> Tensor:
    """Its DPMSolverMultistepScheduler on our levels and noise, in float64, told the estimate of x_0.

    It lowers the order of the last step if its `final_sigmas_type` is zero; so it is told how the grid ends.
    """
    peers = pytest.importorskip("diffusers.schedulers")
    process = PROCESSES["vp"]
    scheduler = peers.DPMSolverMultistepScheduler(
        algorithm_type=algorithm,
        solver_order=order,
        solver_type=solver_type,
        prediction_type="sample",
        lower_order_final=False,
        final_sigmas_type="sigma_min" if ratios[-1] else "zero",
    )
    scheduler.set_timesteps(len(ratios) - 1)
    scheduler.sigmas = torch.tensor(ratios, dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(ratios) - 1, 0, -1)
    grid = fs.Grid.from_ratios(process, ratios)
    x = grid.levels[0].sigma * START
    draws = [z for _, _, z in path.pieces]
    with doubled():
        for k, (t, level) in enumerate(zip(scheduler.timesteps, grid.levels, strict=False)):
            z = draws[k] if k < len(draws) else torch.zeros_like(x)
            denoised = mixture(process)(x, level)
            x = scheduler.step(denoised, t, x, variance_noise=z).prev_sample
    return x / grid.levels[-1].alpha


@pytest.mark.parametrize("ratios", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_dpmpp_2m_sde_of_diffusers(solver_type: str, ratios: list[float]) -> None:
    """Matched: it has eta = 1 only."""
    got, path = ours("dpmpp_2m_sde", ratios, PROCESSES["vp"], solver_type=solver_type)
    assert_same(got, diffusers_multistep(ratios, path, "sde-dpmsolver++", 2, solver_type))


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
def test_sde_dpm_solver_of_diffusers(order: int, solver_type: str) -> None:
    """Matched: it has eta = 1 only, and refuses to end at clean data."""
    for ratios in (SMOOTH, ROUGH):
        options = {"order": order, "solver_type": solver_type}
        got, path = ours("sde_dpm_solver", ratios, PROCESSES["vp"], **options)
        assert_same(got, diffusers_multistep(ratios, path, "sde-dpmsolver", order, solver_type))


def three_m_with_a_weight(
    shift: float,
) -> Callable[[fs.Tape, fs.Grid], fs.Vector]:
    """DPM++ 3M SDE with eta = 1 as k-diffusion writes it, the weight of the second difference shifted by a number."""

    def sampler(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
        x, old = tape.start / grid.levels[0].alpha, []
        for t, s in grid.steps:
            old = [(t.log_snr, tape.denoise(t.alpha * x, t)), *old][:3]
            h = 2 * (s.log_snr - t.log_snr)
            (a, d0), *past = old
            x = math.exp(-h) * x - math.expm1(-h) * d0
            first = math.expm1(-h) / h + 1
            slopes = [(u - v) / (2 * (p - q) / h) for (p, u), (q, v) in pairwise([(a, d0), *past])]
            if len(slopes) == 1:
                x = x + first * slopes[0]
            elif slopes:
                r0, r1 = (2 * (p - q) / h for (p, _), (q, _) in pairwise(old))
                second = (slopes[0] - slopes[1]) / (r0 + r1)
                x = x + first * (slopes[0] + r0 * second) + (0.5 - first / h + shift) * second
            x = x + s.ratio * math.sqrt(-math.expm1(-h)) * tape.noise(t, s)
        return grid.levels[-1].alpha * x

    return sampler


def test_the_third_order_of_diffusers_has_a_wrong_sign() -> None:
    """Its sde-dpmsolver++ of order 3 subtracts 1/2 where it should add it: the weight is I_2 / 2 - 1, not I_2 / 2.

    So it is not equal to ours, which is k-diffusion's, and converges to the law with order 1 at best.
    """
    got, path = ours("dpmpp_3m_sde", SMOOTH, PROCESSES["vp"])
    grid = fs.Grid.from_ratios(PROCESSES["vp"], SMOOTH)
    wanted = diffusers_multistep(SMOOTH, path, "sde-dpmsolver++", 3, "heun")
    for shift, expected in ((0.0, got), (-1.0, wanted)):
        again = fs.plan(three_m_with_a_weight(shift), grid)
        draws = iter([z for _, _, z in path.pieces])
        x = again.run(
            mixture(grid.process),
            grid.levels[0].sigma * START,
            lambda a, b, draws=draws: next(draws),
        )
        assert_same(x / grid.levels[-1].alpha, expected)
    assert float((got - wanted).abs().max()) > 0.05
    errors = []
    for steps in (80, 160):
        plan = fs.plan(three_m_with_a_weight(-1.0), law_grid(PROCESSES["vp"], steps))
        errors.append(abs(law(plan)[1] - true_law(plan)[1]))
    assert math.log2(errors[0] / errors[1]) < 1.5
    ours_at_80 = fs.plan("dpmpp_3m_sde", law_grid(PROCESSES["vp"], 80))
    assert errors[0] > 10 * abs(law(ours_at_80)[1] - true_law(ours_at_80)[1])


@pytest.mark.parametrize("ratios", GRIDS.values(), ids=GRIDS)
def test_dpmpp_sde_of_diffusers(ratios: list[float]) -> None:
    """Matched: eta = 1, r = 1/2, a state of x / alpha, and each inner sigma listed twice; torchsde is not needed."""
    pytest.importorskip("diffusers")
    with mock.patch.dict(sys.modules, {"torchsde": mock.MagicMock()}):
        peers = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    got, path = ours("dpmpp_sde", ratios, PROCESSES["vp"])
    scheduler = peers.DPMSolverSDEScheduler()
    scheduler.set_timesteps(len(ratios) - 1)
    listed = [ratios[0], *(r for r in ratios[1:-1] for _ in "ab"), *ratios[-1:]]
    listed += [] if ratios[-1] == 0 else ratios[-1:]
    scheduler.sigmas = torch.tensor(listed, dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(listed) - 1, 0, -1)
    scheduler.noise_sampler = path.brownian
    x, denoise = ratios[0] * START, model(PROCESSES["vp"])
    for t in scheduler.timesteps:
        k = scheduler.step_index or 0
        sigma = listed[k] if scheduler.sample is None else float(scheduler.mid_point_sigma)
        noise = (x - denoise(x, sigma)) / sigma
        x = scheduler.step(noise, t, x).prev_sample
    assert_same(got, x)


# ---- formulas in another form ----------------------------------------------------------------


def phi_1(z: float) -> float:
    """`(e^z - 1) / z`."""
    return math.expm1(z) / z


def phi_2(z: float) -> float:
    """`(phi_1(z) - 1) / z`."""
    return (phi_1(z) - 1) / z


def seeds_of_the_paper(
    x: Tensor,
    ratios: list[float],
    denoise: Model,
    draws: list[Tensor],
    eta: float,
    nodes: list[float],
    half: bool,
) -> Tensor:
    """SEEDS with one or two stages in x / alpha, its noise an Ornstein-Uhlenbeck process in units of sigma / alpha."""
    left = iter(draws)
    for t, s in pairwise(ratios):
        d = denoise(x, t)
        if s == 0:
            return d
        h, w, at, found = math.log(t / s), torch.zeros_like(x), 0.0, []
        for c in [*nodes, 1.0]:
            if c > at and eta:
                gap = eta * h * (c - at)
                w = math.exp(-gap) * w + math.sqrt(1 - math.exp(-2 * gap)) * next(left)
            at, z, big = c, -(1 + eta) * c * h, t * math.exp(-c * h)
            point = math.exp(z) * x + (-z) * phi_1(z) * d + big * w
            if found:
                node, estimate = found[-1]
                slope = phi_1(z) / 2 if half else phi_2(z)
                point = point + (-z) * slope * c / node * (estimate - d)
            if c == 1.0 and len(found) == len(nodes):
                x = point
            else:
                found.append((c, denoise(point, big)))
    return x


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("ratios", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "options", "nodes", "half"),
    [
        ("seeds_2", {}, [0.5], True),
        ("seeds_2", {"r": 0.7, "solver_type": "phi_2"}, [0.7], False),
        ("seeds_3", {}, [1 / 3, 2 / 3], False),
        ("seeds_3", {"r_1": 0.4, "r_2": 1.0}, [0.4, 1.0], False),
        ("exp_heun_2_x0_sde", {}, [1.0], False),
    ],
    ids=str,
)
def test_seeds(
    name: str,
    options: dict[str, Any],
    nodes: list[float],
    half: bool,
    eta: float,
    ratios: list[float],
    process: fs.Process,
) -> None:
    got, path = ours(name, ratios, process, eta=eta, **options)
    draws = [z for _, _, z in path.pieces]
    x = ratios[0] * START
    assert_same(got, seeds_of_the_paper(x, ratios, model(process), draws, eta, nodes, half))
    if name == "exp_heun_2_x0_sde" and eta == 0.0:
        assert_same(got, ours("exp_heun_2_x0", ratios, process)[0])


def er_sde_of_the_paper(
    x: Tensor,
    ratios: list[float],
    denoise: Model,
    draws: list[Tensor],
    f: Callable[[float], float],
    stages: int,
    corrected: bool,
) -> Tensor:
    """ER-SDE-Solver with its divided differences and integrals, which scipy works out."""
    left, ds, slopes = iter(draws), [], []
    for i, (t, s) in enumerate(pairwise(ratios)):
        ds.append(denoise(x, t))
        if s == 0:
            return ds[-1]
        r = f(s) / f(t)
        x = r * x + (1 - r) * ds[i]
        if i > 0:
            slopes.append((ds[i] - ds[i - 1]) / (t - ratios[i - 1]))
        slope = slopes[-1] if slopes else None
        if i > 1 and stages > 2:
            bend = (slopes[-1] - slopes[-2]) / ((t - ratios[i - 2]) / 2)
            area = quad(lambda u, t=t: (u - t) / f(u), s, t, epsrel=1e-12)[0]
            x = x + ((s - t) ** 2 / 2 + f(s) * area) * bend
            if corrected:
                slope = slope + bend / 2 * (t - ratios[i - 1])
        if i > 0 and stages > 1:
            x = x + (s - t + f(s) * quad(lambda u: 1 / f(u), s, t, epsrel=1e-12)[0]) * slope
        variance = s**2 - (r * t) ** 2
        if variance > 1e-12 * s**2:
            x = x + math.sqrt(variance) * next(left)
    return x


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("ratios", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("noise_scaler", ["er_sde", "reverse_sde"])
@pytest.mark.parametrize(("stages", "corrected"), [(1, False), (2, False), (3, False), (3, True)])
def test_er_sde(
    stages: int,
    corrected: bool,
    noise_scaler: str,
    eta: float,
    ratios: list[float],
    process: fs.Process,
) -> None:
    def f(u: float) -> float:
        return (
            u ** (1 + eta) if noise_scaler == "reverse_sde" else u * (math.exp(u**0.3) + 10) ** eta
        )

    options = {"max_stage": stages, "noise_scaler": noise_scaler, "corrected": corrected}
    got, path = ours("er_sde", ratios, process, eta=eta, **options)
    draws = [z for _, _, z in path.pieces]
    x = ratios[0] * START
    wanted = er_sde_of_the_paper(x, ratios, model(process), draws, f, stages, corrected)
    assert_same(got, wanted)


@pytest.mark.parametrize("ratios", GRIDS.values(), ids=GRIDS)
def test_dynamic_eta_is_dpmpp_3m_sde_with_another_strength_at_each_step(
    ratios: list[float],
) -> None:
    """With `eta_max, eta_min` the strength is `eta_min + (eta_max - eta_min) (1 + cos(pi i / n)) / 2`."""
    got, path = ours("dpmpp_3m_sde_dynamic_eta", ratios, PROCESSES["flow"], eta=0.8, eta_fall=0.75)
    draws, denoise = iter([z for _, _, z in path.pieces]), model(PROCESSES["flow"])
    x, past, n = ratios[0] * START, [], len(ratios) - 1
    for i, (t, s) in enumerate(pairwise(ratios)):
        eta = 0.2 + 0.6 * (1 + math.cos(math.pi * i / n)) / 2
        past = [(t, denoise(x, t)), *past][:3]
        if s == 0:
            x = past[0][1]
            break
        h = math.log(t / s)
        big = (1 + eta) * h
        x = math.exp(-big) * x - math.expm1(-big) * past[0][1]
        gaps = [math.log(q / p) / h for (p, _), (q, _) in pairwise(past)]
        slopes = [
            (a - b) / gap for gap, ((_, a), (_, b)) in zip(gaps, pairwise(past), strict=True)
        ]
        if slopes:
            x = x + big * phi_2(-big) * slopes[0]
        if len(slopes) > 1:
            bend = (slopes[0] - slopes[1]) / sum(gaps)
            p3 = (phi_2(-big) * big) / big - 0.5
            x = x + big * phi_2(-big) * gaps[0] * bend - p3 * bend
        x = x + s * math.sqrt(-math.expm1(-2 * eta * h)) * next(draws)
    assert_same(got, x)


# ---- orders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("dpmpp_2m_sde", {"solver_type": "midpoint"}, 2),
        ("dpmpp_2m_sde", {"solver_type": "heun"}, 2),
        ("dpmpp_3m_sde", {}, 2),
        ("dpmpp_3m_sde", {"corrected": True}, 3),
        ("sde_dpm_solver", {"order": 1}, 1),
        ("sde_dpm_solver", {"solver_type": "midpoint"}, 2),
        ("sde_dpm_solver", {"solver_type": "heun"}, 2),
        ("dpmpp_sde", {}, 2),
        ("dpmpp_sde", {"r": 0.7}, 2),
        ("seeds_2", {"solver_type": "phi_1"}, 2),
        ("seeds_2", {"solver_type": "phi_2", "r": 0.7}, 2),
        ("exp_heun_2_x0", {}, 2),
        ("seeds_3", {}, 3),
        ("seeds_3", {"r_1": 0.3, "r_2": 0.55}, 2),
        ("er_sde", {"max_stage": 1}, 1),
        ("er_sde", {"max_stage": 2}, 2),
        ("er_sde", {}, 2),
        ("er_sde", {"corrected": True}, 3),
    ],
    ids=str,
)
def test_order_of_the_ode(name: str, options: dict[str, Any], order: int) -> None:
    """With eta = 0 each is a solver of the ODE; the two with a published mistake gain an order when corrected."""
    process = PROCESSES["vp"]
    measured = measured_orders(name, {**options, "eta": 0.0}, process, (60, 120))
    assert measured == [pytest.approx(order, abs=0.2)]


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("dpmpp_2m_sde", {"solver_type": "heun"}, 2),
        ("dpmpp_3m_sde_dynamic_eta", {}, 2),
        ("sde_dpm_solver", {"order": 1}, 1),
        ("sde_dpm_solver", {"solver_type": "heun"}, 2),
        ("seeds_2", {"solver_type": "phi_2"}, 2),
        ("exp_heun_2_x0_sde", {}, 2),
        ("er_sde", {"max_stage": 1}, 1),
        ("er_sde", {"max_stage": 2}, 2),
        ("er_sde", {"noise_scaler": "reverse_sde", "corrected": True}, 2),
    ],
    ids=str,
)
def test_weak_order(name: str, options: dict[str, Any], order: int) -> None:
    measured = weak_orders(name, options, PROCESSES["flow"], (160, 320))
    assert measured == [pytest.approx(order, abs=0.2)]


# ---- identities ------------------------------------------------------------------------------

SDE_OF_FIRST_ORDER = [
    ("er_sde", {"max_stage": 1, "noise_scaler": "reverse_sde"}),
    ("er_sde", {"max_stage": 3, "noise_scaler": "reverse_sde"}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_3m_sde", {}),
]
SAME = [
    ("dpmpp_2m_sde", {"eta": 0.0}, "dpmpp_2m", {}),
    *(
        (
            "dpmpp_3m_sde",
            {"eta": 0.0, "corrected": corrected},
            "dpmpp_3m",
            {"solver_type": "heun", "lower_order_final": False, "corrected": corrected},
        )
        for corrected in (False, True)
    ),
    *(
        (
            "sde_dpm_solver",
            {"eta": 0.0, "solver_type": solver_type},
            "dpm_solver_2m",
            {"solver_type": solver_type, "lower_order_final": False},
        )
        for solver_type in ("midpoint", "heun")
    ),
    ("dpmpp_sde", {"eta": 0.0}, "dpmpp_2s", {}),
    ("seeds_3", {"eta": 0.0}, "dpmpp_3s", {}),
    ("dpmpp_sde", {"eta": 0.0}, "seeds_2", {"eta": 0.0}),
    ("dpmpp_sde", {"eta": 0.0, "r": 0.7}, "seeds_2", {"eta": 0.0, "r": 0.7}),
    ("sde_dpm_solver", {"eta": 0.0, "order": 1}, "euler", {}),
    ("er_sde", {"eta": 0.0, "max_stage": 1}, "euler", {}),
    ("er_sde", {"max_stage": 1, "noise_scaler": "reverse_sde"}, "ddpm", {}),
    ("er_sde", {"eta": 0.0}, "er_sde", {"eta": 0.0, "noise_scaler": "reverse_sde"}),
    ("dpmpp_3m_sde", {"eta_fall": 1.0, "eta": 0.0}, "dpmpp_3m_sde", {"eta": 0.0}),
]


def table(name: str, grid: fs.Grid, options: dict[str, Any]) -> np.ndarray:
    """Every evaluated point and the result, written out in the start, the outputs and the draws."""
    plan = fs.plan(name, grid, **options)
    rows = expand(plan.instructions, plan.result, plan.levels[-1])
    return np.array([[row.start, *row.outputs, *row.draws] for row in rows])


@pytest.mark.parametrize("ratios", [*GRIDS.values(), [math.inf, 9.0, 2.0, 1.5, 0.3, 0.0]], ids=len)
@pytest.mark.parametrize(("name", "options", "other", "others"), SAME, ids=str)
def test_the_same_method(
    name: str, options: dict[str, Any], other: str, others: dict[str, Any], ratios: list[float]
) -> None:
    grid = fs.Grid.from_ratios(PROCESSES["flow"], ratios)
    np.testing.assert_allclose(
        table(name, grid, options), table(other, grid, others), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("name", "options"), SDE_OF_FIRST_ORDER, ids=str)
def test_the_first_step_is_that_of_ddpm(name: str, options: dict[str, Any]) -> None:
    grid = fs.Grid.from_ratios(PROCESSES["vp"], [9.0, 2.0])
    np.testing.assert_allclose(table(name, grid, options), table("ddpm", grid, {}), rtol=1e-12)


# ---- draws -----------------------------------------------------------------------------------

NAMES = [
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "sde_dpm_solver",
    "dpmpp_sde",
    "seeds_2",
    "seeds_3",
    "er_sde",
]


@pytest.mark.parametrize("name", NAMES)
def test_draws_cover_each_step_but_the_last_once(name: str) -> None:
    grid = fs.Grid.from_ratios(PROCESSES["flow"], [math.inf, 9.0, 2.0, 0.7, 0.0])
    draws = [i for i in fs.plan(name, grid).instructions if isinstance(i, Draw)]
    assert all(a.end == b.start for a, b in pairwise(draws))
    assert (draws[0].start, draws[-1].end) == (grid.levels[0], grid.levels[-2])
    assert {draw.lap for draw in draws} == {0}


@pytest.mark.parametrize("name", NAMES)
def test_no_noise_is_drawn_that_is_not_added(name: str) -> None:
    grid = fs.Grid.from_ratios(PROCESSES["edm"], ROUGH)
    for nothing in ({"eta": 0.0}, {"s_noise": 0.0}):
        assert fs.plan(name, grid, **nothing).draws == 0
