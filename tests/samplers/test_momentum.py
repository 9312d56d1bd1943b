"""The community's samplers, against their recursions written on tensors in `x / alpha`, and their measured orders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import exact_problems
import fewstep as fs
from exact_problems import PROCESSES, label, law, mixture, run, true_law, truth
from fewstep.plan import Denoise, Draw, Plan
from fewstep.plan.rules import expand
from fewstep.samplers import SAMPLERS

EDM = PROCESSES["edm"]
RATIOS = [14.6, 9.0, 5.5, 3.2, 2.1, 1.2, 0.8, 0.45, 0.2, 0.08, 0.0]
SHAPE = (5, 2)
Model = Callable[[Tensor, float], Tensor]


def noise(ratio: float, lap: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * lap + round(100 * ratio))
    return torch.randn(SHAPE, dtype=torch.float64, generator=generator)


class Laps:
    """The draws of a step by the level where it begins, on several laps."""

    def __init__(self, lap: int = 0) -> None:
        self.lap = lap

    def on_lap(self, lap: int) -> Laps:
        return Laps(lap)

    def __call__(self, start: fs.Level, end: fs.Level) -> Tensor:
        return noise(start.ratio, self.lap)


def model(x: Tensor, ratio: float) -> Tensor:
    return mixture(EDM)(x, fs.Level(ratio, 1.0, ratio))


def ours(name: str, process: fs.Process, ratios: list[float], **options: Any) -> Tensor:
    """The end of the run in `x / alpha`, from `RATIOS[0]` times the draw of lap 9."""
    grid = fs.Grid.from_ratios(process, ratios)
    first, last = grid.levels[0], grid.levels[-1]
    x = first.sigma * noise(ratios[0], 9)
    return fs.plan(name, grid, **options).run(mixture(process), x, Laps()) / last.alpha


def steps(ratios: list[float]) -> Iterator[tuple[int, float, float]]:
    return ((i, *pair) for i, pair in enumerate(zip(ratios, ratios[1:], strict=False)))


def ancestral(t: float, s: float, eta: float) -> tuple[float, float]:
    """As k-diffusion writes it; 0 noise where the step goes nowhere."""
    up = min(s, eta * (s**2 * (t**2 - s**2) / t**2) ** 0.5)
    return (s**2 - up**2) ** 0.5, up


class Velocity:
    """`momentum (time + offset)` of the old, the rest of the new, with `offset = -momentum / 2`."""

    def __init__(self, momentum: float) -> None:
        self.momentum, self.value = momentum, None

    def __call__(self, difference: Tensor, time: float) -> Tensor:
        if self.value is None:
            self.value = difference
        else:
            c = self.momentum * (time - self.momentum / 2)
            self.value = c * self.value + (1 - c) * difference
        return self.value


def published_correction(d: list[Tensor], h: list[float], length: float) -> Tensor | None:
    """What is added for one, two and three earlier estimates; in the phi functions of the originals."""
    phi_2 = math.expm1(-length) / length + 1
    phi_3 = phi_2 / length - 0.5
    if len(d) == 1:
        return None
    if len(d) == 2:
        return phi_2 * (d[0] - d[1]) / (h[1] / h[0])
    if len(d) == 3:
        r0, r1 = h[1] / h[0], h[2] / h[0]
        d0, d1 = (d[0] - d[1]) / r0, (d[1] - d[2]) / r1
        slope, curve = d0 + (d0 - d1) * r0 / (r0 + r1), (d0 - d1) / (r0 + r1)
        return phi_2 * slope - phi_3 * curve
    r0, r1, r2 = h[3] / h[2], h[2] / h[0], h[0] / h[1]
    d0, d1, d2 = (d[0] - d[1]) / r2, (d[1] - d[2]) / r1, (d[2] - d[3]) / r0
    third = ((d0 - d1) * r2 / (r2 + r1) - (d1 - d2) * r1 / (r0 + r1)) / ((r2 + r1) * (r0 + r1))
    slope = d0 + (d0 - d1) * r2 / (r2 + r1) + third * r2
    curve = (d0 - d1) / (r2 + r1) + third
    return phi_2 * slope - phi_3 * curve


def dancing(eta: float = 1.0, eta_dance: float = 1.0, leap: int = 2) -> Tensor:
    """The original, with the square root of a negative number read as "all fresh"."""
    x = RATIOS[0] * noise(RATIOS[0], 9)
    for i, t, s in steps(RATIOS):
        denoised = model(x, t)
        dances = leap > 1 and i + leap < len(RATIOS) and RATIOS[i + leap] > 0
        low = RATIOS[i + leap] if dances else s
        down, up = ancestral(t, low, eta)
        x = x + (x - denoised) / t * (down - t) + up * noise(t, 1 if dances else 0)
        if dances:
            fresh = s * eta_dance
            kept = math.sqrt(s**2 - fresh**2)
            x = x + (x - denoised) / low * (kept - low) + fresh * noise(t, 0)
    return x


def dual(eta: float = 1.0, r: float = 0.5, momentum: float = 0.0) -> Tensor:
    """The original, which overwrites r."""
    x = RATIOS[0] * noise(RATIOS[0], 9)
    first, second, third = (Velocity(momentum) for _ in range(3))
    d: list[Tensor] = []
    h: list[float] = []
    for _, t, s in steps(RATIOS):
        time, denoised = t / RATIOS[0], model(x, t)
        if s == 0:
            return denoised
        h = [math.log(t / s), *h][:4]
        middle = t * math.exp(-r * h[0])
        factor = 1 / (2 * r)
        down, up = ancestral(t, middle, eta)
        stage = down / t * x + first((1 - down / t) * denoised, time) + up * noise(t, 1)
        d = [(1 - factor) * denoised + factor * model(stage, middle), *d][:4]
        down, up = ancestral(t, s, eta)
        x = down / t * x + second((1 - down / t) * d[0], time)
        added = published_correction(d, h, (1 + eta) * h[0])
        if added is not None:
            x = x + third(added, time)
        if len(d) == 2:
            r = h[1] / h[0]
        x = x + up * noise(t, 0)
    raise AssertionError


def clyb(eta: float = 1.0, momentum: float = 0.0) -> Tensor:
    x = RATIOS[0] * noise(RATIOS[0], 9)
    first, second = Velocity(momentum), Velocity(momentum)
    d: list[Tensor] = []
    h: list[float] = []
    for _, t, s in steps(RATIOS):
        time = t / RATIOS[0]
        d = [model(x, t), *d][:4]
        if s == 0:
            return d[0]
        h = [math.log(t / s), *h][:4]
        length = (1 + eta) * h[0]
        x = math.exp(-length) * x + first(-math.expm1(-length) * d[0], time)
        added = published_correction(d, h, length)
        if added is not None:
            x = x + second(added, time)
        x = x + s * math.sqrt(-math.expm1(-2 * eta * h[0])) * noise(t, 0)
    raise AssertionError


def res(ita: float = 0.25, c2: float = 0.5, momentum: float = 0.0) -> Tensor:
    """Algorithm 1 of the paper in its phi functions, after churn; the last call at the current level."""

    def phi_1(z: float) -> float:
        return (math.exp(z) - 1) / z

    def phi_2(z: float) -> float:
        return (math.exp(z) - 1 - z) / z**2

    x = RATIOS[0] * noise(RATIOS[0], 9)
    first, second = Velocity(momentum), Velocity(momentum)
    for _, t, s in steps(RATIOS):
        if s == 0:
            return model(x, t)
        time, high = t / RATIOS[0], t * (1 + ita)
        x = x + math.sqrt(high**2 - t**2) * noise(t, 1)
        h = math.log(high / s)
        denoised = model(x, high)
        stage = math.exp(-c2 * h) * x + first(c2 * h * phi_1(-c2 * h) * denoised, time)
        b2 = phi_2(-h) / c2
        b1 = phi_1(-h) - b2
        both = h * (b1 * denoised + b2 * model(stage, high * math.exp(-c2 * h)))
        x = math.exp(-h) * x + second(both, time)
    raise AssertionError


PUBLISHED: list[tuple[str, Callable[..., Tensor], dict[str, Any]]] = [
    *(
        ("euler_ancestral_dancing", dancing, options)
        for options in (
            {},
            {"eta": 0.5},
            {"leap": 4},
            {"leap": 1, "eta": 0.7},
            {"eta_dance": 0.0},
            {"eta_dance": 0.0, "eta": 0.6, "leap": 3},
            {"eta_dance": 0.4, "eta": 0.8, "leap": 3},
        )
    ),
    *(
        ("dpmpp_dualsde_momentumized", dual, options)
        for options in ({}, {"eta": 0.0}, {"momentum": 0.5, "eta": 0.5}, {"r": 0.7})
    ),
    *(
        ("clyb_4m_sde_momentumized", clyb, options)
        for options in ({}, {"eta": 0.0}, {"momentum": 0.5, "eta": 0.5}, {"momentum": -0.7})
    ),
    *(
        ("res_momentumized", res, options)
        for options in ({}, {"ita": 0.0}, {"c2": 0.8, "ita": 0.1}, {"momentum": 0.5})
    ),
]


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("name", "published", "options"), PUBLISHED, ids=label)
def test_the_sampler_is_the_published_recursion(
    name: str, published: Callable[..., Tensor], options: dict[str, Any], process: fs.Process
) -> None:
    """The originals know no alpha; in `x / alpha` over `sigma / alpha` they hold on every path."""
    wanted = published(**options)
    got = ours(name, process, RATIOS, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


# ---- orders ----------------------------------------------------------------------------------


def smooth(process: fs.Process, count: int, first: float = 100.0) -> fs.Grid:
    return fs.Grid.from_ratios(
        process, np.linspace(first ** (1 / 7), 0.05 ** (1 / 7), count + 1) ** 7
    )


def smooth_order(name: str, options: dict[str, Any], *counts: int) -> float:
    """On a smooth grid."""
    errors = []
    for count in counts:
        grid = smooth(EDM, count)
        torch_start = 100.0 * torch.randn(
            6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        end = fs.plan(name, grid, **options).run(mixture(EDM), torch_start)
        errors.append(float((end - truth(100.0)).abs().max()))
    return math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0])


def abrupt_order(name: str, options: dict[str, Any], *counts: int) -> float:
    """On a grid where every second step is twice as long."""
    errors = [
        float((run(name, options, EDM, n, 100.0) - truth(100.0)).abs().max()) for n in counts
    ]
    return math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0])


def weak_order(name: str, grid: Callable[[int], fs.Grid], **options: Any) -> float:
    errors = []
    for count in (320, 640):
        plan = fs.plan(name, grid(count), **options)
        assert isinstance(plan, Plan)
        errors.append(abs(law(plan)[1] - true_law(plan)[1]))
    return math.log2(errors[0] / errors[1])


def abrupt(count: int) -> fs.Grid:
    return exact_problems.grid(EDM, count)


def geometric(count: int) -> fs.Grid:
    return fs.Grid.from_ratios(EDM, np.geomspace(40.0, 0.05, count + 1))


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("euler_ancestral_dancing", {"eta": 0.0, "eta_dance": 0.0}, 1),
        ("dpmpp_dualsde_momentumized", {"eta": 0.0}, 1),
        ("dpmpp_dualsde_momentumized", {"eta": 0.0, "corrected": True}, 2),
        ("clyb_4m_sde_momentumized", {"eta": 0.0}, 1),
        ("clyb_4m_sde_momentumized", {"eta": 0.0, "corrected": True}, 4),
        ("res_momentumized", {"ita": 0.0}, 2),
        ("res_momentumized", {"ita": 0.0, "momentum": 0.5}, 1),
        ("dpmpp_dualsde_momentumized", {"eta": 0.0, "momentum": 0.5, "corrected": True}, 1),
    ],
    ids=label,
)
def test_order_without_noise(name: str, options: dict[str, Any], order: int) -> None:
    assert abrupt_order(name, options, 160, 320) == pytest.approx(order, abs=0.2)


def test_the_published_four_steps_are_of_second_order_where_steps_change_little() -> None:
    """Each is divided by an inverted ratio of steps, which only then is nearly the ratio."""
    options = {"eta": 0.0}
    assert smooth_order("clyb_4m_sde_momentumized", options, 160, 320) == pytest.approx(2, abs=0.2)
    right = {"eta": 0.0, "corrected": True}
    assert smooth_order("clyb_4m_sde_momentumized", right, 80, 160) == pytest.approx(4, abs=0.25)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ["dpmpp_dualsde_momentumized", "clyb_4m_sde_momentumized"])
def test_weak_order_is_as_stated(name: str, corrected: bool) -> None:
    """Where every second step is twice as long; on equal steps in log_snr the published methods have order 2."""
    entry = SAMPLERS.find(name)
    order = weak_order(name, abrupt, corrected=corrected)
    assert order == pytest.approx(entry.corrected_order if corrected else entry.order, abs=0.2)
    assert weak_order(name, geometric, corrected=corrected) == pytest.approx(2, abs=0.2)


def test_with_another_eta_the_double_correction_costs_an_order() -> None:
    """With eta = 1 the estimate is a martingale, and a change that is counted twice is noise at that."""
    order = weak_order("dpmpp_dualsde_momentumized", geometric, eta=0.5)
    assert order == pytest.approx(1, abs=0.2)
    order = weak_order("dpmpp_dualsde_momentumized", geometric, eta=0.5, corrected=True)
    assert order == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("name", ["euler_ancestral_dancing", "res_momentumized"])
def test_what_renews_noise_at_every_step_has_no_order(name: str) -> None:
    assert SAMPLERS.find(name).order == 0
    assert weak_order(name, geometric) < 0.5


# ---- identities ------------------------------------------------------------------------------


def table(name: str, grid: fs.Grid, **options: Any) -> np.ndarray:
    plan = fs.plan(name, grid, **options)
    assert isinstance(plan, Plan)
    rows = expand(plan.instructions, plan.result, plan.levels[-1])
    return np.array([[row.start, *row.outputs, *row.draws] for row in rows])


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.fixture(params=PROCESSES.values(), ids=PROCESSES)
def grid(request: pytest.FixtureRequest) -> fs.Grid:
    process = request.param
    pure = [] if process.name == "edm" else [math.inf]
    return fs.Grid.from_ratios(process, [*pure, 20.0, 7.0, 6.5, 2.0, 0.9, 0.3, 0.29, 0.0])


def test_dancing_is_lcm_but_for_the_last_steps(grid: fs.Grid) -> None:
    """With the defaults the last noisy level alone is reached by an ancestral Euler step."""
    got = table("euler_ancestral_dancing", grid)
    lcm, euler = table("lcm", grid), table("euler_ancestral", grid)
    assert_same(got[:-2], lcm[:-2])
    assert not np.allclose(got[-2], lcm[-2])
    last_step = fs.Grid(grid.process, grid.levels[-3:])
    assert_same(table("euler_ancestral_dancing", last_step), table("euler_ancestral", last_step))
    assert_same(table("euler_ancestral_dancing", grid, leap=1), euler)
    assert_same(table("euler_ancestral_dancing", grid, leap=16), euler)
    still = table("euler_ancestral_dancing", grid, eta=0.0, eta_dance=0.0, leap=3)
    assert_same(still, table("euler", grid))


def test_the_corrected_dual_sde_is_dpmpp_sde(grid: fs.Grid) -> None:
    for options in ({}, {"eta": 0.6}, {"r": 0.4}, {"r": 1.0}):
        got = table("dpmpp_dual_sde_momentumized", grid, corrected=True, **options)
        assert_same(got, table("dpmpp_sde", grid, **options))


def test_with_two_earlier_estimates_clyb_is_the_3m_sde(grid: fs.Grid) -> None:
    pure = grid.levels[0].is_pure_noise
    start = fs.Grid(grid.process, grid.levels[: 4 + pure])
    for options in ({}, {"eta": 0.0}, {"eta": 0.5, "corrected": True}):
        got = table("clyb_4m_sde_momentumized", start, **options)
        assert_same(got, table("dpmpp_3m_sde", start, **options))
    longer = fs.Grid(grid.process, grid.levels[: 5 + pure])
    assert not np.allclose(
        table("clyb_4m_sde_momentumized", longer), table("dpmpp_3m_sde", longer)
    )


def test_res_without_churn_is_seeds_2_without_noise(grid: fs.Grid) -> None:
    for place in (0.5, 0.8, 1.0):
        got = table("res_momentumized", grid, ita=0.0, c2=place)
        assert_same(got, table("seeds_2", grid, eta=0.0, r=place, solver_type="phi_2"))


def test_res_raises_each_level_and_ends_at_its_own() -> None:
    """The original's last call is at the level before; this one is at the last level with noise in it."""
    plan = fs.plan("res_momentumized", fs.Grid.from_ratios(EDM, [8.0, 2.0, 0.5, 0.0]))
    assert isinstance(plan, Plan)
    asked = [i.level.ratio for i in plan.instructions if isinstance(i, Denoise)]
    assert asked == pytest.approx([10.0, math.sqrt(20.0), 2.5, math.sqrt(1.25), 0.5])
    assert all(i.lap == 1 for i in plan.instructions if isinstance(i, Draw))


MOMENTUMIZED = [
    "dpmpp_dual_sde_momentumized",
    "clyb_4m_sde_momentumized",
    "res_momentumized",
]


@pytest.mark.parametrize("name", MOMENTUMIZED)
def test_momentum_misses_even_an_estimate_that_stays_the_same(name: str) -> None:
    """So it breaks the signal rule, by a bias that shrinks with the steps; the noise stays right."""
    plan = fs.plan(name, geometric(20), momentum=0.5)
    assert isinstance(plan, Plan)
    assert plan.inexact == ("signal",)
    *_, last = expand(plan.instructions, plan.result, plan.levels[-1])
    assert math.hypot(last.start * 40.0, np.linalg.norm(last.draws)) == pytest.approx(0.05)
    unequal = fs.plan(name, fs.Grid.from_ratios(EDM, [40.0, 30.0, 4.0, 1.0]), momentum=0.5)
    assert isinstance(unequal, Plan)
    *_, last = expand(unequal.instructions, unequal.result, unequal.levels[-1])
    assert abs(last.start + last.outputs.sum() - 1) > 1e-3
    assert fs.plan(name, geometric(20)).inexact == ()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", MOMENTUMIZED)
@pytest.mark.parametrize("momentum", [-1.0, 0.3, 1.0])
def test_momentum_starts_after_pure_noise(name: str, momentum: float) -> None:
    process, ratios = fs.process.flow(), [math.inf, 9.0, 3.0, 1.0, 0.3, 0.0]
    draws = fs.Noise(range(5), (2,), dtype=torch.float64)

    def end(x: Tensor, *ratios: float) -> Tensor:
        plan = fs.plan(name, fs.Grid.from_ratios(process, ratios), momentum=momentum)
        return plan.run(mixture(process), x, draws)

    in_two = end(end(draws.initial(), *ratios[:2]), *ratios[1:])
    torch.testing.assert_close(end(draws.initial(), *ratios), in_two, rtol=1e-12, atol=1e-12)
