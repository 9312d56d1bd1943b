"""Each scheduler against its formula, and the rules that all share: how a grid ends and stays in its process."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import process as fp
from fewstep import schedulers as fs
from fewstep.errors import InvalidInputError
from fewstep.process import Process
from fewstep.schedulers import SCHEDULERS, make_grid
from fewstep.schedulers.ranges import apart, ends, within
from fewstep.testing import check_scheduler

VP, SD = fp.vp_linear(), fp.vp_scaled_linear()
PURE = fp.vp_linear(zero_terminal_snr=True)
TAILED = [entry.name for entry in SCHEDULERS if any(o.name == "tail" for o in entry.options)]


# ---- how grids end, and stay inside ----------------------------------------------------------


@pytest.mark.parametrize("process", [VP, PURE, fp.edm(), fp.flow()], ids=repr)
@pytest.mark.parametrize("name", [name for name in TAILED if name != "flow"])
def test_three_ways_to_end(name: str, process: Process) -> None:
    for n in (1, 4, 9):
        to_last = make_grid(name, process, n, tail="min")
        cut = make_grid(name, process, n, tail="cut")
        one_more = make_grid(name, process, n + 1, tail="zero")
        assert len(to_last.steps) == len(cut.steps) == n
        assert not to_last.levels[-1].is_clean
        assert one_more.ratios == pytest.approx([*to_last.ratios, 0.0], rel=1e-9)
        if name not in (
            "laplace",
            "vp",
            "optimal_steps",
            "sinusoidal_sf",
        ):  # whose last levels may be moved inside
            assert cut.ratios == pytest.approx([*to_last.ratios[:-1], 0.0], rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-3, 60), min_size=1, max_size=80).map(lambda v: sorted(v, reverse=True)),
    st.integers(2, 50),
)
def test_indices_moved_apart(falling: list[float], size: int) -> None:
    moved = apart(np.array(falling), size)
    gap = min(1.0, (size - 1) / max(len(falling) - 1, 1))
    assert moved.max() <= size - 1 + 1e-9
    assert moved.min() >= -1e-9
    assert (-np.diff(moved) >= gap - 1e-9).all()
    held = np.clip(falling, 0, size - 1)
    if (-np.diff(held) >= gap).all():  # what is apart already stays where it is
        np.testing.assert_allclose(moved, held, atol=1e-9)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-9000, 9000), min_size=1, max_size=40, unique=True),
    st.sampled_from([SD, PURE, fp.edm(0.5, 0.7), fp.flow(0.3)]),
)
def test_ratios_held_inside(thousandths: list[int], process: Process) -> None:
    curve = np.exp(np.array(sorted(thousandths, reverse=True)) / 1000)
    held = np.array(within(process, curve))
    high, low = process.noisiest.ratio, process.least_noisy.ratio
    assert (np.diff(held) < 0).all()
    assert low <= held[-1] <= held[0] <= high
    inside = (curve > low * 1.0001) & (curve < ends(process)[0] * 0.9999)
    np.testing.assert_array_equal(held[inside], curve[inside])
    if inside.any() and not math.isinf(high):
        moved = np.log(held[: int(np.argmax(inside)) + 1])
        if len(moved) > 1:
            assert held[0] == high
            assert np.diff(moved) == pytest.approx(np.diff(moved)[0], rel=1e-6)


def test_a_range_that_no_level_falls_in_is_crossed_evenly() -> None:
    grid = fs.gits(fp.edm(100.0, 200.0), 4)
    assert grid.ratios == pytest.approx([200, 200 / 2 ** (1 / 3), 200 / 2 ** (2 / 3), 100, 0])


@pytest.mark.parametrize("name", SCHEDULERS.names())
def test_widest_options_still_fall_strictly(name: str) -> None:
    for option in SCHEDULERS.find(name).options:
        values = [*option.choices, *((option.low, option.high) * (option.kind is float))]
        for process in (VP, PURE, fp.edm(), fp.flow(), fp.ve()):
            for value, n in itertools.product(values, (2, 40)):
                assert len(make_grid(name, process, n, **{option.name: value}).steps) == n


PRESETS = [(entry.name, preset) for entry in SCHEDULERS for preset in entry.presets]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_presets_are_other_defaults(name: str, preset: str) -> None:
    entry = SCHEDULERS.find(name)
    grid = make_grid(preset, SD, 5)
    assert grid == make_grid(name, SD, 5, **entry.presets[preset])
    assert grid.scheduler == name
    assert grid.options == {o.name: o.default for o in entry.options} | dict(entry.presets[preset])
    if grid.options.get("tail") != "min":
        check_scheduler(preset, fp.flow())


OTHER_NAMES = {
    "polyexponential": "exponential",
    "Uniform log-SNR": "exponential",
    "SGM Uniform": "normal",
    "DDIM linear": "leading",
    "DDIM quadratic": "quadratic",
    "KL Optimal": "kl_optimal",
    "Align Your Steps": "align_your_steps",
    "AYS": "align_your_steps",
    "AYS+": "align_your_steps",
    "AYS_30": "align_your_steps",
    "AYS_30+": "align_your_steps",
    "GITS": "gits",
    "EDM": "karras",
    "time_quadratic": "time_uniform",
    "Turbo": "trailing",
    "SD Turbo": "sd_turbo",
    "OSS": "optimal_steps",
    "beta57": "beta",
    "flux": "flow_dynamic",
    "sd3": "flow",
    "TCD": "lcm",
    "use_karras_sigmas": "karras",
    "BetaSamplingScheduler": "beta",
    "cosexpblend": "cosine",
}


@pytest.mark.parametrize("other", OTHER_NAMES)
def test_names_of_other_tools(other: str) -> None:
    assert SCHEDULERS.find(other).name == OTHER_NAMES[other]


# ---- formulas --------------------------------------------------------------------------------


def test_polynomial_in_the_logarithm() -> None:
    high, low = ends(SD)
    for rho in (0.5, 1.0, 3.0):
        got = np.log(fs.exponential(SD, 9, rho=rho).ratios[:-1])
        share = (got - math.log(low)) / math.log(high / low)
        np.testing.assert_allclose(share, np.linspace(1, 0, 9) ** rho, atol=1e-12)


@pytest.mark.parametrize("c", [0.5, 1.0, 20.0])
def test_kl_optimal_is_best_for_ddim_on_gaussian_data(c: float) -> None:
    """There D = c^2 x / (c^2 + t^2), so a step from t to s multiplies x by (c^2 + s t) / (c^2 + t^2)."""
    process = fp.edm(0.1, 50.0)

    def shrinkage(levels: list[float]) -> float:
        """Final standard deviation over the exact one."""
        steps = [(c**2 + s * t) / (c**2 + t**2) for t, s in itertools.pairwise(levels)]
        exact = math.hypot(c, levels[-1]) / math.hypot(c, levels[0])
        return math.prod(steps) / exact

    best = fs.kl_optimal(process, 7, data_std=c).ratios[:-1]
    angles = np.arctan(np.array(best) / c)
    assert shrinkage(best) == pytest.approx(math.cos((angles[0] - angles[-1]) / 6) ** 6)
    assert shrinkage(fs.karras(process, 7).ratios[:-1]) < shrinkage(best) < 1
    for i, factor in itertools.product(range(1, 6), (0.97, 1.03)):
        moved = [level * (factor if k == i else 1) for k, level in enumerate(best)]
        assert shrinkage(moved) < shrinkage(best)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_equal_steps_in_time(power: float) -> None:
    n = 12
    t = np.linspace(1, 1e-3 ** (1 / power), n) ** power
    expected = np.sqrt(np.expm1(19.9 / 2 * t**2 + 0.1 * t))
    got = fs.time_uniform(fp.vp_continuous(), n, power=power).ratios[:-1]
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    times = fs.time_uniform(fp.flow(), n, power=power).times[:-1]
    np.testing.assert_allclose(times, t, rtol=1e-9)
    # The k-th entry of a table is at (k + 1) / T, so that clean data is at 0.
    times = fs.time_uniform(VP, n, power=power).times[:-1]
    np.testing.assert_allclose(times, 1000 * t - 1, rtol=1e-7, atol=1e-7)


def test_grids_of_dpm_solver() -> None:
    for name, power in (("dpm_solver_time_uniform", 1), ("dpm_solver_time_quadratic", 2)):
        got = make_grid(name, fp.vp_continuous(), 6)
        t = np.linspace(1, 1e-3 ** (1 / power), 7) ** power
        np.testing.assert_allclose(got.times, t, rtol=1e-9)
    lambdas = [lv.log_snr for lv in make_grid("dpm_solver_log_snr", fp.vp_continuous(), 6).levels]
    assert np.diff(lambdas) == pytest.approx((lambdas[-1] - lambdas[0]) / 6)


@pytest.mark.parametrize("process", [fp.edm(), SD, fp.ve()], ids=repr)
def test_vp_of_edm_spans_the_range(process: Process) -> None:
    n, (high, low) = 9, ends(process)
    got = np.array(make_grid("edm_vp", process, n).ratios[:-1])
    # log(1 + sigma^2) is a parabola through 0 over equally spaced times.
    t = np.linspace(1, 1e-3, n)
    basis = np.stack([t[[0, -1]] ** 2, t[[0, -1]]], 1)
    square, straight = np.linalg.solve(basis, np.log1p(np.array([high, low]) ** 2))
    np.testing.assert_allclose(got, np.sqrt(np.expm1(square * t**2 + straight * t)), rtol=1e-6)


def test_vp_that_cannot_be_fitted() -> None:
    with pytest.raises(InvalidInputError, match="vp: fit=true finds no rising curve"):
        fs.vp(fp.edm(100.0, 200.0), 5, fit=True)


def test_iddpm_is_the_table_of_edm() -> None:
    """As EDM's authors define it: a recursion from the least noisy entry up."""
    entries, least = 1000, 0.001
    u = torch.zeros(entries + 1, dtype=torch.float64)

    def alpha_bar(j: int) -> float:
        return math.sin(0.5 * math.pi * j / entries / 1.008) ** 2

    for j in range(entries, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), least) - 1).sqrt()
    process = fp.edm(0.002, 81.0)
    kept = u[(u >= 0.002) & (u <= 81.0)]
    for n in (2, 18, 250):
        picked = kept[torch.linspace(0, len(kept) - 1, n, dtype=torch.float64).round().long()]
        np.testing.assert_allclose(fs.iddpm(process, n).ratios[:-1], picked, rtol=1e-8)
    assert len(fs.iddpm(process, 3000).steps) == 3000


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.6), (0.5, 0.7), (1.0, 1.0), (2.0, 0.4)])
def test_beta_quantiles(alpha: float, beta: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for n in (1, 2, 5, 20, 61, 300):
        place = 1 - np.linspace(0, 1, n, endpoint=False)
        expected = np.rint(999 * stats.beta.ppf(place, alpha, beta))
        got = np.array(fs.beta(VP, n, alpha=alpha, beta=beta).times[:-1])
        repeats = n - len(set(expected))
        if repeats:  # others drop them; ours move apart, and keep the number of steps
            assert np.abs(got - expected).max() <= repeats
        else:
            np.testing.assert_array_equal(got, expected)


def test_sd_turbo() -> None:
    assert fs.sd_turbo(VP, 4).times == [999, 899, 799, 699, -1]
    assert fs.sd_turbo(VP, 10).times == [*(999 - 100 * i for i in range(10)), -1]
    assert fs.sd_turbo(VP, 25).times == fs.trailing(VP, 25).times
    assert fs.sd_turbo(VP, 2, original_steps=4).times == [999, 749, -1]


def test_lcm() -> None:
    assert fs.lcm(VP, 4).times == [999, 759, 499, 259, -1]
    assert fs.lcm(VP, 100).times == fs.trailing(VP, 100).times
    assert fs.lcm(VP, 3, original_steps=4).times == [999, 749, 499, -1]


def test_flow_shift_moves_the_logarithm() -> None:
    plain = np.array(fs.flow(fp.flow(), 8).ratios[1:-1])
    np.testing.assert_allclose(plain, np.arange(7, 0, -1) / np.arange(1, 8), rtol=1e-12)
    for shift in (0.2, 3.0):
        shifted = fs.flow(fp.flow(), 8, shift=shift)
        assert math.isinf(shifted.ratios[0])
        np.testing.assert_allclose(shifted.ratios[1:-1], shift * plain, rtol=1e-12)
        to_last = fs.flow(fp.flow(), 8, shift=shift, tail="min")
        assert to_last.levels[-1].sigma == pytest.approx(1e-3)
        u = [lv.ratio / (shift + lv.ratio) for lv in to_last.levels[1:]]
        assert np.diff(u) == pytest.approx(np.diff(u)[0])
    stretched = fs.flow(fp.flow(), 8, terminal=0.2)
    assert stretched.levels[-2].sigma == pytest.approx(0.2)
    assert fs.flow(fp.flow(), 1, terminal=0.2).times == [1.0, 0.0]
    assert fs.flow(fp.flow(), 4, start=0.8).times == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])


def test_flow_reaches_every_process_by_ratio() -> None:
    wanted = fs.flow(fp.flow(), 10, shift=2.0).ratios
    for process in (VP, PURE, fp.vp_continuous()):
        got = fs.flow(process, 10, shift=2.0).ratios
        assert got[0] == process.noisiest.ratio
        assert got[1:] == pytest.approx(wanted[1:], rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 10, 33])
def test_bong_tangent(n: int) -> None:
    """Two arcs that meet at 1/2 in flow time; the second is steepest where the first ends."""
    times = np.array([level.sigma for level in fs.bong_tangent(fp.flow(), n).levels])
    middle, slope = int((n + 2) * 0.6), 0.2 * 40 / (n + 2)
    for part, start, end, offset in (
        (times[:middle], 1.0, 0.5, -middle),
        (times[middle - 1 :], 0.5, 0.0, 0),
    ):
        turned = np.array([math.atan(slope * (i + offset)) for i in range(len(part))])
        share = (turned - turned[0]) / (turned[-1] - turned[0])
        np.testing.assert_allclose(part, start + (end - start) * share, atol=1e-12)


def test_community_curves() -> None:
    high, low = ends(SD)
    r = np.linspace(0, 1, 8)
    cosine = low + 0.5 * (high - low) * (1 - np.cos(np.pi * (1 - r**0.5)))
    exponential = np.array(fs.exponential(SD, 8).ratios[:-1])
    sine = (low + (high - low) * (1 - np.sin(np.pi / 2 * r))) / high
    inverse = (low + (high - low) * 0.5 * (np.cos(r * np.pi) + 1)) / high
    for name, expected in (
        ("phi", low + (high - low) * (1 - r) ** ((1 + 5**0.5) / 2 + 1)),  # phi^2 = phi + 1
        ("cosine", cosine),
        ("cosexpblend", cosine + r * (exponential - cosine)),
        ("sinusoidal_sf", sine**3.5 * high),
        ("invcosinusoidal_sf", inverse**3.5 * high),
        ("simple_exponential", np.array(fs.simple(SD, 8).ratios[:-1]) * (1 - np.arange(8) / 8)),
    ):
        got = np.array(make_grid(name, SD, 8).ratios[:-1])
        inside = expected > low * (1 + 1e-9)
        assert inside.sum() >= 5
        np.testing.assert_allclose(got[inside], expected[inside], rtol=1e-12)


def test_tables_and_scipy_are_read_when_asked_for() -> None:
    code = (
        "import sys, fewstep; from fewstep.schedulers import published; "
        "sys.exit('scipy' in sys.modules or published._tables.cache_info().currsize)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
