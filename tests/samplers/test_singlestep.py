"""DPM-Solver and DPM-Solver++ with inner levels, against other implementations, quadrature, and in order."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import fewstep as fs
from exact_problems import PROCESSES, START, measured_orders, mixture, weak_orders
from fewstep.errors import InvalidInputError
from fewstep.plan import Denoise, Plan, Vector
from fewstep.plan.rules import expand
from fewstep.process import log_snr_step
from fewstep.samplers.singlestep import singlestep, stretch
from peer_support import Draws, assert_same, doubled, k_diffusion, network, ours, start

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EDM, FLOW, VP = PROCESSES["edm"], PROCESSES["flow"], PROCESSES["vp"]
RATIOS = [10.0, 6.0, 4.5, 2.0, 1.3, 0.5, 0.3, 0.06]
TIMES = [0.98, 0.93, 0.8, 0.71, 0.5, 0.34, 0.3, 0.1, 0.0]
SOLVERS = ("dpm_solver_singlestep", "dpmpp_singlestep")


def plan(name: str | Callable[..., Vector], grid: fs.Grid, **options: Any) -> Plan:
    traced = fs.plan(name, grid, **options)
    assert isinstance(traced, Plan)
    return traced


def exact(x: Tensor, sigma: Tensor) -> Tensor:
    """The mixture's denoiser as k-diffusion calls it, with a sigma for each image."""
    ratio = float(sigma[0])
    return mixture(EDM)(x, fs.Level(ratio, 1.0, ratio))


def sequence(seed: int = 5) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(START.shape, dtype=torch.float64, generator=generator)


def end(traced: Plan, process: fs.Process) -> Tensor:
    """The end of the path in the coordinates of alpha = 1, with noise in the order of the draws."""
    draws = sequence()
    first, last = traced.levels[0], traced.levels[-1]
    x = first.alpha * START
    return traced.run(mixture(process), x, lambda a, b: next(draws)) / last.alpha


@contextlib.contextmanager
def double_by_default() -> Iterator[None]:
    """K-diffusion makes tensors of the numbers that it is given, in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def steps_of_k_diffusion(order: int, **options: float) -> Tensor:
    step = getattr(k_diffusion().DPMSolver(exact), f"dpm_solver_{order}_step")
    x = START
    for t, s in pairwise(torch.tensor(RATIOS, dtype=torch.float64).log().neg()):
        x, _ = step(x, t, s, **options)
    return x


# ---- against k-diffusion ---------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_is_that_of_k_diffusion(order: int, process: str) -> None:
    grid = fs.Grid.from_ratios(PROCESSES[process], RATIOS)
    got = end(plan(f"dpm_solver_{order}", grid), PROCESSES[process])
    torch.testing.assert_close(got, steps_of_k_diffusion(order), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("r1", [0.25, 0.7])
def test_the_inner_level_may_lie_elsewhere(r1: float) -> None:
    for order in (2, 3):
        got = end(plan(f"dpm_solver_{order}", fs.Grid.from_ratios(EDM, RATIOS), r1=r1), EDM)
        torch.testing.assert_close(got, steps_of_k_diffusion(order, r1=r1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 6, 7, 8, 15])
def test_dpm_fast_is_that_of_k_diffusion(calls: int, eta: float) -> None:
    """Matched: a grid that ends with noise, as the peer does; it too draws in the order of its steps."""
    draws, options = sequence(), {"eta": eta, "s_noise": 1.1}
    with double_by_default():
        wanted = k_diffusion().sample_dpm_fast(
            exact, START, 0.06, 10.0, calls, noise_sampler=lambda a, b: next(draws), **options
        )
    grid = fs.Grid.from_ratios(EDM, np.linspace(10.0, 0.06, calls + 1))
    traced = plan("dpm_fast", grid, **options)
    assert traced.calls == calls
    torch.testing.assert_close(end(traced, EDM), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 0.9)])
def test_dpmpp_2s_ancestral_is_that_of_k_diffusion(
    eta: float, s_noise: float, process: str
) -> None:
    grid = fs.Grid.from_ratios(PROCESSES[process], [*RATIOS, 0.0])
    draws = Draws(grid, START.shape)
    traced = plan("dpmpp_2s_ancestral", grid, eta=eta, s_noise=s_noise)
    got = traced.run(mixture(PROCESSES[process]), grid.levels[0].alpha * START, draws)
    wanted = k_diffusion().sample_dpmpp_2s_ancestral(
        exact,
        START,
        torch.tensor([*RATIOS, 0.0], dtype=torch.float64),
        eta=eta,
        s_noise=s_noise,
        noise_sampler=lambda a, b: draws.next(),
    )
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


# ---- against diffusers -----------------------------------------------------------------------


SOLVER_TYPES = [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "heun")]


@pytest.mark.parametrize("steps", [9, 10, 11])
@pytest.mark.parametrize(("order", "solver_type"), SOLVER_TYPES)
def test_diffusers_takes_the_inner_levels_from_the_grid(
    order: int, solver_type: str, steps: int
) -> None:
    """Matched: clean data at the end, where the peer's list of orders is lowered whatever it is told."""
    options = {"order": order, "solver_type": solver_type}
    peer, grid = diffusers_solver(steps, solver_order=order, solver_type=solver_type)
    got = ours(grid, "DPMSolverSinglestepScheduler", start(), **options)
    assert len(got) == steps + 1
    assert_same(got, run_peer(peer))


def timeless(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(1.3 * x)


@pytest.mark.parametrize(("order", "solver_type"), SOLVER_TYPES)
def test_diffusers_in_noise_form(order: int, solver_type: str) -> None:
    """Matched: an even grid, whose inner levels are ours; it ends with noise, as the peer must in this form."""
    peer, grid = diffusers_solver(
        5 * order,
        last=0.0,
        solver_order=order,
        solver_type=solver_type,
        algorithm_type="dpmsolver",
        final_sigmas_type="sigma_min",
    )
    ratios = np.geomspace(20.0, 0.05, 5 * order + 1)
    peer.sigmas = torch.from_numpy(ratios)
    grid = fs.Grid.from_ratios(grid.process, ratios[::order])
    options = {"order": order, "solver_type": solver_type, "r1": 1 / max(2, order)}
    got = ours(grid, "dpm_solver_singlestep", start(), net=timeless, **options)
    assert_same(got, run_peer(peer, timeless))


def test_the_second_inner_point_of_diffusers_is_a_midpoint_step() -> None:
    """A difference: with order 3, midpoint, the peer takes the whole of that step for the point, the papers do not.

    They give the point the exact weight of the slope, whatever the type. Both are of third order.
    """
    peer, grid = diffusers_solver(9, solver_order=3, solver_type="midpoint")
    wanted = run_peer(peer)
    got = ours(grid, "dpmpp_3s", start(), inner="grid")
    assert_same(got[:2], wanted[:2])
    assert float((got[2] - wanted[2]).abs().max()) > 0.01
    two_steps = fs.Grid(grid.process, grid.levels[:3])
    assert_same(ours(two_steps, "dpmpp_2s", start(), inner="grid"), wanted[:3])


def diffusers_solver(steps: int, last: float | None = None, **config: Any) -> tuple[Any, fs.Grid]:
    """The peer, with our table in float64, and its grid."""
    schedulers = pytest.importorskip("diffusers", minversion="0.30").schedulers
    process = fs.process.vp_linear()
    peer = schedulers.DPMSolverSinglestepScheduler(**config)
    peer.set_timesteps(steps)
    times = [*map(float, peer.timesteps), *([] if last is None else [last])]
    grid = fs.Grid.from_times(process, times, end_clean=last is None)
    ratios = torch.tensor(grid.ratios, dtype=torch.float64)
    torch.testing.assert_close(ratios.float(), peer.sigmas, rtol=1e-4, atol=1e-6)
    peer.sigmas = ratios
    return peer, grid


def run_peer(peer: Any, net: Callable[[Tensor, Tensor], Tensor] = network) -> list[Tensor]:
    x, points = start(), []
    with doubled():
        for t in peer.timesteps:
            points.append(x)
            x = peer.step(net(x, t.view(1)), t, x).prev_sample
    return [*points, x]


@pytest.mark.parametrize("order", [2, 3])
def test_on_an_even_grid_inner_levels_of_the_grid_are_the_usual_ones(order: int) -> None:
    ratios = np.geomspace(10.0, 0.06, 6 * order + 1)
    for clean in ([], [0.0]):
        fine = fs.Grid.from_ratios(VP, [*ratios, *clean])
        coarse = fs.Grid.from_ratios(VP, [*ratios[::order], *clean])
        one = plan("dpmpp_2s", fine, order=order, inner="grid")
        other = plan("dpmpp_2s", coarse, order=order, r1=1 / order)
        assert one.calls == other.calls == 6 * order + len(clean)
        torch.testing.assert_close(end(one, VP), end(other, VP), rtol=1e-10, atol=1e-10)


def test_inner_levels_of_the_grid_cost_a_call_for_each_step() -> None:
    for steps, order, ends in itertools.product(range(1, 9), (1, 2, 3), ("", "p", "c", "pc")):
        if steps < len(ends):
            continue
        ratios = np.geomspace(10.0, 0.06, steps + 1 - len(ends))
        grid = fs.Grid.from_ratios(
            FLOW, [*([math.inf] * ("p" in ends)), *ratios, *([0.0] * ("c" in ends))]
        )
        traced = plan("dpmpp_singlestep", grid, order=order, inner="grid")
        asked = [i.level for i in traced.instructions if isinstance(i, Denoise)]
        assert asked == list(grid.levels[:-1])


# ---- against the integral that the method stands for --------------------------------------------


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("noise_form", [True, False])
def test_a_step_is_exact_for_outputs_that_are_polynomial_in_log_snr(
    noise_form: bool, order: int, solver_type: str
) -> None:
    """Of degree one less than the order where it interpolates, of degree 1 by the exact slope of a midpoint step.

    The outputs are made a function of the level alone, which no network is; the integral is done by quadrature.
    """
    degree = order - 1 if solver_type == "heun" else {1: 0, 2: 0, 3: 1}[order]
    grid = fs.Grid.from_ratios(VP, [3.0, 0.4])
    t, s = grid.levels
    name = SOLVERS[0] if noise_form else SOLVERS[1]
    traced = plan(name, grid, order=order, solver_type=solver_type)

    def output(log_snr: float) -> float:
        return 0.7 if degree == 0 else 0.7 - 0.4 * log_snr + 0.9 * (degree == 2) * log_snr**2

    def denoiser(x: Tensor, level: fs.Level) -> Tensor:
        value = torch.full_like(x, output(level.log_snr))
        return (x - level.sigma * value) / level.alpha if noise_form else value

    h, x = log_snr_step(t, s), torch.full((1, 1), 1.3, dtype=torch.float64)
    got = float(traced.run(denoiser, x))
    sign = -1 if noise_form else 1
    integral, _ = quad(
        lambda u: h * math.exp(-sign * h * (1 - u)) * output(t.log_snr + u * h), 0, 1, epsrel=1e-13
    )
    kept, gain = (s.alpha / t.alpha, -s.sigma) if noise_form else (s.sigma / t.sigma, s.alpha)
    assert got == pytest.approx(kept * 1.3 + gain * integral, rel=1e-10)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_flow_dpmpp_2s_ancestral_is_that_of_comfyui(eta: float) -> None:
    """In t as ComfyUI has it: lambda = log((1 - t) / t), steps by the ratio of times, the fresh noise rescaled."""
    denoiser, draws = mixture(FLOW), sequence()
    x = (1 - TIMES[0]) * START

    def step(x: Tensor, denoised: Tensor, t: float, s: float) -> Tensor:
        return s / t * x + (1 - s / t) * denoised

    for t, s in pairwise(TIMES):
        denoised = denoiser(x, fs.Level(t, 1 - t, t))
        down = s * (1 + (s / t - 1) * eta)
        if down > 0:
            log_snr = (math.log(1 / t - 1) + math.log(1 / down - 1)) / 2
            middle = 1 / (1 + math.exp(log_snr))
            inner = step(x, denoised, t, middle)
            denoised = denoiser(inner, fs.Level(middle, 1 - middle, middle))
        x = step(x, denoised, t, down)
        if s > 0:
            scale = (1 - s) / (1 - down)
            x = scale * x + math.sqrt(s**2 - (scale * down) ** 2) * next(draws)
    traced = plan("flow_dpmpp_2s_ancestral", fs.Grid.from_times(FLOW, TIMES), eta=eta)
    torch.testing.assert_close(end(traced, FLOW), x, rtol=1e-9, atol=1e-9)


# ---- identities ------------------------------------------------------------------------------


def table(traced: Plan) -> np.ndarray:
    rows = expand(traced.instructions, traced.result, traced.levels[-1])
    return np.array([[row.start, *row.outputs, *row.draws] for row in rows])


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "other"),
    [
        ("dpm_solver_1", {}, "euler"),
        ("dpmpp_2s", {"order": 1}, "euler"),
        ("dpm_solver_2", {}, "dpm_2"),
        ("dpmpp_2s_ancestral", {"eta": 0.0}, "dpmpp_2s"),
    ],
)
def test_the_same_methods_under_other_names(
    name: str, options: dict[str, Any], other: str, clean: bool, process: str
) -> None:
    grid = fs.Grid.from_ratios(PROCESSES[process], [*RATIOS, *([0.0] * clean)])
    one, two = table(plan(name, grid, **options)), table(plan(other, grid))
    np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-12)


def test_the_two_forms_differ_and_agree_to_their_order() -> None:
    for order in (2, 3):
        gaps = []
        for steps in (20, 40):
            grid = fs.Grid.from_ratios(EDM, np.geomspace(10.0, 0.06, steps + 1))
            ends = [end(plan(name, grid, order=order, r1=1 / order), EDM) for name in SOLVERS]
            gaps.append(float((ends[0] - ends[1]).abs().max()))
        assert gaps[0] > 1e-6
        assert gaps[0] / gaps[1] > 0.7 * 2**order


# ---- the levels of DPM fast -------------------------------------------------------------------


def test_dpm_fast_makes_one_call_for_each_step() -> None:
    for steps in range(1, 14):
        for first in ([], [math.inf]):
            ratios = [*first, *np.geomspace(10.0, 0.06, steps), 0.0]
            traced = plan("dpm_fast", fs.Grid.from_ratios(FLOW, ratios))
            asked = [i.level.ratio for i in traced.instructions if isinstance(i, Denoise)]
            assert traced.calls == len(asked) == steps + len(first)
            assert asked == sorted(asked, reverse=True)
            assert asked[-1] == ratios[-2]
    only = plan("dpm_fast", fs.Grid.from_ratios(FLOW, [math.inf, 0.0]))
    assert only.calls == 1


def test_dpm_fast_ends_clean_with_the_estimate_at_the_last_noisy_level() -> None:
    ratios = np.geomspace(10.0, 0.06, 8)
    noisy = end(plan("dpm_fast", fs.Grid.from_ratios(EDM, ratios)), EDM)
    clean = end(plan("dpm_fast", fs.Grid.from_ratios(EDM, [*ratios, 0.0])), EDM)
    torch.testing.assert_close(clean, exact(noisy, torch.tensor([ratios[-1]])), rtol=0, atol=1e-7)


# ---- order -----------------------------------------------------------------------------------

ORDERS = [
    ("dpm_solver_1", {}, 1),
    ("dpm_solver_2", {}, 2),
    ("dpm_solver_2", {"solver_type": "heun", "r1": 0.7}, 2),
    ("dpm_solver_3", {}, 3),
    ("dpm_solver_3", {"solver_type": "heun"}, 3),
    ("dpm_solver_3", {"r2": 0.5}, 2),
    ("dpmpp_2s", {}, 2),
    ("dpmpp_2s", {"solver_type": "heun", "r1": 0.7}, 2),
    ("dpmpp_3s", {}, 3),
    ("dpmpp_3s", {"solver_type": "heun"}, 3),
    ("dpmpp_3s", {"solver_type": "heun", "r2": 0.5}, 2),
    ("DPMSolverSinglestepScheduler", {}, 2),
]


@pytest.mark.parametrize("process", ["edm", "flow"])
@pytest.mark.parametrize(("name", "options", "order"), ORDERS, ids=str)
def test_order(name: str, options: dict[str, Any], order: int, process: str) -> None:
    measured = measured_orders(name, options, PROCESSES[process], (60, 120))
    assert measured[-1] == pytest.approx(order, abs=0.2)


def test_third_order_is_lost_on_inner_levels_of_an_uneven_grid() -> None:
    """The steps of the test's grid differ; the inner levels of the grid's own are not at 1/3 and 2/3."""
    measured = measured_orders("dpmpp_3s", {"inner": "grid"}, EDM, (63, 123, 243))
    assert np.mean(measured) == pytest.approx(2, abs=0.35)


@pytest.mark.parametrize(("remainder", "order"), [(0, 2), (1, 2), (2, 3)])
def test_order_of_dpm_fast(remainder: int, order: int) -> None:
    """Its last steps are of lower order: of 1 where the calls are no 2 more than a multiple of 3, otherwise of 2."""
    counts = (150 + remainder, 300 + remainder)
    measured = measured_orders("dpm_fast", {}, EDM, counts)
    assert measured[-1] == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("name", ["dpmpp_2s_ancestral", "flow_dpmpp_2s_ancestral"])
def test_weak_order(name: str) -> None:
    measured = weak_orders(name, {}, FLOW, (80, 160))
    assert measured[-1] == pytest.approx(2, abs=0.2)


def test_weak_order_of_dpm_fast() -> None:
    measured = weak_orders("dpm_fast", {"eta": 1.0}, EDM, (61, 121))
    assert measured[-1] == pytest.approx(2, abs=0.2)


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_inner_levels_must_differ(name: str) -> None:
    grid = fs.Grid.from_ratios(EDM, RATIOS)
    with pytest.raises(InvalidInputError, match=r"must differ, got r1=r2=0\.5; order 3 needs"):
        fs.plan(name, grid, order=3, r1=0.5, r2=0.5)
    assert isinstance(plan(name, grid, order=2, r1=0.5, r2=0.5).instructions[0], Denoise)
    with pytest.raises(InvalidInputError, match=r"order=4 is not a whole number in 1\.\.3"):
        fs.plan(name, grid, order=4)


def test_a_single_step_serves_a_sampler_of_ones_own() -> None:
    def one_step(tape: fs.Tape, grid: fs.Grid) -> Vector:
        t, s = grid.levels
        return singlestep(tape, tape.start, stretch(grid.process, t, s, (0.5,)))

    grid = fs.Grid.from_ratios(EDM, [3.0, 0.4])
    np.testing.assert_allclose(table(plan(one_step, grid)), table(plan("dpmpp_2s", grid)))
