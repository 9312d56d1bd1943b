"""DPM-Solver(++) multistep, RES and the presets of UniPC, against diffusers, k-diffusion and numerical integration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from exact_problems import PROCESSES, mixture, weak_orders
from fewstep.plan import Plan
from fewstep.plan.rules import expand
from multistep_support import (
    EDM,
    ROUGH,
    START,
    by_quadrature,
    estimate,
    order_of,
    run,
    steps_of_any_size,
)
from peer_support import Peer, assert_same, k_diffusion, ours, start

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def table(plan: Plan) -> np.ndarray:
    """Every evaluated point and the result, written out in the start, the outputs and the draws."""
    rows = expand(plan.instructions, plan.result, plan.levels[-1])
    return np.array([[row.start, *row.outputs, *row.draws] for row in rows])


def assert_same_table(a: Plan, b: Plan) -> None:
    np.testing.assert_allclose(table(a), table(b), rtol=1e-10, atol=1e-12)


# ---- peers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [2, 3])
def test_dpmpp_of_diffusers(order: int, solver_type: str, steps: int) -> None:
    """Matched: nothing. The peer's third order has half the right weight too: that is the published method."""
    pytest.importorskip("diffusers")
    peer = Peer(
        "DPMSolverMultistepScheduler", steps=steps, solver_order=order, solver_type=solver_type
    )
    x = start()
    wanted = peer.run(x, scaled=False)
    assert_same(ours(peer.grid, f"dpmpp_{order}m", x, solver_type=solver_type), wanted)


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_of_diffusers(
    order: int, solver_type: str, lower_order_final: bool, steps: int
) -> None:
    """Matched: the peer ends at its least noisy level, since it refuses clean data in noise form."""
    pytest.importorskip("diffusers")
    options = {"solver_type": solver_type, "lower_order_final": lower_order_final}
    peer = Peer(
        "DPMSolverMultistepScheduler",
        steps=steps,
        last=0.0,
        algorithm_type="dpmsolver",
        final_sigmas_type="sigma_min",
        solver_order=order,
        **options,
    )
    x = start()
    got = ours(peer.grid, "dpm_solver_multistep", x, order=order, **options)
    assert_same(got, peer.run(x, scaled=False))


def test_dpmpp_3m_of_diffusers_short_of_clean_data() -> None:
    pytest.importorskip("diffusers")
    for lower in (True, False):
        peer = Peer(
            "DPMSolverMultistepScheduler",
            last=0.0,
            final_sigmas_type="sigma_min",
            solver_order=3,
            lower_order_final=lower,
        )
        x = start()
        wanted = peer.run(x, scaled=False)
        assert_same(ours(peer.grid, "dpmpp_3m", x, lower_order_final=lower), wanted)


@pytest.mark.parametrize("end", [[], [0.0]])
def test_dpmpp_2m_of_k_diffusion(end: list[float]) -> None:
    peer, denoiser = k_diffusion(), mixture(EDM)
    grid = fs.Grid.from_ratios(EDM, [*ROUGH, *end])
    wanted = peer.sample_dpmpp_2m(
        lambda x, sigma: denoiser(x, fs.Level(0.0, 1.0, float(sigma[0]))),
        ROUGH[0] * START,
        torch.tensor(grid.ratios, dtype=torch.float64),
    )
    same(run(grid, "dpmpp_2m"), wanted)


# ---- written a second way --------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_exact_methods_integrate_the_polynomial_through_the_estimates(
    process: fs.Process,
) -> None:
    """In log_snr: data form with density e^u, noise form with -e^-u."""
    grid = steps_of_any_size(process)
    exact = {"solver_type": "heun", "lower_order_final": False, "corrected": True}

    def integrated(order: int, data: bool) -> Tensor:
        sign = 1 if data else -1
        return by_quadrature(
            ROUGH, order, lambda r: -math.log(r), lambda u: sign * math.exp(sign * u), data=data
        )

    same(run(grid, "dpmpp_2m", solver_type="heun"), integrated(2, data=True))
    same(run(grid, "res_multistep"), integrated(2, data=True))
    same(run(grid, "dpmpp_3m", **exact), integrated(3, data=True))
    for order in (1, 2, 3):
        same(
            run(grid, "dpm_solver_multistep", order=order, **exact), integrated(order, data=False)
        )


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_published_third_order_is_a_taylor_series_with_half_the_last_term(
    process: fs.Process,
) -> None:
    """`x = (r_s / r_t) x + phi_1 D + phi_2 D' + phi_3 D''` in steps of h, as the authors' code has it."""
    x, kept = ROUGH[0] * START, []
    u = [-math.log(r) for r in ROUGH]
    for i, r in enumerate(ROUGH[:-1]):
        h, s = u[i + 1] - u[i], ROUGH[i + 1]
        kept = [estimate(x, r), *kept][:3]
        phi_1 = math.expm1(-h)
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        new = s / r * x - phi_1 * kept[0]
        if len(kept) == 2:
            new = new - phi_1 / 2 * (kept[0] - kept[1]) * h / (u[i] - u[i - 1])
        if len(kept) == 3:
            r0, r1 = (u[i] - u[i - 1]) / h, (u[i - 1] - u[i - 2]) / h
            now, before = (kept[0] - kept[1]) / r0, (kept[1] - kept[2]) / r1
            new = new + phi_2 * (now + r0 / (r0 + r1) * (now - before))
            new = new - phi_3 * (now - before) / (r0 + r1)
        x = new
    same(run(steps_of_any_size(process), "dpmpp_3m", lower_order_final=False), x)


class Draws:
    """Noise by the level where a step starts, the same for every process."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.values = torch.randn(
            len(ROUGH), *START.shape, dtype=torch.float64, generator=generator
        )

    def __call__(self, t: fs.Level, s: fs.Level) -> Tensor:
        return self.values[min(range(len(ROUGH)), key=lambda i: abs(ROUGH[i] - t.ratio))]


def res_of_comfyui(eta: float, s_noise: float, ratios: list[float]) -> Tensor:
    """With the phi functions, and the step down to the kept part of the noise, as ComfyUI writes it for alpha = 1."""
    draws, x, old, old_down = Draws(), ratios[0] * START, None, 0.0
    for i, (r, s) in enumerate(zip(ratios, ratios[1:], strict=False)):
        up = min(s, eta * math.sqrt(s**2 * (r**2 - s**2) / r**2))
        down = math.sqrt(s**2 - up**2)
        denoised = estimate(x, r)
        if old is None or down == 0:
            x = x + (x - denoised) / r * (down - r)
        else:
            h = math.log(r / down)
            c2 = math.log(old_down / ratios[i - 1]) / h
            phi_1 = -math.expm1(-h) / h
            phi_2 = (1 - phi_1) / h
            x = math.exp(-h) * x + h * ((phi_1 - phi_2 / c2) * denoised + phi_2 / c2 * old)
        if s > 0:
            x = x + s_noise * up * draws.values[i]
        old, old_down = denoised, down
    return x


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 1.1)])
def test_res_multistep_is_that_of_comfyui(eta: float, s_noise: float, process: fs.Process) -> None:
    """On flow models ComfyUI runs it on t in place of sigma / alpha, with noise made for alpha = 1: a mistake."""
    for ratios in (ROUGH, [*ROUGH, 0.0]):
        grid = fs.Grid.from_ratios(process, ratios)
        got = run(grid, "res_multistep", Draws(), eta=eta, s_noise=s_noise)
        same(got, res_of_comfyui(eta, s_noise, ratios))


# ---- identities ------------------------------------------------------------------------------

GRIDS = [
    fs.Grid.from_ratios(process, [*first, *ROUGH, *last])
    for process in PROCESSES.values()
    for first in ([], *([[math.inf]] if process.name == "flow" else []))
    for last in ([], [0.0])
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.process.name}-{len(g.levels)}")
def test_the_same_methods_under_other_names(grid: fs.Grid) -> None:
    """Pairs that the papers derive in different ways."""
    exact: dict[str, Any] = {"solver_type": "heun", "lower_order_final": False}
    pairs: list[tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = [
        (("dpm_solver_multistep", {"order": 1}), ("ddim", {})),
        (("dpm_solver_2m", exact), ("deis", {"lower_order_final": False})),
        (
            ("dpm_solver_3m", {**exact, "corrected": True}),
            ("deis", {"order": 3, "lower_order_final": False}),
        ),
        (("res_multistep", {}), ("dpmpp_2m", {"solver_type": "heun"})),
        (("res_multistep_ancestral", {}), ("dpmpp_2m_sde", {"solver_type": "heun"})),
        (
            ("deis", {"variable": "rho", "order": 3, "lower_order_final": False}),
            ("lms", {"order": 3}),
        ),
        (("ipndm_v", {"corrected": True}), ("lms", {})),
    ]
    for (name, options), (other, other_options) in pairs:
        assert_same_table(fs.plan(name, grid, **options), fs.plan(other, grid, **other_options))


def test_unip_of_second_order_is_dpmpp_2m() -> None:
    """With bh2. The predictor alone: the points of the first two calls, before anything is corrected twice."""
    grid = fs.Grid.from_ratios(EDM, ROUGH[:3])
    assert table(fs.plan("unipc", grid))[1] == pytest.approx(table(fs.plan("dpmpp_2m", grid))[1])


def test_the_names_of_unipc_in_comfyui() -> None:
    grid = fs.schedulers.karras(EDM, 8)
    for name, variant in (("uni_pc_bh1", "bh1"), ("uni_pc_bh2", "bh2")):
        assert fs.plan(name, grid) == fs.plan("unipc", grid, variant=variant, order=3)


# ---- last steps ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("dpmpp_3m", {}), ("dpm_solver_3m", {}), ("deis", {"order": 3})],
)
def test_short_runs_end_with_lower_orders(name: str, options: dict[str, Any]) -> None:
    """Below 15 steps the last but one uses two estimates and the last one; from 15 on all use three."""

    def used(steps: int, lower: bool) -> list[int]:
        grid = fs.Grid.from_ratios(EDM, np.geomspace(20, 0.05, steps + 1))
        plan = fs.plan(name, grid, **options, lower_order_final=lower)
        rows = table(plan)
        counts = []
        for before, after in zip(rows[-4:], rows[-3:], strict=False):
            step = after - after[0] / before[0] * before  # what the step adds to the point
            counts.append(int((abs(step[1:]) > 1e-12).sum()))
        return counts

    free = used(14, lower=False)
    assert used(15, lower=True) == used(15, lower=False)
    assert used(14, lower=True)[0] == free[0]
    assert used(14, lower=True)[1:] < free[1:]


# ---- order -----------------------------------------------------------------------------------

ORDERS: list[tuple[str, dict[str, Any], int]] = [
    *(("dpmpp_2m", {"solver_type": kind}, 2) for kind in ("midpoint", "heun")),
    ("dpmpp_3m", {}, 2),
    ("dpmpp_3m", {"corrected": True}, 3),
    ("dpm_solver_multistep", {"order": 1}, 1),
    *(("dpm_solver_2m", {"solver_type": kind}, 2) for kind in ("midpoint", "heun")),
    ("dpm_solver_3m", {}, 2),
    ("dpm_solver_3m", {"corrected": True}, 3),
    ("res_multistep", {}, 2),
    *(("unipc", {"order": p, "variant": v}, p + 1) for p in (1, 2) for v in ("bh1", "bh2")),
]


@pytest.mark.parametrize(("name", "options", "order"), ORDERS, ids=str)
def test_order_on_steps_of_any_size(name: str, options: dict[str, Any], order: int) -> None:
    assert order_of(name, options) == pytest.approx(order, abs=0.2)


def test_order_of_unipc_with_many_estimates() -> None:
    """The fourth, before its errors drown in rounding."""
    assert order_of("unipc", {"order": 3}, counts=(80, 160)) == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_res_is_of_second_order_in_law(eta: float) -> None:
    for process in PROCESSES.values():
        *_, order = weak_orders("res_multistep", {"eta": eta}, process, (80, 160))
        assert order == pytest.approx(2, abs=0.2)
