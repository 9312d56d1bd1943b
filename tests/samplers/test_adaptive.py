"""Solvers with a step control: against k-diffusion and scipy, tolerance by tolerance, and at the ends of the path."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import fewstep as fs
from exact_problems import FIRST, LAST, PROCESSES, START, grid, mixture, truth
from fewstep.errors import CallLimitError, InvalidInputError
from fewstep.plan import EagerPlan, Solution
from fewstep.samplers import SAMPLERS
from peer_support import k_diffusion

ADAPTIVE = [entry.name for entry in SAMPLERS if entry.family == "adaptive"]


def plan(name: str, levels: fs.Grid, **options: Any) -> EagerPlan:
    made = fs.plan(name, levels, **options)
    assert isinstance(made, EagerPlan)
    return made


def solve(name: str, process: fs.Process, noise: Any = None, **options: Any) -> Solution:
    """From the first to the last level of the mixture's grid; x in the coordinates of alpha = 1."""
    levels = grid(process, 7)
    x = levels.levels[0].alpha * START
    solution = plan(name, levels, **options).solve(mixture(process), x, noise)
    return Solution(
        solution.x / levels.levels[-1].alpha,
        solution.calls,
        solution.accepted,
        solution.rejected,
    )


def error(solution: Solution) -> float:
    return float((solution.x - truth()).abs().max())


def draws(seed: int) -> Callable[..., Tensor]:
    """The same noise for both, in the order of the accepted steps."""
    generator = torch.Generator().manual_seed(seed)
    return lambda start, end: torch.randn(START.shape, dtype=torch.float64, generator=generator)


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """k-diffusion makes its own numbers in torch's default type."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": 2},
        {"rtol": 1e-3, "atol": 1e-4},
        {"order": 2, "rtol": 1e-2, "h_init": 1.0, "accept_safety": 0.9},
        {"pcoeff": 0.2, "icoeff": 0.7, "dcoeff": 0.1},
        {"eta": 1.0},
        {"eta": 0.5, "order": 2, "s_noise": 1.1},
    ],
    ids=str,
)
def test_dpm_adaptive_takes_the_steps_of_k_diffusion(
    options: dict[str, Any], process: fs.Process
) -> None:
    denoiser = mixture(PROCESSES["edm"])

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x, fs.Level(float(sigma[0]), 1.0, float(sigma[0])))

    with doubles():
        wanted, info = k_diffusion().sample_dpm_adaptive(
            model, START, LAST, FIRST, noise_sampler=draws(3), return_info=True, **options
        )
    got = solve("dpm_adaptive", process, draws(3), **options)
    assert (got.calls, got.accepted, got.rejected) == (
        info["nfe"],
        info["n_accept"],
        info["n_reject"],
    )
    assert got.accepted > 3
    torch.testing.assert_close(got.x, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(
    ("rtol", "atol", "h_init"),
    [(1e-5, 1e-5, 0.05), (1e-3, 1e-3, 3.0), (1e-8, 1e-9, 0.05), (0.0, 1e-10, 2.0)],
)
def test_rk45_takes_the_steps_of_scipy(
    rtol: float, atol: float, h_init: float, process: fs.Process
) -> None:
    denoiser = mixture(PROCESSES["edm"])

    def slope(log_snr: float, flat: np.ndarray) -> np.ndarray:
        x, ratio = torch.from_numpy(flat).view_as(START), math.exp(-log_snr)
        return (denoiser(x, fs.Level(ratio, 1.0, ratio)) - x).flatten().numpy()

    span, x = (-math.log(FIRST), -math.log(LAST)), START.flatten().numpy()
    # scipy warns of a relative tolerance below rounding and takes that instead
    tolerances = {"rtol": max(rtol, 3e-14), "atol": atol}
    wanted = solve_ivp(slope, span, x, method="RK45", first_step=h_init, **tolerances)
    got = solve("rk45", process, rtol=tolerances["rtol"], atol=atol, h_init=h_init)
    assert got.calls == wanted.nfev == 1 + 6 * (got.accepted + got.rejected)
    assert got.accepted == len(wanted.t) - 1
    assert got.rejected > 0 or h_init < 1
    end = torch.from_numpy(wanted.y[:, -1]).view_as(START)
    torch.testing.assert_close(got.x, end, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_error_follows_the_tolerance(name: str) -> None:
    tolerances = (1e-2, 1e-3, 1e-4, 1e-5)
    solutions = [solve(name, PROCESSES["vp"], rtol=e, atol=e, max_calls=5000) for e in tolerances]
    for tolerance, solution in zip(tolerances, solutions, strict=True):
        assert error(solution) < 50 * tolerance
    assert [s.calls for s in solutions] == sorted(s.calls for s in solutions)
    errors = [error(s) for s in solutions]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("name", "order"), [("rk45", 5), ("dpm_adaptive", 3)])
def test_more_calls_lower_the_error_in_the_stated_order(name: str, order: int) -> None:
    assert SAMPLERS.find(name).order == order
    ends = (1e-7, 1e-10) if order == 5 else (1e-4, 1e-6)
    few, many = (solve(name, PROCESSES["edm"], rtol=e, atol=e, max_calls=20000) for e in ends)
    slope = math.log(error(few) / error(many)) / math.log(many.calls / few.calls)
    # the step length is chosen for the error of the order below, so the slope is rough
    assert slope == pytest.approx(order, abs=1.0)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("order", [2, 3])
def test_steps_of_one_length_have_the_order_of_dpm_solver(order: int, process: fs.Process) -> None:
    """Without its three coefficients the control leaves the length alone, and the last step takes what is left."""
    span = math.log(FIRST / LAST)
    errors = []
    for n in (20, 40, 80):
        fixed = {"h_init": span / n, "icoeff": 0.0, "order": order}
        solution = solve("dpm_adaptive", process, max_calls=1000, **fixed)
        assert (solution.accepted, solution.rejected, solution.calls) == (n, 0, order * n)
        errors.append(error(solution))
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert measured[-1] == pytest.approx(order, abs=0.2)


def test_presets_have_the_names_of_the_paper() -> None:
    levels = grid(PROCESSES["vp"], 5)
    assert plan("DPM-Solver-12", levels).options["order"] == 2
    assert plan("dpm_solver_23", levels) == plan("DPM adaptive", levels)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_at_a_clean_end_the_result_is_the_last_estimate(name: str) -> None:
    process = PROCESSES["vp"]
    open_levels = grid(process, 5)
    levels = fs.Grid.from_ratios(process, [*open_levels.ratios, 0.0])
    last, denoiser = levels.levels[-2], mixture(process)
    x = levels.levels[0].alpha * START
    noisy = plan(name, open_levels).solve(denoiser, x)
    clean = plan(name, levels).solve(denoiser, x)
    left = plan(name, levels, last_estimate=False).solve(denoiser, x)
    torch.testing.assert_close(clean.x, denoiser(noisy.x, last), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left.x, noisy.x / last.alpha, rtol=1e-12, atol=1e-12)
    assert left.calls == noisy.calls
    # the last stage of rk45 is made at the end of the step: its estimate is there for nothing
    assert clean.calls == noisy.calls + (name != "rk45")


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("ratios", [(math.inf, 0.0), (3.0, 0.0)])
def test_one_step_to_clean_data_is_the_estimate(name: str, ratios: tuple[float, ...]) -> None:
    process = PROCESSES["flow"]
    levels = fs.Grid.from_ratios(process, ratios)
    solution = plan(name, levels).solve(mixture(process), START)
    assert solution.calls == 1
    torch.testing.assert_close(solution.x, mixture(process)(START, levels.levels[0]))


@pytest.mark.parametrize(
    ("name", "options"), [("rk45", {}), ("dpm_adaptive", {}), ("dpm_adaptive", {"eta": 0.7})]
)
def test_a_step_from_pure_noise_is_taken_by_itself(name: str, options: dict[str, Any]) -> None:
    process = PROCESSES["flow"]
    noise = fs.Noise(range(6), (2,), dtype=torch.float64)

    def run(x: Tensor, *ratios: float) -> Tensor:
        return plan(name, fs.Grid.from_ratios(process, ratios), **options).run(
            mixture(process), x, noise
        )

    x = noise.initial()
    whole = run(x, math.inf, 9.0, 0.3, 0.0)
    in_two = run(run(x, math.inf, 9.0), 9.0, 0.3, 0.0)
    torch.testing.assert_close(whole, in_two, rtol=1e-12, atol=1e-12)
    first = fs.plan("ddim", fs.Grid.from_ratios(process, [math.inf, 9.0]), **options)
    wanted = first.run(mixture(process), x, noise)
    torch.testing.assert_close(run(x, math.inf, 9.0), wanted, rtol=1e-12, atol=1e-12)


def test_fresh_noise_keeps_the_law_of_the_data() -> None:
    """Data N(0.7, 0.5^2): 40 pictures of 500 numbers each."""
    process = PROCESSES["vp"]
    denoiser = fs.exact.GaussianMixture(torch.full((1, 500), 0.7), 0.5, process=process)
    noise = fs.Noise(range(40), (500,))
    levels = fs.Grid.from_ratios(process, [40.0, 0.05])
    x0 = denoiser.sample(40, torch.Generator().manual_seed(0))
    x = levels.levels[0].alpha * x0 + levels.levels[0].sigma * noise.initial()
    tight = {"eta": 1.0, "rtol": 0.01, "atol": 0.002}
    end = levels.levels[-1]
    samples = plan("dpm_adaptive", levels, **tight).run(denoiser, x, noise).double()
    assert float(samples.mean()) == pytest.approx(0.7 * end.alpha, abs=0.03)
    wanted = math.hypot(0.5 * end.alpha, end.sigma)
    assert float(samples.std()) == pytest.approx(wanted, rel=0.03)
    quiet = plan("dpm_adaptive", levels, **tight, s_noise=0.0).run(denoiser, x).double()
    assert float(quiet.std()) < 0.9 * wanted


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_call_limit_is_an_error_with_numbers(name: str) -> None:
    message = rf"{name}/custom-7 is at t=.* after 50 network calls, \d+ accepted and \d+ rejected"
    with pytest.raises(CallLimitError, match=message):
        solve(name, PROCESSES["vp"], rtol=0.0, atol=1e-12, max_calls=50)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_tolerance_below_rounding_ends_at_the_call_limit(name: str) -> None:
    levels = grid(PROCESSES["vp"], 7)
    x = (levels.levels[0].alpha * START).float()
    eager = plan(name, levels, rtol=0.0, atol=1e-12, max_calls=200)
    with pytest.raises(CallLimitError, match="raise max_calls, or loosen rtol and atol"):
        eager.run(mixture(PROCESSES["vp"]), x)


def test_options_out_of_range_are_refused() -> None:
    levels = grid(PROCESSES["vp"], 5)
    for options, message in (
        ({"rtol": -1.0}, "rtol=-1.0 is not a number in 0..1"),
        ({"atol": 0.0}, "atol=0.0 is not a number in 1e-12..10"),
        ({"max_calls": 0}, "max_calls=0 is not a whole number >= 1"),
        ({"order": 4}, "order=4 is not one of 2, 3"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            fs.plan("dpm_adaptive", levels, **options)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_pictures_do_not_depend_on_each_other_and_record_their_calls(name: str) -> None:
    process = PROCESSES["vp"]
    centres = torch.tensor([[0.9, 0.1], [-0.6, -0.9]])
    denoiser = fs.exact.GaussianMixture(centres, 0.05, process=process)
    options = {"rtol": 1e-4, "atol": 1e-4, "h_init": 2.0}
    settings = {"sampler": name, "steps": 10, "sampler_options": options}
    three = fs.sample(denoiser, n=3, seed=4, **settings)
    alone = fs.sample(denoiser, n=1, seed=6, **settings)
    assert torch.equal(three.images[2:], alone.images)
    calls, rejected = three.record["network_calls"], three.record["rejected_steps"]
    assert len(calls) == len(rejected) == 3
    assert alone.record["network_calls"] == calls[2:]
    assert alone.record["rejected_steps"] == rejected[2:]
    assert min(calls) > 20
    assert max(rejected) > 0
    together = fs.sample(denoiser, n=3, seed=4, batch_size=3, **settings)
    assert len(set(together.record["network_calls"])) == 1
    torch.testing.assert_close(together.images, three.images, rtol=0, atol=0.01)
