"""SA-Solver: against diffusers and the integrals of the paper, with the same noise."""

from __future__ import annotations

import math
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
from exact_problems import PROCESSES, measured_orders, mixture, weak_orders
from fewstep.plan import Denoise, Draw
from fewstep.plan.rules import expand
from peer_support import doubled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EVERYWHERE = {"s_tmin": 0.0, "s_tmax": math.inf}
SMOOTH = (np.linspace(20.0 ** (1 / 7), 0.05 ** (1 / 7), 11) ** 7).tolist()
ROUGH = [30.0, 12.0, 11.0, 4.0, 1.5, 1.3, 0.5, 0.2]
START = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def draws() -> Callable[..., Tensor]:
    """Each call gives the next of always the same draws."""
    generator = torch.Generator().manual_seed(4)
    return lambda *_, **__: torch.randn(START.shape, dtype=torch.float64, generator=generator)


def ours(grid: fs.Grid, **options: Any) -> Tensor:
    """The end of the path."""
    x = grid.levels[0].sigma * START
    return fs.plan("sa_solver", grid, **options).run(mixture(grid.process), x, draws())


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "orders", [(1, 1), (1, 2), (2, 2), (3, 2), (2, 3), (3, 4)], ids=lambda o: f"P{o[0]}C{o[1]}"
)
def test_diffusers(orders: tuple[int, int], tau: float) -> None:
    """Matched: its shortcut for two estimates, which is no option there; no lower orders at the end.

    Its tau is taken where a step starts, ours where it ends; it ends short of clean data.
    """
    schedulers = pytest.importorskip("diffusers.schedulers")
    for ratios in (SMOOTH, ROUGH):
        grid = fs.Grid.from_ratios(PROCESSES["vp"], ratios)
        stochastic = [0.3 <= s.ratio <= 9.0 for _, s in grid.steps]
        times = torch.arange(len(stochastic), 0, -1)
        taus = dict(zip(times.tolist(), [tau * on for on in stochastic], strict=True))
        scheduler = schedulers.SASolverScheduler(
            predictor_order=orders[0],
            corrector_order=orders[1],
            prediction_type="sample",
            lower_order_final=False,
            tau_func=lambda t, taus=taus: torch.tensor(taus[int(t)], dtype=torch.float64),
        )
        scheduler.set_timesteps(len(stochastic))
        scheduler.sigmas = torch.tensor(ratios, dtype=torch.float64)
        scheduler.timesteps = times
        x, left = grid.levels[0].sigma * START, draws()
        noises = [left() if tau and on else torch.zeros_like(x) for on in stochastic]
        module = f"{type(scheduler).__module__}.randn_tensor"
        with doubled(), mock.patch(module, side_effect=noises):
            for t, level in zip(times, grid.levels, strict=False):
                x = scheduler.step(mixture(grid.process)(x, level), t, x).prev_sample
        got = ours(
            grid,
            predictor_order=orders[0],
            corrector_order=orders[1],
            tau=tau,
            s_tmin=0.3,
            s_tmax=9.0,
            simple_order_2=True,
        )
        torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


def adams_weights(nodes: list[float], start: float, end: float, eta: float) -> list[float]:
    """The integrals of the Lagrange polynomials over log_snr, `(1 + eta) int e^(-(1 + eta) (end - u)) l_j(u) du`."""

    def lagrange(j: int, u: float) -> float:
        return math.prod(
            (u - other) / (nodes[j] - other) for k, other in enumerate(nodes) if k != j
        )

    def integrand(u: float, j: int) -> float:
        return (1 + eta) * math.exp(-(1 + eta) * (end - u)) * lagrange(j, u)

    return [
        quad(integrand, start, end, args=(j,), epsabs=1e-13, epsrel=1e-12)[0]
        for j in range(len(nodes))
    ]


def sa_solver_of_the_paper(
    grid: fs.Grid, predictor: int, corrector: int, tau: float, pece: bool, s_noise: float
) -> Tensor:
    """Algorithm 1 in x / alpha; the orders fall towards clean data as in ComfyUI."""
    ratios = grid.ratios
    at = [-math.log(r) if r else math.inf for r in ratios]
    n, clean = len(ratios) - 1, ratios[-1] == 0

    def denoise(x: Tensor, i: int) -> Tensor:
        return mixture(grid.process)(grid.levels[i].alpha * x, grid.levels[i])

    def step(x: Tensor, i: int, order: int, newest: int, eta: float, noise: Tensor) -> Tensor:
        """From point i to i + 1 with the last `order` estimates up to the newest."""
        used = list(range(newest, newest - order, -1))
        weights = adams_weights([at[k] for k in used], at[i], at[i + 1], eta)
        h = at[i + 1] - at[i]
        total = sum(w * ds[k] for w, k in zip(weights, used, strict=True))
        return math.exp(-(1 + eta) * h) * x + total + noise

    left, ds, corrected = draws(), [], grid.levels[0].sigma / grid.levels[0].alpha * START
    x, last = corrected, None
    for i in range(n):
        ds.append(denoise(x, i))
        c = min(corrector, i + 1, n - i) if clean else min(corrector, i + 1)
        if last is not None and c > 0 and (pece or ratios[i + 1] > 0):
            x = step(corrected, i - 1, c, i, *last)
            if pece:
                ds[i] = denoise(x, i)
        if ratios[i + 1] == 0:
            return ds[i]
        eta = tau**2 if 0.3 <= ratios[i + 1] <= 9.0 else 0.0
        h, noise = at[i + 1] - at[i], torch.zeros_like(x)
        if eta and s_noise:
            noise = s_noise * ratios[i + 1] * math.sqrt(1 - math.exp(-2 * eta * h)) * left()
        corrected, last = x, (eta, noise)
        p = min(predictor, i + 1, n - 1 - i) if clean else min(predictor, i + 1)
        x = step(corrected, i, p, i, *last)
    return grid.levels[-1].alpha * x


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("pece", [False, True])
@pytest.mark.parametrize(
    ("predictor", "corrector", "tau", "s_noise"),
    [(3, 4, 1.0, 1.0), (2, 0, 1.0, 0.9), (2, 3, 0.7, 1.1), (1, 1, 1.0, 0.0), (4, 4, 0.0, 1.0)],
)
def test_the_paper(
    predictor: int,
    corrector: int,
    tau: float,
    s_noise: float,
    pece: bool,
    clean: bool,
    process: fs.Process,
) -> None:
    grid = fs.Grid.from_ratios(process, [*ROUGH, *([0.0] if clean else [])])
    wanted = sa_solver_of_the_paper(grid, predictor, corrector, tau, pece, s_noise)
    got = ours(
        grid,
        predictor_order=predictor,
        corrector_order=corrector,
        tau=tau,
        s_tmin=0.3,
        s_tmax=9.0,
        s_noise=s_noise,
        pece=pece,
    )
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


# ---- orders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pece", [False, True])
@pytest.mark.parametrize(
    ("predictor", "corrector", "order"), [(1, 2, 2), (2, 3, 3), (3, 4, 4), (2, 0, 2), (3, 0, 3)]
)
def test_order_of_the_ode(predictor: int, corrector: int, order: int, pece: bool) -> None:
    """One more than the predictor's with a corrector that uses one estimate more."""
    options = {"predictor_order": predictor, "corrector_order": corrector, "pece": pece}
    measured = measured_orders("sa_solver", {**options, "tau": 0.0}, PROCESSES["vp"], (60, 120))
    assert measured == [pytest.approx(order, abs=0.2)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        EVERYWHERE,
        {"pece": True},
        {"predictor_order": 2, "corrector_order": 0},
        {"predictor_order": 2, "corrector_order": 2, "simple_order_2": True},
    ],
    ids=str,
)
def test_weak_order(options: dict[str, Any]) -> None:
    measured = weak_orders("sa_solver", options, PROCESSES["flow"], (160, 320))
    assert measured == [pytest.approx(2, abs=0.2)]


# ---- identities ------------------------------------------------------------------------------


def table(name: str, grid: fs.Grid, options: dict[str, Any]) -> np.ndarray:
    """Every evaluated point and the result, written out in the start, the outputs and the draws."""
    plan = fs.plan(name, grid, **options)
    rows = expand(plan.instructions, plan.result, plan.levels[-1])
    return np.array([[row.start, *row.outputs, *row.draws] for row in rows])


SAME = [
    *(
        (
            {
                "predictor_order": p,
                "corrector_order": p + 1,
                "tau": 0.0,
                "simple_order_2": True,
            },
            "unipc",
            {"order": p, "variant": "bh1"},
        )
        for p in (1, 2, 3, 4)
    ),
    ({"predictor_order": 1, "corrector_order": 0, **EVERYWHERE}, "ddpm", {}),
    (
        {"predictor_order": 2, "corrector_order": 0, **EVERYWHERE},
        "dpmpp_2m_sde",
        {"solver_type": "heun"},
    ),
    (
        {"predictor_order": 3, "corrector_order": 0, "tau": 0.5, **EVERYWHERE},
        "dpmpp_3m_sde",
        {"eta": 0.25, "corrected": True},
    ),
]


@pytest.mark.parametrize(("options", "other", "others"), SAME, ids=str)
def test_the_same_method(options: dict[str, Any], other: str, others: dict[str, Any]) -> None:
    for ratios in (SMOOTH, [math.inf, *ROUGH]):
        grid = fs.Grid.from_ratios(PROCESSES["flow"], ratios)
        np.testing.assert_allclose(
            table("sa_solver", grid, options), table(other, grid, others), rtol=1e-9, atol=1e-12
        )


def test_pece_of_first_order_is_exponential_heun() -> None:
    """But for the last point, which is not corrected."""
    grid = fs.Grid.from_ratios(PROCESSES["flow"], SMOOTH)
    points: dict[str, list[Tensor]] = {"sa_solver_pece": [], "exp_heun_2_x0_sde": []}
    options = {"predictor_order": 1, "corrector_order": 2, **EVERYWHERE}
    for name, seen in points.items():
        plan = fs.plan(name, grid, **(options if name == "sa_solver_pece" else {}))

        def keep(step: fs.Progress, seen: list[Tensor] = seen) -> None:
            seen.append(step.x)

        plan.run(mixture(grid.process), grid.levels[0].sigma * START, draws(), keep)
    assert [len(seen) for seen in points.values()] == [19, 20]
    for a, b in zip(*points.values(), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_noise_is_drawn_on_the_way_to_levels_of_the_interval() -> None:
    grid = fs.Grid.from_ratios(PROCESSES["edm"], [*ROUGH, 0.0])
    plan = fs.plan("sa_solver", grid, s_tmin=0.5, s_tmax=4.0)
    ends = [i.end.ratio for i in plan.instructions if isinstance(i, Draw)]
    assert ends == [4.0, 1.5, 1.3, 0.5]
    assert fs.plan("sa_solver", grid, tau=0.0).draws == 0
    assert fs.plan("sa_solver", grid, s_noise=0.0).draws == 0


def test_pece_evaluates_each_corrected_point() -> None:
    grid = fs.Grid.from_ratios(PROCESSES["edm"], [*ROUGH, 0.0])
    n = len(grid.steps)
    for name, calls in (("sa_solver", n), ("sa_solver_pece", 2 * n - 1)):
        plan = fs.plan(name, grid)
        levels = [i.level for i in plan.instructions if isinstance(i, Denoise)]
        assert plan.calls == calls
        assert all(a.ratio >= b.ratio for a, b in pairwise(levels))
