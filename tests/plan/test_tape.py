"""The symbolic vectors are a vector space, and the tape writes down what was done with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewstep as fs
from fewstep.errors import InvalidInputError
from fewstep.plan import Combine, Denoise, Draw, Tape, Vector

NUMBERS = st.floats(-1e6, 1e6)
VECTORS = st.dictionaries(st.integers(0, 5), NUMBERS, max_size=4)
NOISY, MIDDLE, CLEAN = (
    fs.Level(2.0, 0.6, 0.8),
    fs.Level(1.0, 0.8, 0.6),
    fs.Level(0.0, 1.0, 0.0),
)


def dense(vector: Vector) -> np.ndarray:
    out = np.zeros(6)
    for register, c in vector.terms.items():
        out[register] += c
    return out


@given(VECTORS, VECTORS, NUMBERS, NUMBERS.filter(lambda v: abs(v) > 1e-3))
def test_arithmetic_is_that_of_coefficient_vectors(
    a: dict[int, float], b: dict[int, float], factor: float, divisor: float
) -> None:
    u, v = Vector(a), Vector(b)
    x, y = dense(u), dense(v)
    close = np.testing.assert_allclose
    close(dense(u + v), x + y)
    close(dense(u - v), x - y, atol=1e-9)
    close(dense(factor * u), factor * x)
    close(dense(u * factor), factor * x)
    close(dense(u / divisor), x / divisor, rtol=1e-12)
    close(dense(-u), -x)
    close(dense(factor * (u - v) / divisor + u), factor * (x - y) / divisor + x, rtol=1e-9)


@given(VECTORS, VECTORS)
def test_arithmetic_leaves_its_operands_alone(a: dict[int, float], b: dict[int, float]) -> None:
    u, v = Vector(dict(a)), Vector(dict(b))
    _ = (u + v, u - v, 3 * u, u / 2, -u)
    assert u.terms == a
    assert v.terms == b


@pytest.mark.parametrize("number", [np.float64(3), np.float32(3), np.int64(3), torch.tensor(3.0)])
def test_numbers_of_other_libraries_scale_a_vector_to_plain_floats(number: object) -> None:
    for vector in (number * Vector({0: 2.0}), Vector({0: 2.0}) * number):  # type: ignore[operator]
        assert vector.terms == {0: 6.0}
        assert type(vector.terms[0]) is float
    assert (Vector({0: 6.0}) / number).terms[0] == pytest.approx(2.0)  # type: ignore[operator]


@pytest.mark.parametrize("product", [lambda v: v * v, lambda v: v / v])
def test_products_of_vectors_are_refused(product) -> None:
    with pytest.raises(InvalidInputError, match="linear"):
        product(Vector({0: 1.0}))


def test_the_tape_writes_down_what_was_done() -> None:
    tape = Tape()
    denoised = tape.denoise(tape.start, NOISY)
    noise = tape.noise(NOISY, MIDDLE)
    x = 0.5 * tape.start + 0.25 * denoised + 0.75 * noise
    again = tape.denoise(x, MIDDLE)
    result = tape.finish(again)
    assert tape.program == [
        Denoise(1, 0, NOISY),
        Draw(2, NOISY, MIDDLE),
        Combine(3, ((0, 0.5), (1, 0.25), (2, 0.75))),
        Denoise(4, 3, MIDDLE),
    ]
    assert result == 4


def test_an_evaluated_point_gets_a_register_once_and_is_read_from_there() -> None:
    tape = Tape()
    x = 0.5 * tape.start
    tape.denoise(x, NOISY)
    tape.denoise(x, MIDDLE)
    later = 2 * x
    combines = [i for i in tape.program if isinstance(i, Combine)]
    assert len(combines) == 1
    assert later.terms == {combines[0].out: 2.0}


def test_settle_makes_a_long_sum_one_register() -> None:
    tape = Tape()
    x = 0.5 * tape.start + tape.noise(NOISY, MIDDLE)
    settled = tape.settle(x)
    assert len(settled.terms) == 1
    assert tape.program[-1] == Combine(2, ((0, 0.5), (1, 1.0)))
    before = list(tape.program)
    tape.settle(settled)
    assert tape.program == before


def test_terms_that_cancel_are_not_read() -> None:
    tape = Tape()
    d = tape.denoise(tape.start, NOISY)
    x = tape.start + d - tape.start
    assert tape.finish(x) == 1
    assert len(tape.program) == 1


def test_what_the_result_does_not_need_is_dropped_but_for_network_calls() -> None:
    tape = Tape()
    first = tape.denoise(tape.start, NOISY)
    unused = tape.settle(0.5 * first + 0.5 * tape.noise(NOISY, MIDDLE))
    tape.settle(2 * unused)
    tape.denoise(0.5 * tape.start, MIDDLE)
    assert tape.finish(first) == 1
    assert [type(i) for i in tape.program] == [Denoise, Combine, Denoise]


def test_nothing_at_all_is_still_a_point() -> None:
    tape = Tape()
    tape.finish(tape.start - tape.start)
    assert tape.program == [Combine(1, ((0, 0.0),))]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_coefficients_must_be_finite(bad: float) -> None:
    tape = Tape()
    with pytest.raises(InvalidInputError, match=r"instruction 0 .* -?(nan|inf);.*divides"):
        tape.denoise(bad * tape.start, NOISY)


def test_a_clean_level_cannot_be_denoised() -> None:
    tape = Tape()
    with pytest.raises(InvalidInputError, match="clean level .* last estimate"):
        tape.denoise(tape.start, CLEAN)


@pytest.mark.parametrize("result", [None, 1.0, torch.zeros(2)])
def test_a_sampler_must_return_a_vector(result: object) -> None:
    grid = fs.Grid.from_ratios(fs.process.edm(), [1.0, 0.0])
    with pytest.raises(InvalidInputError, match="must return a Vector"):
        fs.plan(lambda tape, grid: result, grid)  # type: ignore[arg-type,return-value]
