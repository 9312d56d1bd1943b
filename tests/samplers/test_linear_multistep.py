"""LMS, PNDM, DEIS and relatives, against diffusers, k-diffusion and numerical integration.

ComfyUI cannot be installed: what only it has is written out here in its own form.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep as fs
from exact_problems import PROCESSES, mixture
from fewstep.plan.rules import expand
from multistep_support import (
    EDM,
    ROUGH,
    START,
    by_quadrature,
    order_of,
    run,
    slope,
    steps_of_any_size,
)
from peer_support import PROCESS, Peer, assert_same, doubled, k_diffusion, network, ours, start

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---- peers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_of_k_diffusion(order: int) -> None:
    """The peer extrapolates to clean data; so does the option."""
    peer, denoiser = k_diffusion(), mixture(EDM)
    grid = fs.Grid.from_ratios(EDM, [*ROUGH, 0.0])
    wanted = peer.sample_lms(
        lambda x, sigma: denoiser(x, fs.Level(0.0, 1.0, float(sigma[0]))),
        ROUGH[0] * START,
        torch.tensor(grid.ratios, dtype=torch.float64),
        order=order,
    )
    same(run(grid, "lms", order=order, extrapolate=True), wanted)
    if order > 1:
        assert float((run(grid, "lms", order=order) - wanted).abs().max()) > 1e-3


def test_lms_of_diffusers() -> None:
    """Matched: the peer's state is x / alpha."""
    pytest.importorskip("diffusers")
    peer, x = Peer("LMSDiscreteScheduler"), start()
    assert_same(ours(peer.grid, "lms", x, extrapolate=True), peer.run(x, scaled=True))


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_of_diffusers(order: int, steps: int) -> None:
    """Matched: log-rho, the peer's only kind. It lowers the last orders below 15 steps, as we do."""
    pytest.importorskip("diffusers")
    peer, x = Peer("DEISMultistepScheduler", steps=steps, last=0.0, solver_order=order), start()
    assert_same(ours(peer.grid, "deis", x, order=order), peer.run(x, scaled=False))


@pytest.mark.parametrize("warm_up", ["runge_kutta", "plms"])
@pytest.mark.parametrize("last", [None, 0])
def test_pndm_of_diffusers(warm_up: str, last: int | None) -> None:
    """Matched: the middle in time. To clean data the peer extrapolates, we return the estimate: left out."""
    peers = pytest.importorskip("diffusers").schedulers
    scheduler = peers.PNDMScheduler(
        skip_prk_steps=warm_up == "plms", set_alpha_to_one=last is None
    )
    alphas = PROCESS.alpha(torch.arange(1000, dtype=torch.float64)) ** 2
    scheduler.alphas_cumprod = alphas
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(10)
    if last is not None:  # one step less, and the last level that of time 0
        scheduler.timesteps = scheduler.timesteps[:-1]
    times = [100.0 * k for k in range(9, -1, -1)]
    grid = fs.Grid.from_times(PROCESS, times, end_clean=last is None)
    x, wanted = start(), []
    with doubled():
        for t in scheduler.timesteps:
            wanted.append(x)
            x = scheduler.step(network(x, t.view(1)), t, x).prev_sample
    got = ours(grid, "pndm", wanted[0], warm_up=warm_up, middle="time")
    assert_same(got[:-1] if last is None else got, wanted if last is None else [*wanted, x])


def test_ipndm_of_diffusers() -> None:
    """Matched: the peer's levels, which are a cosine of its own, and its output, `(noise - sigma x) / alpha`."""
    peers = pytest.importorskip("diffusers").schedulers
    process = PROCESSES["vp"]
    grid, denoiser = steps_of_any_size(process), mixture(process)
    scheduler = peers.IPNDMScheduler()
    scheduler.set_timesteps(len(grid.steps))
    scheduler.alphas, scheduler.betas = (
        torch.tensor([getattr(level, name) for level in grid.levels], dtype=torch.float64)
        for name in ("alpha", "sigma")
    )
    x = grid.levels[0].sigma * START
    scheduler.set_begin_index(0)
    for t in grid.levels[:-1]:
        noise = (x - t.alpha * denoiser(x, t)) / t.sigma
        output = (noise - t.sigma * x) / t.alpha
        x = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
    same(run(grid, "ipndm"), x / grid.levels[-1].alpha)


# ---- written a second way --------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_integrates_the_noise_in_sigma_over_alpha(order: int, process: fs.Process) -> None:
    wanted = by_quadrature(ROUGH, order, lambda r: r, lambda r: 1.0, data=False)
    grid = steps_of_any_size(process)
    same(run(grid, "lms", order=order), wanted)
    same(run(grid, "ipndm_v", order=order, corrected=True), wanted)
    same(run(grid, "deis", order=order, variable="rho", lower_order_final=False), wanted)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_integrates_the_noise_in_log_snr(order: int, process: fs.Process) -> None:
    wanted = by_quadrature(
        ROUGH, order, lambda r: -math.log(r), lambda u: -math.exp(-u), data=False
    )
    same(run(steps_of_any_size(process), "deis", order=order, lower_order_final=False), wanted)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_integrates_the_noise_in_time(order: int) -> None:
    """On the flow, `r = t / (1 - t)`; on the variance-preserving process, `1 + r^2 = e^B`, B the integral of beta."""
    options = {"variable": "t", "order": order, "lower_order_final": False}
    wanted = by_quadrature(
        ROUGH, order, lambda r: r / (1 + r), lambda t: (1 - t) ** -2, data=False
    )
    same(run(steps_of_any_size(fs.process.flow()), "deis", **options), wanted)

    low, high = 0.1, 20.0

    def time(r: float) -> float:
        area = math.log1p(r * r)
        return 2 * area / (low + math.sqrt(low**2 + 2 * (high - low) * area))

    def fall(t: float) -> float:
        r = math.sqrt(math.expm1(low * t + (high - low) * t * t / 2))
        return (low + (high - low) * t) * (1 + r * r) / (2 * r)

    process = fs.process.vp_continuous(beta_min=low, beta_max=high)
    same(
        run(steps_of_any_size(process), "deis", **options),
        by_quadrature(ROUGH, order, time, fall, data=False),
    )


def test_deis_in_a_time_that_is_sigma_is_lms() -> None:
    grid = steps_of_any_size(EDM)
    same(
        run(grid, "deis", variable="t", order=3, lower_order_final=False),
        run(grid, "lms", order=3),
    )


def test_deis_in_time_falls_back_to_first_order_outside_the_trained_times() -> None:
    process = fs.process.vp_linear()
    outside = fs.Grid.from_ratios(process, [3000.0, 1000.0, 400.0, 200.0])
    assert len({level.t for level in outside.levels}) == 1
    same(run(outside, "deis", variable="t", order=3), run(outside, "euler"))
    across = fs.Grid.from_ratios(process, [400.0, 200.0, 100.0, 10.0, 1.0, 1e-3, 1e-4])
    assert bool(run(across, "deis", variable="t", order=4).isfinite().all())


ADAMS = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def fixed_weights(tables: list[list[float]], ratios: list[float]) -> Tensor:
    """A method in the noise whose weights do not know the steps, as ComfyUI writes ipndm and gradient_estimation."""
    x, kept = ratios[0] * START, []
    for r, s in zip(ratios, ratios[1:], strict=False):
        kept = [slope(x, r), *kept][: len(tables)]
        weights = tables[len(kept) - 1]
        x = x + (s - r) * sum(w * d for w, d in zip(weights, kept, strict=True))
    return x


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_has_the_weights_of_equal_steps(order: int, process: fs.Process) -> None:
    same(
        run(steps_of_any_size(process), "ipndm", order=order), fixed_weights(ADAMS[:order], ROUGH)
    )


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_gradient_estimation_extrapolates_the_noise(gamma: float) -> None:
    wanted = fixed_weights([[1], [gamma, 1 - gamma]], ROUGH)
    same(run(steps_of_any_size(PROCESSES["flow"]), "gradient_estimation", gamma=gamma), wanted)


def test_gradient_estimation_lies_between_euler_and_ipndm() -> None:
    grid = steps_of_any_size(EDM)
    same(run(grid, "gradient_estimation", gamma=1.0), run(grid, "euler"))
    same(run(grid, "gradient_estimation", gamma=1.5), run(grid, "ipndm", order=2))


def ipndm_v_of_comfyui(order: int, ratios: list[float]) -> Tensor:
    """Newton's divided differences with the published factors; the last lines undo what is missing in the tail."""
    x, kept = ratios[0] * START, []
    for i, (r, s) in enumerate(zip(ratios, ratios[1:], strict=False)):
        kept = [slope(x, r), *kept][:order]
        at = ratios[i::-1][: len(kept)]
        differences, column = [kept[0]], kept
        for k in range(1, len(kept)):
            column = [
                (column[j] - column[j + 1]) / (at[j] - at[j + k]) for j in range(len(column) - 1)
            ]
            differences.append(column[0])
        h = [s - r, *(at[j] - at[j + 1] for j in range(len(at) - 1))]
        mean = differences[0]
        if len(kept) > 1:
            mean = mean + h[0] / 2 * differences[1]
        if len(kept) > 2:
            bracket = h[0] / (3 * (h[0] + h[1])) * h[0] * (h[0] + h[1])
            misplaced = (1 - bracket / (h[1] * (h[1] + h[2]))) / 2
            mean = mean + misplaced * h[1] * (h[1] + h[2]) * differences[2]
        if len(kept) > 3:
            wrong_sign = (1 - h[0] / (3 * (h[0] + h[1]))) / 2 + (
                1 - h[0] / (2 * (h[0] + h[1]))
            ) * h[0] / (6 * sum(h[:3]))
            length = h[0] * (h[0] + h[1]) * sum(h[:3])
            mean = mean + wrong_sign * length * differences[3]
            behind = h[1] * (h[1] + h[2]) * sum(h[1:])
            far = h[1] * (h[1] + h[2]) / (h[2] * (h[2] + h[3]))
            missing = far * (h[2] / h[3] - h[1] / h[2])
            mean = mean + wrong_sign * length / behind * missing * kept[3]
        x = x + (s - r) * mean
    return x


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_v_is_as_published(order: int, process: fs.Process) -> None:
    same(run(steps_of_any_size(process), "ipndm_v", order=order), ipndm_v_of_comfyui(order, ROUGH))


def test_the_published_weights_of_ipndm_v_on_equal_steps() -> None:
    """Right for order 3; of order 4 the first is 57/24 where Adams has 55/24."""
    ratios = [10.0, 9.0, 8.0, 7.0, 6.0]
    for order, wanted in ((3, ADAMS[2]), (4, [57 / 24, -65 / 24, 43 / 24, -11 / 24])):
        x = ratios[0] * START
        kept: list[Tensor] = []
        for i, r in enumerate(ratios[:-1]):
            kept = [slope(x, r), *kept]
            x_next = run(fs.Grid.from_ratios(EDM, ratios[: i + 2]), "ipndm_v", order=order)
            if i == 3:
                same(x_next, x - sum(w * d for w, d in zip(wanted, kept, strict=False)))
            x = x_next


def test_only_the_published_order_four_of_ipndm_v_misses_the_noise_of_the_level() -> None:
    rough, equal = (
        fs.Grid.from_ratios(EDM, ratios) for ratios in (ROUGH, [10.0, 8.0, 6.0, 4.0, 2.0, 0.5])
    )
    for order, corrected, exact in ((4, False, False), (4, True, True), (3, False, True)):
        plan = fs.plan("ipndm_v", rough, order=order, corrected=corrected)
        assert plan.inexact == (() if exact else ("noise",))
        *_, result = expand(plan.instructions, plan.result, plan.levels[-1])
        assert (abs(result.start * ROUGH[0] / ROUGH[-1] - 1) < 1e-9) == exact
    plan = fs.plan("ipndm_v", equal)
    last_equal = [*expand(plan.instructions, plan.result, plan.levels[-1])][-2]
    assert last_equal.start * 10.0 == pytest.approx(last_equal.level.sigma, rel=1e-12)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_pndm_warms_up_with_runge_kutta_over_the_middle_of_log_snr(process: fs.Process) -> None:
    x, kept = ROUGH[0] * START, []
    for r, s in zip(ROUGH, ROUGH[1:], strict=False):
        first = slope(x, r)
        kept = [first, *kept][:4]
        if len(kept) < 4:
            m = math.sqrt(r * s)
            second = slope(x + (m - r) * first, m)
            third = slope(x + (m - r) * second, m)
            fourth = slope(x + (s - r) * third, s)
            mean = (first + 2 * second + 2 * third + fourth) / 6
        else:
            mean = sum(w * d for w, d in zip(ADAMS[3], kept, strict=True))
        x = x + (s - r) * mean
    same(run(steps_of_any_size(process), "pndm"), x)


def test_calls_of_the_warm_ups() -> None:
    for process in PROCESSES.values():
        for steps in (4, 5, 12):
            ratios = [float(2**-k) for k in range(steps)]
            grid = fs.Grid.from_ratios(process, [*ratios, 0.0])
            assert fs.plan("pndm", grid).calls == steps + 9
            assert fs.plan("plms", grid).calls == steps + 1
            assert fs.plan("ipndm", grid).calls == steps


# ---- order -----------------------------------------------------------------------------------

ORDERS: list[tuple[str, dict[str, Any], float]] = [
    *(("lms", {"order": p}, p) for p in (1, 2, 3, 4)),
    ("ipndm", {}, 1),
    ("ipndm", {"order": 2}, 1),
    ("ipndm_v", {}, 0),
    ("ipndm_v", {"order": 3}, 2),
    ("ipndm_v", {"order": 2}, 2),
    ("ipndm_v", {"corrected": True}, 4),
    ("ipndm_v", {"order": 3, "corrected": True}, 3),
    ("gradient_estimation", {}, 1),
    ("pndm", {}, 1),
    ("plms", {}, 1),
    *(("deis", {"order": p}, p) for p in (1, 2, 3, 4)),
]
SMOOTH: list[tuple[str, dict[str, Any], float]] = [
    ("ipndm", {}, 2),
    ("ipndm", {"order": 2}, 2),
    ("ipndm", {"order": 3}, 2),
    ("pndm", {}, 2),
    ("plms", {}, 2),
    ("gradient_estimation", {}, 1),
    ("gradient_estimation", {"gamma": 1.5}, 2),
]


@pytest.mark.parametrize(("name", "options", "order"), ORDERS, ids=str)
def test_order_on_steps_of_any_size(name: str, options: dict[str, Any], order: float) -> None:
    assert order_of(name, options) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("name", "options", "order"), SMOOTH, ids=str)
def test_order_where_neighbouring_steps_differ_little(
    name: str, options: dict[str, Any], order: float
) -> None:
    assert order_of(name, options, rough=False) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("order", [2, 3])
def test_order_of_deis_in_time(order: int, process: str) -> None:
    options = {"variable": "t", "order": order}
    assert order_of("deis", options, PROCESSES[process]) == pytest.approx(order, abs=0.2)
