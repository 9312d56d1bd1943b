"""Grids written by hand run exactly as given, and lists that make no grid are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import process as fp
from fewstep.errors import InvalidInputError
from fewstep.process import Level, Process
from fewstep.schedulers import Grid, karras

EDM, VP, FLOW = fp.edm(), fp.vp_linear(), fp.flow()
PURE = fp.vp_linear(zero_terminal_snr=True)

falling_exponents = st.lists(st.integers(-3000, 3000), min_size=1, max_size=12, unique=True).map(
    lambda exponents: sorted(exponents, reverse=True)
)


@pytest.mark.parametrize("process", [EDM, VP, FLOW, PURE, fp.vp_continuous(), fp.ve()], ids=repr)
@settings(max_examples=30)
@given(exponents=falling_exponents, end_clean=st.booleans())
def test_ratios_run_as_given(process: Process, exponents: list[int], end_clean: bool) -> None:
    given_ratios = [10 ** (e / 1000) for e in exponents] + [0.0] * (
        end_clean or len(exponents) < 2
    )
    grid = Grid.from_ratios(process, given_ratios)
    assert grid.ratios == pytest.approx(given_ratios, rel=5e-16, abs=0)
    assert len(grid.steps) == len(given_ratios) - 1
    assert grid.scheduler == "custom"
    for level, ratio in zip(grid.levels, given_ratios, strict=True):
        assert level.t == process.time(ratio=ratio)


def test_ratios_of_edm_run_bit_for_bit() -> None:
    given_ratios = [157.3, 80.0, 1 / 3, 0.1 + 0.2, 1e-9, 0.0]
    grid = Grid.from_ratios(EDM, given_ratios)
    assert grid.ratios == given_ratios
    assert grid.times[0] == 80.0  # beyond the trained range the network is asked at its end
    assert grid.times[-1] == 0.0


@pytest.mark.parametrize("process", [VP, PURE, FLOW, fp.vp_continuous()], ids=repr)
def test_pure_noise_may_come_first(process: Process) -> None:
    grid = Grid.from_ratios(process, [math.inf, 3.0, 0.5, 0])
    first = grid.levels[0]
    assert (first.alpha, first.sigma) == (0.0, 1.0)
    assert first.t == pytest.approx(process.t_max)
    assert "inf, 3, 0.5, 0" in str(grid)


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 999_000), min_size=1, max_size=12, unique=True),
    st.booleans(),
)
def test_times_run_as_given(milli: list[int], end_clean: bool) -> None:
    times = [m / 1000 for m in sorted(milli, reverse=True)]
    end_clean = end_clean or len(times) < 2
    grid = Grid.from_times(VP, times, end_clean=end_clean)
    assert grid.times == [*times, -1.0][: len(times) + end_clean]
    assert grid.levels[-1].is_clean == end_clean
    assert list(grid.levels[: len(times)]) == VP.levels(times)


@pytest.mark.parametrize("process", [VP, PURE, fp.vp_continuous(), fp.ve(), EDM, FLOW], ids=repr)
def test_times_may_name_clean_data_themselves(process: Process) -> None:
    times = [process.t_max, (process.t_min + process.t_max) / 2]
    named = Grid.from_times(process, [*times, process.clean_time])
    assert named == Grid.from_times(process, times)
    assert named.levels[-1] == process.clean
    assert named.times == [*times, process.clean_time]


@pytest.mark.parametrize("numbers", [np.array, torch.tensor, tuple, iter])
def test_any_list_of_numbers_will_do(numbers) -> None:
    assert Grid.from_ratios(EDM, numbers([4, 2, 0])).ratios == [4.0, 2.0, 0.0]
    assert Grid.from_times(VP, numbers([900, 100])).times == [900.0, 100.0, -1.0]


def test_steps_are_neighbouring_levels() -> None:
    grid = Grid.from_ratios(EDM, [4, 2, 1, 0])
    assert [(t.ratio, s.ratio) for t, s in grid.steps] == [(4, 2), (2, 1), (1, 0)]
    assert grid.steps[0][1] is grid.steps[1][0]
    assert str(grid) == "custom on edm, 3 steps: 4, 2, 1, 0"


REMEDY = "sort the list from noisy to clean and drop repeats"


@pytest.mark.parametrize(
    ("ratios", "parts"),
    [
        ([0, 1, 2], ["level 1 (sigma/alpha=1)", "level 0 (0)", REMEDY]),
        ([3, 1, 2, 0], ["level 2 (sigma/alpha=2)", "level 1 (1)", REMEDY]),
        ([3, 1, 1, 0], ["level 2 (sigma/alpha=1)", "level 1 (1)", REMEDY]),
        ([3, 1, 0, 0], ["level 3 (sigma/alpha=0)", REMEDY]),
        ([math.inf, math.inf, 0], ["level 1 (sigma/alpha=inf)", REMEDY]),
        ([3, 1, -0.5], ["sigma/alpha=-0.5", "[0, inf]"]),
        ([3, math.nan, 0], ["sigma/alpha=nan", "[0, inf]"]),
        ([-math.inf, 0], ["sigma/alpha=-inf", "[0, inf]"]),
        ([3], ["at least 2 levels, got 1", "end with 0"]),
        ([], ["at least 2 levels, got 0", "noisy one first"]),
        (["three", 0], ["list of numbers", "three"]),
        ([3, None], ["list of numbers", "None"]),
        ([[3, 1], [0, 0]], ["list of numbers"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("process", [VP, FLOW], ids=repr)
def test_ratios_that_make_no_grid(process: Process, ratios: list[float], parts: list[str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Grid.from_ratios(process, ratios)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("process", [EDM, fp.ve()], ids=repr)
def test_where_alpha_is_one_no_level_is_pure_noise(process: Process) -> None:
    with pytest.raises(InvalidInputError, match="sigma/alpha=inf .* start with a finite value"):
        Grid.from_ratios(process, [math.inf, 1, 0])


@pytest.mark.parametrize(
    ("times", "parts"),
    [
        ([1, 500], ["level 1", REMEDY]),
        ([500, 500], ["level 1", REMEDY]),
        ([1000, 500], ["time 1000", "0..999"]),
        ([500, -0.5], ["time -0.5", "0..999", "clean: -1"]),
        ([500, math.nan], ["time nan", "0..999"]),
        ([500, -1, 3], ["level 2", REMEDY]),
        ([], ["at least 2 levels, got 1"]),
        (["late"], ["list of numbers", "late"]),
    ],
    ids=str,
)
def test_times_that_make_no_grid(times: list[float], parts: list[str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Grid.from_times(VP, times)
    for part in parts:
        assert part in str(caught.value)


def test_a_grid_checks_levels_however_it_is_made() -> None:
    with pytest.raises(InvalidInputError, match="fall strictly"):
        Grid(VP, (Level(1, 0.8, 0.6), Level(2, 0.8, 0.6)))
    with pytest.raises(InvalidInputError, match="fall strictly"):
        Grid(VP, (Level(1, 0.8, 0.6), Level(2, math.nan, math.nan)))


def test_a_grid_cannot_be_changed() -> None:
    grid = karras(VP, 3)
    with pytest.raises(AttributeError):
        grid.levels = ()  # type: ignore[misc]
    with pytest.raises(AttributeError):
        grid.levels[0].t = 3.0  # type: ignore[misc]
