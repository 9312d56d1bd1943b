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
BETWEEN_ENTRIES = ["normal", "karras", "exponential"]
ON_ENTRIES = [name for name in NAMES if name not in BETWEEN_ENTRIES]

FIRST_INDEX: dict[str, Callable[[int], float]] = {
    "trailing": lambda n: 999,
    "leading": lambda n: (n - 1) * (1000 // n),
    "linspace": lambda n: 999,
    "normal": lambda n: 999,
    "simple": lambda n: 999,
    "ddim_uniform": lambda n: 1 + 998 // (1000 // n) * (1000 // n),
    "quadratic": lambda n: max(800, n - 1),
    "karras": lambda n: 999,
    "exponential": lambda n: 999,
}
"""Index of the first level on a table of 1000, by number of steps."""


def number_of_steps(name: str, n: int, size: int = 1000) -> int:
    return math.ceil((size - 1) / (size // n)) if name == "ddim_uniform" else n


def indices(name: str, n: int, process: Process = VP) -> list[float]:
    """Times but the last, noisy to clean; on a table they are the indices."""
    return make_grid(name, process, n).times[:-1]


def test_every_scheduler_is_covered() -> None:
    assert set(FIRST_INDEX) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_steps(name: str) -> None:
    table = VP.ratio(torch.arange(1000)).tolist()
    for n in range(1, 1001):
        grid = make_grid(name, VP, n)
        ratios = grid.ratios
        assert len(ratios) == number_of_steps(name, n) + 1, n
        assert ratios[0] == pytest.approx(table[int(FIRST_INDEX[name](n))], rel=1e-15), n
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
    for n in {1, 2, 3, 4, 7, 10, 50, 61, 333, 999, 1000, size} & set(range(1, size + 1)):
        grid = make_grid(name, process, n)
        assert len(grid.steps) == number_of_steps(name, n, size)
        assert (np.diff(grid.ratios) < 0).all()
        assert grid.levels[-1] == process.clean
        assert all(isinstance(v, float) for lv in grid.levels for v in (lv.t, lv.alpha, lv.sigma))
        first = grid.levels[0]
        if name in ("leading", "ddim_uniform", "quadratic"):
            continue
        assert first.t == pytest.approx(process.t_max, rel=1e-14)
        assert first.ratio == pytest.approx(process.noisiest.ratio, rel=1e-14)
        if n > 1 and name in ("linspace", *BETWEEN_ENTRIES):
            assert grid.ratios[-2] == pytest.approx(process.least_noisy.ratio, rel=1e-12)
        assert len(set(grid.times)) == len(grid.times)


@pytest.mark.parametrize("name", NAMES)
def test_the_function_and_the_name_make_the_same_grid(name: str) -> None:
    entry = SCHEDULERS.find(name)
    grid = make_grid(name, VP, 7)
    assert getattr(fs, name)(VP, 7) == grid
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


def test_leading_with_the_offset_of_stable_diffusion() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    for n in (1, 7, 10, 30, 50, 501):
        theirs.set_timesteps(n)
        assert fs.leading(SD, n, offset=1).times[:-1] == theirs.timesteps.tolist()
    assert indices("leading", 10) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("karras", "use_karras_sigmas"),
        ("exponential", "use_exponential_sigmas"),
        ("exponential", "use_lu_lambdas"),
    ],
)
@pytest.mark.parametrize("n", [2, 5, 10, 37, 250])
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers with numpy 2
def test_same_ratios_as_diffusers(name: str, option: str, n: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("scipy")
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **{option: True}
    )
    theirs.set_timesteps(n)
    np.testing.assert_allclose(make_grid(name, SD, n).ratios, theirs.sigmas.double(), rtol=2e-5)


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


PUBLISHED = {
    "simple": [
        *(14.6146412, 8.3028032, 5.0877632, 3.3210831, 2.2764631),
        *(1.6128862, 1.1605783, 0.8298595, 0.5692849, 0.3416738),
    ],
    "normal": [
        *(14.6146412, 7.8398829, 4.6091741, 2.9183071, 1.9501615),
        *(1.3449278, 0.932358, 0.6249769, 0.3686577, 0.0291672),
    ],
    "ddim_uniform": [
        *(8.3906848, 5.1344311, 3.3477636, 2.2928538, 1.6236921),
        *(1.168216, 0.8356528, 0.5740503, 0.3461867, 0.0413144),
    ],
    "karras": [
        *(14.6146412, 9.1029281, 5.478392, 3.1686031, 1.749417),
        *(0.9140723, 0.4469182, 0.2013983, 0.0819102, 0.0291672),
    ],
    "exponential": [
        *(14.6146412, 7.3248702, 3.6712309, 1.840024, 0.9222215),
        *(0.4622182, 0.2316641, 0.1161103, 0.0581946, 0.0291672),
    ],
}
"""Ten steps on Stable Diffusion's table, as ComfyUI computes them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_ten_steps_on_stable_diffusion(name: str) -> None:
    np.testing.assert_allclose(make_grid(name, SD, 10).ratios[:-1], PUBLISHED[name], rtol=4e-6)


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
def test_more_steps_than_entries(name: str, process: Process) -> None:
    n = process.training_steps + 1
    with pytest.raises(InvalidInputError) as caught:
        make_grid(name, process, n)
    for part in (f"{name}: {n} steps", f"table of {n - 1} entries", "fewer steps", "karras"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", BETWEEN_ENTRIES)
def test_grids_between_the_entries_have_no_limit(name: str) -> None:
    for process in (VP, PURE, fp.flow(), fp.edm(), fp.vp_from_betas([0.1, 0.2, 0.3])):
        assert len(make_grid(name, process, 1500).steps) == 1500


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
    assert grid.options == {"offset": 1}
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
