"""CFG++ samplers, against ComfyUI's formulas written out on tensors, closed forms and their relatives without CFG++.

ComfyUI cannot be installed as a library, so what it computes stands here in its own variables: `alpha = 1`, and sigma
for our `sigma / alpha`. Our result on every process must be that one in `x / alpha`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import fewstep as fs
from exact_problems import NORMAL, PROCESSES, guided_mixture, label, mixture
from fewstep.plan import Plan
from fewstep.samplers import SAMPLERS

Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""The guided and the weak estimate at a point of alpha = 1 and a sigma."""

SMOOTH = np.geomspace(30, 0.05, 9).tolist()
ROUGH = [20.0, 7.0, 6.5, 2.0, 0.9, 0.3, 0.29]
GRIDS = {"smooth": SMOOTH, "rough": ROUGH, "clean": [*ROUGH, 0.0], "one step": [3.0, 0.0]}


def denoiser_of(process: fs.Process) -> fs.AutoGuided:
    """Exact estimates of two different data sets: neither push nor slopes vanish."""
    strong, weak = mixture(process), guided_mixture(process).weak
    assert weak is not None
    return fs.AutoGuided(strong, weak, 0.7)


def on_edm(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Guidance written out: away from the weak estimate, 0.7 of the way to the strong one."""
    level, edm = fs.Level(sigma, 1.0, sigma), PROCESSES["edm"]
    strong, weak = mixture(edm)(x, level), guided_mixture(edm).guided_pair(x, level)[1]
    return weak + 0.7 * (strong - weak), weak


def ancestral(sigma: float, to: float, eta: float) -> tuple[float, float]:
    """k-diffusion's `get_ancestral_step`."""
    up = min(to, eta * (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5)
    return (to**2 - up**2) ** 0.5, up


# ---- the published formulas ------------------------------------------------------------------


def euler(
    pair: Pair, x: Tensor, sigmas: Sequence[float], z: Iterator[Tensor], eta: float = 0.0
) -> Tensor:
    for sigma, to in zip(sigmas, sigmas[1:], strict=False):
        guided, weak = pair(x, sigma)
        down, up = ancestral(sigma, to, eta)
        x = guided + (x - weak) / sigma * down
        if up > 0:
            x = x + up * next(z)
    return x


def two_m(
    pair: Pair, x: Tensor, sigmas: Sequence[float], z: Iterator[Tensor], corrected: bool = False
) -> Tensor:
    old = None
    for i in range(len(sigmas) - 1):
        guided, weak = pair(x, sigmas[i])
        kept = sigmas[i + 1] / sigmas[i]
        mixed = guided - kept * weak
        if old is not None and sigmas[i + 1] > 0:
            r = math.log(sigmas[i - 1] / sigmas[i]) / math.log(sigmas[i] / sigmas[i + 1])
            mixed = mixed + (1 - kept) / (2 * r) * ((weak if corrected else guided) - old)
        x, old = kept * x + mixed, weak
    return x


def two_s(
    pair: Pair,
    x: Tensor,
    sigmas: Sequence[float],
    z: Iterator[Tensor],
    eta: float = 1.0,
    variable: str = "ratio",
) -> Tensor:
    for sigma, to in zip(sigmas, sigmas[1:], strict=False):
        guided, weak = pair(x, sigma)
        down, up = ancestral(sigma, to, eta)
        if variable == "flow_time":  # t = sigma / (1 + sigma), and the kept part is at t_down
            t, t_to = sigma / (1 + sigma), to / (1 + to)
            t_down = t_to * (1 + (t_to / t - 1) * eta)
            down = t_down / (1 - t_down)
            up = (to**2 - down**2) ** 0.5
        if down == 0:
            x = weak
        else:
            between = math.sqrt(sigma * down)
            stage = between / sigma * x + (1 - between / sigma) * weak
            x = down / sigma * x + (1 - down / sigma) * pair(stage, between)[1]
        if up > 0:
            x = x + up * next(z)
        x = x + guided - weak
    return x


def res(
    pair: Pair,
    x: Tensor,
    sigmas: Sequence[float],
    z: Iterator[Tensor],
    eta: float = 0.0,
    corrected: bool = False,
) -> Tensor:
    """With phi functions of the step, as published; or with the push afterwards."""
    old, old_h = None, math.nan
    for i in range(len(sigmas) - 1):
        sigma = sigmas[i]
        guided, weak = pair(x, sigma)
        down, up = ancestral(sigma, sigmas[i + 1], eta)
        if down == 0 or old is None:
            x = guided + (x - weak) / sigma * down
        else:
            h = math.log(sigma / down)
            phi_1 = (1 - math.exp(-h)) / h
            phi_2 = (1 - phi_1) / h
            c_2 = -old_h / h
            x = x if corrected else x + (guided - weak)
            x = math.exp(-h) * x + h * ((phi_1 - phi_2 / c_2) * weak + phi_2 / c_2 * old)
            x = x + (guided - weak) if corrected else x
        if up > 0:
            x = x + up * next(z)
        old, old_h = weak, math.log(sigma / down) if down else math.nan
    return x


def gradient_estimation(
    pair: Pair, x: Tensor, sigmas: Sequence[float], z: Iterator[Tensor], gamma: float = 2.0
) -> Tensor:
    old = None
    for sigma, to in zip(sigmas, sigmas[1:], strict=False):
        guided, weak = pair(x, sigma)
        d = (x - weak) / sigma
        x = guided + d * to
        if old is not None and to > 0:
            x = x + (gamma - 1) * (d - old) * (to - sigma)
        old = d
    return x


def ud10_ab(
    pair: Pair,
    x: Tensor,
    sigmas: Sequence[float],
    z: Iterator[Tensor],
    ahead: float = 0.1,
    history: float = 0.25,
) -> Tensor:
    slopes: list[Tensor] = []
    old_d = old_guided = None
    for i in range(len(sigmas) - 1):
        sigma, to = sigmas[i], sigmas[i + 1]
        guided, weak = pair(x, sigma)
        d = (x - weak) / sigma
        further = d
        if old_d is not None:
            further = d + ahead * (to - sigma) / (sigma - sigmas[i - 1]) * (d - old_d)
        euler_step = guided + to * further - x
        slopes = [*slopes[-1:], euler_step / (to - sigma)]
        if len(slopes) == 1:
            step = euler_step
        else:
            back = sigma - sigmas[i - 1]
            newest = quad(lambda s, a=sigmas[i - 1], b=back: (s - a) / b, sigma, to)[0]
            oldest = quad(lambda s, a=sigma, b=back: (a - s) / b, sigma, to)[0]
            adams = newest * slopes[1] + oldest * slopes[0]
            step = (1 - history) * euler_step + history * adams
        x = x + step
        if to == 0 and old_guided is not None:
            x = guided - sigma * (guided - old_guided) / (sigma - sigmas[i - 1])
        old_d, old_guided = d, guided
    return x


PUBLISHED: list[tuple[str, Callable[..., Tensor], dict[str, Any]]] = [
    ("euler_cfg_pp", euler, {}),
    ("euler_ancestral_cfg_pp", euler, {"eta": 1.0}),
    ("euler_cfg_pp", euler, {"eta": 0.4}),
    ("dpmpp_2m_cfg_pp", two_m, {}),
    ("dpmpp_2m_cfg_pp", two_m, {"corrected": True}),
    ("dpmpp_2s_ancestral_cfg_pp", two_s, {}),
    ("dpmpp_2s_ancestral_cfg_pp", two_s, {"eta": 0.0}),
    ("dpmpp_2s_ancestral_cfg_pp", two_s, {"eta": 0.6}),
    ("dpmpp_2s_ancestral_cfg_pp", two_s, {"eta": 0.6, "variable": "flow_time"}),
    ("res_multistep_cfg_pp", res, {}),
    ("res_multistep_ancestral_cfg_pp", res, {"eta": 1.0}),
    ("res_multistep_cfg_pp", res, {"eta": 0.5}),
    ("res_multistep_cfg_pp", res, {"corrected": True}),
    ("res_multistep_ancestral_cfg_pp", res, {"eta": 1.0, "corrected": True}),
    ("gradient_estimation_cfg_pp", gradient_estimation, {}),
    ("gradient_estimation_cfg_pp", gradient_estimation, {"gamma": 1.4}),
    ("cfgpp_ud10_ab", ud10_ab, {}),
    ("cfgpp_ud10_ab", ud10_ab, {"ahead": 0.3, "history": 1.0}),
]


@pytest.mark.parametrize("ratios", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("name", "published", "options"), PUBLISHED, ids=label)
def test_the_published_formulas_on_every_process(
    name: str,
    published: Callable[..., Tensor],
    options: dict[str, Any],
    process: fs.Process,
    ratios: list[float],
) -> None:
    generator = torch.Generator().manual_seed(1)
    noises = torch.randn(len(ratios), *NORMAL.shape, dtype=torch.float64, generator=generator)
    wanted = published(on_edm, ratios[0] * NORMAL, ratios, iter(noises), **options)
    draws = iter(noises)
    plan = fs.plan(name, fs.Grid.from_ratios(process, ratios), **options)
    first, last = plan.levels[0], plan.levels[-1]
    start = first.alpha * ratios[0] * NORMAL
    got = plan.run(denoiser_of(process), start, lambda a, b: next(draws)) / last.alpha
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


# ---- closed forms ----------------------------------------------------------------------------


class Constant:
    """A weak estimate of zero, and a guided one that is a constant away from it."""

    def __init__(self, push: float) -> None:
        self.push = push

    def __call__(self, x: Tensor, level: fs.Level) -> Tensor:
        raise AssertionError("CFG++ asks for both estimates")

    def guided_pair(self, x: Tensor, level: fs.Level) -> tuple[Tensor, Tensor]:
        return torch.full_like(x, self.push), torch.zeros_like(x)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler_cfg_pp", {}),
        ("dpmpp_2m_cfg_pp", {"corrected": True}),
        ("dpmpp_2s_ancestral_cfg_pp", {"eta": 0.0}),
        ("res_multistep_cfg_pp", {"corrected": True}),
    ],
)
def test_each_step_adds_the_whole_push_which_then_falls_with_the_noise(
    name: str, options: dict[str, Any], process: fs.Process
) -> None:
    """`x^_n = r_n (x^_0 / r_0 + sum_i push / r_i)`: nearly as often as there are steps, not once."""
    plan = fs.plan(name, fs.Grid.from_ratios(process, ROUGH), **options)
    got = plan.run(Constant(0.3), plan.levels[0].alpha * NORMAL) / plan.levels[-1].alpha
    wanted = ROUGH[-1] * (NORMAL / ROUGH[0] + sum(0.3 / r for r in ROUGH[1:]))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_published_history_of_2m_adds_guidance_of_half_a_step() -> None:
    """The two histories differ by `(1 - e^-h) / (2 r)` pushes on each step that has one."""
    grid = fs.Grid.from_ratios(PROCESSES["edm"], [8.0, 4.0, 1.0])
    published, corrected = (
        fs.plan("dpmpp_2m_cfg_pp", grid, corrected=c).run(Constant(0.3), NORMAL)
        for c in (False, True)
    )
    share = (1 - 1 / 4) / (2 * math.log(2) / math.log(4))
    torch.testing.assert_close(published - corrected, torch.full_like(NORMAL, 0.3 * share))


@pytest.mark.parametrize("ahead", [0.0, 0.1, 0.5])
def test_the_limit_of_ud10_ab_is_another_ode(ahead: float) -> None:
    """For data N(0, 1), where `noise = g x^` with `g = r / (1 + r^2)`, the limit that its docstring states."""
    grids = [np.geomspace(20, 0.1, n + 1) for n in (200, 400, 800)]
    edm = PROCESSES["edm"]
    one = fs.exact.GaussianMixture(torch.zeros(1, 1).double(), 1.0, process=edm)
    start = torch.ones(1, 1, dtype=torch.float64)
    ends = [
        float(
            fs.plan("cfgpp_ud10_ab", fs.Grid.from_ratios(edm, g), ahead=ahead).run(
                fs.AutoGuided(one, one, 2.0), start
            )
        )
        for g in grids
    ]

    def slope(r: float) -> float:
        g, change = r / (1 + r**2), (1 - r**2) / (1 + r**2) ** 2
        return (g + ahead * r * change) / (1 - ahead * r * g)

    limit = math.exp(quad(slope, 20, 0.1, epsabs=1e-13, epsrel=1e-12)[0])
    errors = [abs(end - limit) for end in ends]
    assert errors[0] < 0.03 * limit
    assert [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)] == pytest.approx(
        [1, 1], abs=0.1
    )
    exact = math.sqrt((1 + 0.1**2) / (1 + 20**2))
    assert (abs(limit / exact - 1) < 1e-9) == (ahead == 0)


# ---- relatives -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "relative", "its_options"),
    [
        ("euler_cfg_pp", {}, "euler", {}),
        ("euler_ancestral_cfg_pp", {}, "euler_ancestral", {}),
        ("euler_cfg_pp", {"eta": 0.3, "s_noise": 1.1}, "euler_ancestral", None),
        ("dpmpp_2m_cfg_pp", {}, "dpmpp_2m", {}),
        ("dpmpp_2m_cfg_pp", {"corrected": True}, "dpmpp_2m", {}),
        ("dpmpp_2s_ancestral_cfg_pp", {}, "dpmpp_2s_ancestral", {}),
        ("res_multistep_cfg_pp", {}, "res_multistep", {}),
        ("res_multistep_ancestral_cfg_pp", {}, "res_multistep_ancestral", {}),
        ("res_multistep_cfg_pp", {"eta": 0.5, "corrected": True}, "res_multistep", {"eta": 0.5}),
        ("gradient_estimation_cfg_pp", {}, "gradient_estimation", {}),
        ("gradient_estimation_cfg_pp", {"gamma": 1.5}, "ipndm", {"order": 2}),
        ("cfgpp_ud10_ab", {"ahead": 0.0, "history": 0.0}, "euler", {}),
        ("cfgpp_ud10_ab", {"ahead": 0.0, "history": 1.0}, "lms", {"order": 2}),
    ],
)
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_where_both_estimates_agree_it_is_its_relative(
    name: str,
    options: dict[str, Any],
    relative: str,
    its_options: dict[str, Any] | None,
    process: fs.Process,
) -> None:
    for ratios in (SMOOTH, [*ROUGH, 0.0]):
        if name == "cfgpp_ud10_ab" and not ratios[-1]:
            continue  # it extrapolates to clean data
        grid = fs.Grid.from_ratios(process, ratios)
        plans = [
            fs.plan(name, grid, **options),
            fs.plan(relative, grid, **(options if its_options is None else its_options)),
        ]
        noise = fs.Noise(range(len(NORMAL)), NORMAL.shape[1:], dtype=torch.float64)
        x = grid.levels[0].sigma * NORMAL
        one, other = (plan.run(mixture(process), x, noise) for plan in plans)
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_factor_on_the_noise_is_declared() -> None:
    grid = fs.Grid.from_ratios(PROCESSES["vp"], SMOOTH)
    for name in (
        "euler_ancestral_cfg_pp",
        "dpmpp_2s_ancestral_cfg_pp",
        "res_multistep_ancestral_cfg_pp",
    ):
        plan = fs.plan(name, grid, s_noise=1.2)
        assert plan.inexact == ("noise",)
        assert fs.plan(name, grid).inexact == ()


def test_all_of_them_say_that_they_need_a_guided_pair() -> None:
    grid = fs.Grid.from_ratios(PROCESSES["vp"], SMOOTH)
    names = [name for name, *_ in PUBLISHED]
    for name in names:
        assert SAMPLERS.find(name).needs == ("guided pair",)
        plan = fs.plan(name, grid)
        assert Plan.from_json(plan.to_json()) == plan
    assert [e.name for e in SAMPLERS if "guided pair" in e.needs] == list(
        dict.fromkeys(SAMPLERS.find(name).name for name in names)
    )
