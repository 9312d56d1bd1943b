"""Every scheduler, at every number of steps and on every process, against closed forms and other tools."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fewstep import process as fp
from fewstep import schedulers as fs
from fewstep.errors import InvalidInputError, UnknownNameError
from fewstep.process import Process
from fewstep.schedulers import SCHEDULERS, make_grid

VP, SD = fp.vp_linear(), fp.vp_scaled_linear()
PURE = fp.vp_linear(zero_terminal_snr=True)
NAMES = SCHEDULERS.names()


def alpha_bar_of_iddpm(j: int) -> float:
    return math.sin(math.pi / 2 * j / 1000 / 1.008) ** 2


ON_ENTRIES = [
    *("trailing", "leading", "linspace", "simple", "ddim_uniform", "quadratic"),
    *("beta", "lcm", "sd_turbo"),
]
"""Those that visit whole indices of the table, as long as there are enough."""

OVER_THE_RANGE = [
    *("linspace", "normal", "karras", "exponential", "kl_optimal", "time_uniform"),
    *("golden", "phi", "cosine", "sinusoidal_sf"),
]
"""Those that begin at the noisiest level and end, before clean data, at the least noisy one."""

STARTS_BELOW: dict[str, Callable[[int], float]] = {
    "leading": lambda n: VP.ratio(float((n - 1) * (1000 // n))),
    "ddim_uniform": lambda n: VP.ratio(float(1 + 998 // (1000 // n) * (1000 // n))),
    "quadratic": lambda n: VP.ratio(float(max(800, n - 1))),
    "align_your_steps": lambda n: SD.noisiest.ratio,
    "gits": lambda n: 14.61464119,
    "vp": lambda n: math.sqrt(math.expm1(19.9 / 2 + 0.1)),
    "iddpm": lambda n: math.sqrt(alpha_bar_of_iddpm(1000) / alpha_bar_of_iddpm(5) - 1),
}
"""First sigma / alpha on `vp_linear` of those that do not start at its noisiest level, by number of steps."""

MAY_START_BELOW = [*STARTS_BELOW, "laplace", "optimal_steps"]
SOME_COUNTS = sorted({*range(1, 31), *range(31, 1001, 43), 333, 500, 700, 999, 1000})


def number_of_steps(name: str, n: int, size: int = 1000) -> int:
    return math.ceil((size - 1) / (size // n)) if name == "ddim_uniform" and n <= size else n


def indices(name: str, n: int, process: Process = VP) -> list[float]:
    """Times but the last, noisy to clean; on a table they are the indices."""
    return make_grid(name, process, n).times[:-1]


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_steps(name: str) -> None:
    for n in SOME_COUNTS:
        grid = make_grid(name, VP, n)
        ratios = grid.ratios
        assert len(ratios) == number_of_steps(name, n) + 1, n
        first = STARTS_BELOW.get(name, lambda n: VP.noisiest.ratio)(n)
        assert ratios[0] == pytest.approx(first, rel=1e-9), n
        assert ratios[-1] == grid.levels[-1].sigma == 0.0, n
        assert (np.diff(ratios) < 0).all(), n
        if name in ON_ENTRIES:
            assert all(t.is_integer() for t in grid.times), n


PROCESSES = [
    PURE,
    SD,
    fp.vp_cosine(zero_terminal_snr=True),
    fp.vp_continuous(),
    fp.ve(),
    fp.edm(),
    fp.flow(),
    fp.vp_from_betas([0.1, 0.2, 0.3, 0.4, 0.5]),
    fp.vp_from_betas([0.1, 1.0]),
]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: repr(p)[:50])
@pytest.mark.parametrize("name", NAMES)
def test_every_process(name: str, process: Process) -> None:
    size = process.training_steps
    high, low = process.noisiest.ratio, process.least_noisy.ratio
    for n in (1, 2, 3, 4, 7, 10, 50, 61, 1000, 1001):
        grid = make_grid(name, process, n)
        assert len(grid.steps) == number_of_steps(name, n, size)
        assert (np.diff(grid.ratios) < 0).all()
        assert grid.levels[-1] == process.clean
        assert all(isinstance(v, float) for lv in grid.levels for v in (lv.t, lv.alpha, lv.sigma))
        assert grid.ratios[0] <= high * (1 + 1e-12)
        assert grid.ratios[-2] >= low * (1 - 1e-12)
        if name not in MAY_START_BELOW:
            assert grid.ratios[0] == pytest.approx(high, rel=1e-14), n
        if n > 1 and name in OVER_THE_RANGE:
            assert grid.ratios[-2] == pytest.approx(low, rel=1e-12), n


@pytest.mark.parametrize("name", NAMES)
def test_the_function_and_the_name_make_the_same_grid(name: str) -> None:
    entry = SCHEDULERS.find(name)
    grid = make_grid(name, VP, 7)
    assert getattr(fs, name)(VP, 7) == grid
    assert name in fs.__all__
    assert grid.scheduler == name
    assert grid.options == {option.name: option.default for option in entry.options}
    assert str(grid).startswith(f"{name} on vp_linear, {number_of_steps(name, 7)} steps: ")
    assert entry.summary
    assert entry.paper


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_same_timesteps_as_diffusers(spacing: str) -> None:
    """But where theirs are no grid of n steps: linspace of one step (theirs is 0) and trailing with a stray -1."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, beta_schedule="linear")
    stray = 0
    for n in range(1 + (spacing == "linspace"), 1001):
        theirs.set_timesteps(n)
        expected = theirs.timesteps.tolist()
        if len(expected) > n:
            assert expected.pop() == -1
            stray += 1
        assert indices(spacing, n) == expected, n
    assert stray < 100
    assert indices("linspace", 1) == [999.0]


def test_leading_by_hand() -> None:
    assert indices("leading", 10) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert make_grid("stable_diffusion_leading", SD, 4).times[:-1] == [751, 501, 251, 1]


def ends(process: Process) -> tuple[float, float]:
    return process.noisiest.ratio, process.least_noisy.ratio


@pytest.mark.parametrize("process", [VP, SD, fp.vp_continuous(), fp.ve(), fp.edm()], ids=repr)
@pytest.mark.parametrize("n", [2, 3, 18, 200])
def test_closed_forms_between_the_ends(process: Process, n: int) -> None:
    high, low = (np.longdouble(end) for end in ends(process))
    r = np.arange(n, dtype=np.longdouble) / (n - 1)
    for rho in (1.0, 3.0, 7.0, 40.0):
        root = 1 / np.longdouble(rho)
        expected = (high**root + r * (low**root - high**root)) ** np.longdouble(rho)
        got = fs.karras(process, n, rho=rho).ratios[:-1]
        np.testing.assert_allclose(got, expected.astype(float), rtol=1e-12)
    got = fs.exponential(process, n).ratios[:-1]
    np.testing.assert_allclose(got, (high ** (1 - r) * low**r).astype(float), rtol=1e-12)


@pytest.mark.parametrize("process", [PURE, fp.flow()], ids=repr)
@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_from_pure_noise_the_curve_runs_from_the_entry_below(name: str, process: Process) -> None:
    grid = make_grid(name, process, 5)
    below = process.ratio(process.table_time(process.training_steps - 2))
    low = process.least_noisy.ratio
    power = 1 / 7 if name == "karras" else 1e-9
    inner = [
        ((1 - r) * below**power + r * low**power) ** (1 / power) for r in (0.25, 0.5, 0.75, 1.0)
    ]
    assert grid.ratios == pytest.approx([math.inf, *inner, 0.0], rel=1e-5)
    assert math.isinf(make_grid(name, process, 1).ratios[0])


def test_the_ends_are_exact() -> None:
    for n in (2, 5, 10, 100):
        for process in (VP, SD, fp.edm()):
            for grid in (fs.karras(process, n), fs.exponential(process, n)):
                got = grid.ratios[0], grid.ratios[-2]
                assert got == pytest.approx(ends(process), rel=5e-16)
                at = grid.times[0], grid.times[-2]
                assert at == pytest.approx((process.t_max, process.t_min), rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("rho", [1e-3, 0.5, 1e3])
def test_karras_bears_every_legal_exponent(rho: float) -> None:
    for process in (VP, fp.edm(), fp.flow()):
        assert len(fs.karras(process, 30, rho=rho).steps) == 30


def test_karras_with_a_large_exponent_is_exponential() -> None:
    np.testing.assert_allclose(
        fs.karras(VP, 20, rho=1000).ratios, fs.exponential(VP, 20).ratios, rtol=0.03
    )


def test_eighteen_steps_of_edm() -> None:
    expected = [
        *(80.0, 57.5859847, 40.7855738, 28.3745846, 19.352453, 12.9100824),
        *(8.4009353, 5.3151945, 3.2568215, 1.9233398, 1.0881706, 0.5853481),
        *(0.2964423, 0.1395165, 0.0599473, 0.0229345, 0.007528, 0.002, 0.0),
    ]
    np.testing.assert_allclose(fs.karras(fp.edm(), 18).ratios, expected, rtol=0, atol=6e-8)


def test_simple_is_every_so_many_th_entry_from_the_end() -> None:
    for n in range(1, 1001):
        stride = 1000 / n
        assert indices("simple", n) == [range(1000)[-(1 + int(i * stride))] for i in range(n)]


def test_ddim_uniform_is_every_so_many_th_entry_from_one() -> None:
    for n in range(1, 1001):
        visited, index = [], 1
        while index < 1000:
            visited.append(index)
            index += max(1000 // n, 1)
        assert indices("ddim_uniform", n) == visited[::-1]
    assert len(indices("ddim_uniform", 7)) == 8
    assert len(indices("ddim_uniform", 30)) == 31
    assert len(indices("ddim_uniform", 700)) == 999


def test_normal_walks_the_logarithm_of_the_table() -> None:
    log_ratio = VP.ratio(torch.arange(1000)).log().numpy()
    for n in (1, 2, 7, 64, 999, 1000, 2500):
        at = np.arange(n)[::-1] / max(n - 1, 1) * 999 if n > 1 else np.array([999.0])
        expected = np.exp(np.interp(at, np.arange(1000), log_ratio))
        np.testing.assert_allclose(fs.normal(VP, n).ratios[:-1], expected, rtol=1e-12)


def official_quadratic(n: int) -> list[int]:
    """As the authors of DDIM wrote it, noisy to clean."""
    return [int(s) for s in list(np.linspace(0, np.sqrt(1000 * 0.8), n) ** 2)][::-1]


def test_quadratic_is_that_of_ddim_where_that_has_no_repeats() -> None:
    compared = 0
    for n in range(2, 1001):
        official, ours = official_quadratic(n), indices("quadratic", n)
        if len(set(official)) == n:
            assert ours == official
            compared += 1
        elif n <= 800:
            assert ours[0] == official[0]
            assert all(mine >= theirs for mine, theirs in zip(ours, official, strict=True))
            # An index is moved up only as far as the repeats below it demand.
            moved = [i for i in range(n) if ours[i] != official[i]]
            assert all(ours[i] == ours[i + 1] + 1 for i in moved)
    assert compared >= 28


def test_quadratic_reach() -> None:
    assert fs.quadratic(VP, 5, reach=1.0).times[:-1] == [999, 562, 250, 62, 0]
    assert fs.quadratic(VP, 5, reach=0.01).times[:-1] == [10, 5, 2, 1, 0]
    assert fs.quadratic(VP, 1).times[:-1] == [800]
    assert fs.quadratic(VP, 1, reach=1.0).times[:-1] == [999]


@pytest.mark.parametrize("name", ON_ENTRIES)
@pytest.mark.parametrize("process", [VP, fp.vp_from_betas([0.1, 0.2, 0.3])], ids=["1000", "3"])
def test_more_steps_than_entries_are_spread_evenly(name: str, process: Process) -> None:
    size = process.training_steps
    for n in (size + 1, size + 2, 2 * size, 5 * size // 2):
        expected = np.linspace(size - 1, 0, n)
        np.testing.assert_allclose(indices(name, n, process), expected, atol=1e-9)


@pytest.mark.parametrize("steps", [0, -3, 2.5, 10.0, "10", True, None, math.nan])
@pytest.mark.parametrize("name", NAMES)
def test_steps_must_be_a_whole_number(name: str, steps: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        make_grid(name, VP, steps)  # type: ignore[arg-type]
    assert f"{name}: steps must be a whole number >= 1, got {steps!r}" in str(caught.value)


def test_whole_numbers_of_numpy_will_do() -> None:
    assert fs.karras(VP, np.int64(4)) == fs.karras(VP, 4)


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("karras", {"rho": 0}, ["karras: rho=0 ", "a number in 0.001..1000", "default 7.0"]),
        ("karras", {"rho": -7}, ["rho=-7"]),
        ("karras", {"rho": math.inf}, ["rho=inf"]),
        ("karras", {"rho": math.nan}, ["rho=nan"]),
        ("karras", {"rho": "seven"}, ["rho='seven'", "a number in"]),
        ("karras", {"rho": None}, ["rho=None"]),
        ("leading", {"offset": -1}, ["leading: offset=-1 ", "a whole number in 0..1000"]),
        ("leading", {"offset": 1.5}, ["offset=1.5", "a whole number"]),
        ("leading", {"offset": math.inf}, ["offset=inf"]),
        ("leading", {"offset": 100}, ["offset=100 runs past the table", "10 steps at most 99"]),
        ("leading", {"tail": "none"}, ["tail='none'", "one of zero, cut, min", "default zero"]),
        ("exponential", {"rho": 0}, ["exponential: rho=0 ", "a number in 0.1..10"]),
        ("kl_optimal", {"data_std": 0}, ["kl_optimal: data_std=0 ", "0.001..1000"]),
        ("laplace", {"beta": 0}, ["laplace: beta=0 ", "0.01..10"]),
        ("laplace", {"mu": math.nan}, ["mu=nan"]),
        ("vp", {"t_min": 0}, ["vp: t_min=0 ", "1e-06..0.5"]),
        ("vp", {"fit": "maybe"}, ["fit='maybe'", "true or false"]),
        ("time_uniform", {"power": 0}, ["time_uniform: power=0 ", "0.1..10"]),
        ("iddpm", {"entries": 1}, ["iddpm: entries=1 ", "a whole number in 2..100000"]),
        ("beta", {"alpha": 0}, ["beta: alpha=0 ", "0.1..10", "default 0.6"]),
        ("beta", {"variable": "time"}, ["variable='time'", "one of index, ratio"]),
        ("lcm", {"original_steps": 0}, ["lcm: original_steps=0 "]),
        ("sd_turbo", {"original_steps": 2.5}, ["original_steps=2.5"]),
        ("flow", {"shift": 0}, ["flow: shift=0 ", "0.01..100"]),
        ("flow", {"terminal": 1}, ["flow: terminal=1 ", "0..0.9"]),
        ("flow_dynamic", {"tokens": 0}, ["flow_dynamic: tokens=0 "]),
        (
            "flow_dynamic",
            {"tokens_small": 4096},
            ["tokens_small=4096 must lie below tokens_large=4096"],
        ),
        ("flow_dynamic", {"tokens": 10**6}, ["tokens=1000000 gives mu=", "the tokens of one"]),
        ("linear_quadratic", {"threshold": 0.6}, ["threshold=0.6", "0.001..0.5"]),
        ("align_your_steps", {"table": "sd3"}, ["table='sd3'", "one of sd15, sdxl, svd"]),
        ("gits", {"coefficient": 1.51}, ["gits: coefficient=1.51 ", "0.8..1.5"]),
        ("optimal_steps", {"model": "sd"}, ["model='sd'", "one of flux, wan, chroma"]),
        ("quadratic", {"reach": 1.01}, ["quadratic: reach=1.01", "0.01..1", "default 0.8"]),
        ("quadratic", {"reach": 0.0}, ["reach=0.0"]),
    ],
    ids=str,
)
def test_options_out_of_range(name: str, options: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        make_grid(name, VP, 10, **options)
    for part in parts:
        assert part in str(caught.value)


def test_options_as_text() -> None:
    assert make_grid("karras", VP, 5, rho="3.5") == fs.karras(VP, 5, rho=3.5)
    grid = make_grid("leading", VP, 5, offset="1")
    assert grid == fs.leading(VP, 5, offset=1)
    assert grid.options == {"offset": 1, "tail": "zero"}
    assert isinstance(grid.options["offset"], int)


def test_unknown_names_give_the_nearest_ones() -> None:
    with pytest.raises(UnknownNameError) as caught:
        make_grid("karass", VP, 5)
    for part in ("scheduler 'karass'", "did you mean 'karras'", *NAMES, "fewstep schedulers"):
        assert part in str(caught.value)
    with pytest.raises(UnknownNameError, match="option of karras 'roh'; did you mean 'rho'"):
        make_grid("karras", VP, 5, roh=3)
    with pytest.raises(UnknownNameError, match="option of simple 'rho'.*Known: none"):
        make_grid("simple", VP, 5, rho=3)


def test_options_are_given_by_name() -> None:
    assert str(inspect.signature(fs.karras)).startswith("(process: 'Process', steps: 'int', *, ")
    with pytest.raises(TypeError):
        fs.karras(VP, 5, 3.0)
