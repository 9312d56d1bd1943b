"""Noise: standard normal, belonging to the image, and one Brownian path for all step counts."""

from __future__ import annotations

import itertools
import math
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import fewstep as fs
from fewstep import noise as module
from fewstep.errors import InvalidInputError
from fewstep.noise import Noise

SHAPE = (2, 3, 3)


def level(log_snr: float) -> fs.Level:
    """On the variance-preserving path; infinite log_snr too."""
    alpha = (1 + math.exp(-2 * log_snr)) ** -0.5 if log_snr > -math.inf else 0.0
    sigma = (1 + math.exp(2 * log_snr)) ** -0.5 if log_snr < math.inf else 0.0
    return fs.Level(0.0, alpha, sigma)


PURE, CLEAN = level(-math.inf), level(math.inf)
LEVELS = [level(v) for v in (-6.0, -2.5, -2.4, 0.0, 0.01, 1.7, 5.0)]


# ---- the noise belongs to the image ----------------------------------------------------------


@given(
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6),
    st.integers(0, 2**32),
)
@settings(max_examples=30)
def test_an_image_has_the_same_noise_in_any_batch_and_order_of_questions(
    seeds: list[int], order: int
) -> None:
    rng = random.Random(order)
    steps = [tuple(rng.sample([PURE, *LEVELS, CLEAN], 2)) for _ in range(6)]
    batch = Noise(seeds, SHAPE)
    together = {step: batch(*step) for step in steps}
    rng.shuffle(steps)
    for k, seed in enumerate(seeds):
        alone = Noise([seed], SHAPE)
        assert alone.initial()[0].equal(batch.initial()[k])
        for step in steps:
            assert alone(*step)[0].equal(together[step][k])


def test_asking_again_gives_the_same() -> None:
    noise = Noise([3, 1, 2], SHAPE)
    first = [noise(a, b) for a in LEVELS for b in LEVELS if a != b]
    again = [noise(a, b) for a in LEVELS for b in LEVELS if a != b]
    assert all(x.equal(y) for x, y in zip(first, again, strict=True))
    assert noise.initial().equal(noise.initial())


def test_threads_get_what_each_gets_alone() -> None:
    shared = Noise(range(4), SHAPE)
    pairs = [(a, b) for a in LEVELS for b in LEVELS if a != b]
    alone = [Noise(range(4), SHAPE)(a, b) for a, b in pairs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for got, wanted in zip(pool.map(lambda p: shared(*p), pairs), alone, strict=True):
                assert got.equal(wanted)


def test_torch_threads_do_not_matter() -> None:
    one = Noise([0, 1], SHAPE)(LEVELS[1], LEVELS[3])
    torch.set_num_threads(4)
    assert Noise([0, 1], SHAPE)(LEVELS[1], LEVELS[3]).equal(one)


def test_what_is_remembered_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    remembering = Noise([0, 1], SHAPE)
    monkeypatch.setattr(module, "REMEMBERED", 0)
    forgetful = Noise([0, 1], SHAPE)
    for a, b in zip(LEVELS, LEVELS[1:], strict=False):
        assert forgetful(a, b).equal(remembering(a, b))


def test_global_generators_are_neither_used_nor_touched() -> None:
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["pos"]  # type: ignore[index,call-overload]
    noise = Noise([0], SHAPE)
    noise.initial(), noise(LEVELS[0], LEVELS[2])
    assert torch.get_rng_state().equal(states[0])
    assert np.random.get_state(legacy=False)["state"]["pos"] == states[1]  # type: ignore[index,call-overload]


def test_the_type_and_shape_are_as_asked() -> None:
    for dtype in (torch.float32, torch.float64):
        noise = Noise([0, 1, 2], SHAPE, dtype=dtype)
        for x in (noise.initial(), noise(PURE, CLEAN)):
            assert (x.shape, x.dtype, x.device.type) == ((3, *SHAPE), dtype, "cpu")
    exact, single = (Noise([0], SHAPE, dtype=t) for t in (torch.float64, torch.float32))
    assert exact(*LEVELS[:2]).float().equal(single(*LEVELS[:2]))


@pytest.mark.parametrize("shape", [(), (5,), (1, 28, 28)])
def test_any_shape_of_image_will_do(shape: tuple[int, ...]) -> None:
    noise = Noise([0, 1], shape)
    assert noise.initial().shape == noise(*LEVELS[:2]).shape == (2, *shape)


# ---- standard normal, Brownian ---------------------------------------------------------------


def draws(start: fs.Level, end: fs.Level, seeds: range = range(40)) -> np.ndarray:
    return Noise(seeds, (500,), dtype=torch.float64)(start, end).numpy().ravel()


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (PURE, LEVELS[0]),
        (PURE, CLEAN),
        (LEVELS[1], LEVELS[2]),
        (LEVELS[3], LEVELS[4]),
        (level(1.0), level(1.001)),
        (level(-0.0005), level(0.0005)),
        (LEVELS[5], CLEAN),
        (LEVELS[6], LEVELS[0]),
    ],
    ids=str,
)
def test_increments_are_standard_normal(start: fs.Level, end: fs.Level) -> None:
    z = draws(start, end)
    assert stats.kstest(z, "norm").pvalue > 1e-4
    n = len(z)
    assert abs(z.mean()) < 4.5 / math.sqrt(n)
    assert abs(z.var() - 1) < 4.5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 4.5 * math.sqrt(96 / n)


def test_the_start_is_standard_normal_and_independent_of_the_path() -> None:
    noise = Noise(range(40), (500,), dtype=torch.float64)
    z = noise.initial().numpy().ravel()
    assert stats.kstest(z, "norm").pvalue > 1e-4
    for a, b in ((PURE, LEVELS[0]), (LEVELS[0], LEVELS[3]), (PURE, CLEAN)):
        assert abs(np.corrcoef(z, noise(a, b).numpy().ravel())[0, 1]) < 4.5 / math.sqrt(len(z))


def test_disjoint_intervals_are_independent() -> None:
    ordered = [PURE, *LEVELS, CLEAN]
    columns = np.array([draws(a, b) for a, b in zip(ordered, ordered[1:], strict=False)])
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4.5 / math.sqrt(columns.shape[1])
    squares = np.corrcoef(columns**2) - np.eye(len(columns))
    assert np.abs(squares).max() < 4.5 / math.sqrt(columns.shape[1])


def test_overlapping_intervals_share_what_they_share() -> None:
    """`corr = sqrt(u_2 - u_1) / sqrt(u_3 - u_1)` for [1, 2] inside [1, 3], with `u = snr^2`."""
    a, b, c = level(0.0), level(0.4), level(0.9)
    expected = math.sqrt((math.exp(0.8) - 1) / (math.exp(1.8) - 1))
    measured = np.corrcoef(draws(a, b), draws(a, c))[0, 1]
    assert measured == pytest.approx(expected, abs=4.5 / math.sqrt(20_000))


class _Exact(module._Paths):
    """Each draw is a unit vector of its own, so that products of increments are their covariances."""

    def __init__(self) -> None:
        super().__init__((0,), (1000,))
        self._numbers: dict[int, int] = {}

    def normal(self, node: int) -> np.ndarray:
        return np.eye(1, 1000, self._numbers.setdefault(node, len(self._numbers)))


@given(st.lists(st.floats(-35, 35), min_size=4, max_size=12, unique=True))
@settings(max_examples=50)
def test_the_law_is_exactly_that_of_brownian_motion(points: list[float]) -> None:
    """`cov = overlap / sqrt(length length')`, lengths in `u = e^(2 log_snr)`: no statistics, no chance."""
    reach = module.REACH
    points = sorted(min(max(p, -reach), reach) for p in points)
    steps = [
        (a, b) for a, b in itertools.combinations(points, 2) if module._cell(a) != module._cell(b)
    ]
    path = _Exact()
    vectors = [path.increment(a, b)[0] for a, b in steps]
    for (one, (a, b)), (two, (c, d)) in itertools.combinations_with_replacement(
        zip(vectors, steps, strict=True), 2
    ):
        low, high = max(a, c), min(b, d)
        top = max(b, d)  # everything is over e^(2 top), so that nothing overflows
        overlap = _length(low, high, top) if low < high else 0.0
        size = math.sqrt(_length(a, b, top)) * math.sqrt(_length(c, d, top))
        cells = {module._cell(v) for v in (a, b, c, d)}
        if len(cells) == len({a, b, c, d}) and size > 0:
            assert one @ two == pytest.approx(overlap / size, abs=1e-6)


def _length(a: float, b: float, top: float) -> float:
    return math.exp(2 * (b - top)) * -math.expm1(2 * (a - b))


@pytest.mark.parametrize("pair", [(0, 1), (0, 2**62), (1, 2), (2**32, 2**33), (5, 5 + 2**40)])
def test_different_seeds_are_independent(pair: tuple[int, int]) -> None:
    x, y = Noise(pair, (20_000,), dtype=torch.float64)(LEVELS[0], LEVELS[3]).numpy()
    assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / math.sqrt(20_000)


def test_no_two_draws_are_alike() -> None:
    """Pixels, nodes and seeds all get their own numbers."""
    noise = Noise(range(50), (40,), dtype=torch.float64)
    values = [noise.initial(), noise(PURE, LEVELS[0]), noise(LEVELS[3], LEVELS[5])]
    numbers = torch.stack(values).flatten()
    assert len(numbers.unique()) == len(numbers)


@given(st.lists(st.floats(-8, 8), min_size=3, max_size=12, unique=True))
@settings(max_examples=50)
def test_raw_increments_add_up(points: list[float]) -> None:
    points = sorted(points)
    points = [points[0]] + [b for a, b in zip(points, points[1:], strict=False) if b - a > 1e-3]
    if len(points) < 3:
        return
    noise = Noise([11], (50,), dtype=torch.float64)

    def raw(a: float, b: float) -> torch.Tensor:
        """`B(u_b) - B(u_a)` in units of `sqrt(u_b)`."""
        return noise(level(a), level(b)) * math.sqrt(-math.expm1(2 * (a - b)))

    scale = [math.exp(p - points[-1]) for p in points]
    parts = [raw(a, b) * s for a, b, s in zip(points, points[1:], scale[1:], strict=False)]
    whole = raw(points[0], points[-1])
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-6, atol=1e-6)


def test_going_back_turns_the_sign() -> None:
    noise = Noise([0], SHAPE)
    assert noise(LEVELS[1], LEVELS[5]).equal(-noise(LEVELS[5], LEVELS[1]))


def test_the_ends_of_the_path_are_the_ends_of_its_reach() -> None:
    noise = Noise([0], SHAPE)
    reach = module.REACH
    assert noise(PURE, LEVELS[3]).equal(noise(level(-reach), LEVELS[3]))
    assert noise(LEVELS[3], CLEAN).equal(noise(LEVELS[3], level(reach)))
    assert noise(level(-reach - 5), level(reach + 5)).equal(noise(PURE, CLEAN))
    assert noise(PURE, CLEAN).isfinite().all()


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seeds",
    [[], [-1], [2**63], [0, -5], [1.5], [math.nan], ["3"], [None], 7, None, "12", [[1]]],
    ids=repr,
)
def test_bad_seeds_are_refused(seeds: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"whole numbers in 0\.\.2\^63-1.*got"):
        Noise(seeds, SHAPE)


@pytest.mark.parametrize(
    "seeds",
    [(4, 5), range(4, 6), np.array([4, 5]), torch.tensor([4, 5])],
    ids=lambda s: type(s).__name__,
)
def test_seeds_may_come_in_any_sequence(seeds: Any) -> None:
    noise = Noise(seeds, SHAPE)
    assert noise.seeds == (4, 5)
    assert noise.initial().equal(Noise([4, 5], SHAPE).initial())


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (LEVELS[0], LEVELS[0]),
        (PURE, PURE),
        (CLEAN, CLEAN),
        (PURE, level(-40.0)),
        (level(1.0), level(1.00001)),
    ],
    ids=str,
)
def test_levels_too_near_to_have_noise_of_their_own_are_refused(
    start: fs.Level, end: fs.Level
) -> None:
    with pytest.raises(
        InvalidInputError, match=r"no noise between .*must differ by more than 2\.4e-04"
    ):
        Noise([0], SHAPE)(start, end)


def test_every_step_of_the_longest_training_tables_has_noise_of_its_own() -> None:
    for process in (fs.process.vp_linear(4000), fs.process.vp_cosine(4000)):
        levels = process.levels([float(t) for t in range(4000)])
        cells = [module._cell(v.log_snr) for v in levels]
        assert len(set(cells)) == len(cells)
