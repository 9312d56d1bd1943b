"""The step maths against quadrature, exact arithmetic and the definitions."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

import fewstep as fs
from fewstep.plan import Vector
from fewstep.process import forward_kernel, log_snr_step, posterior
from fewstep.samplers.steps import (
    ancestral_split,
    exponential_moments,
    exponential_step,
    noise_estimate,
    quadrature_weights,
    renoised,
)

STEPS = [1e-6, 1e-4, 1e-2, 0.3, 0.999999, 1.0, 1.000001, 2.5, 7.0, 20.0, 50.0]
LOG_SNRS = st.floats(-8, 8)


def level(log_snr: float) -> fs.Level:
    """On the variance-preserving path."""
    return fs.Level(0.0, (1 + math.exp(-2 * log_snr)) ** -0.5, (1 + math.exp(2 * log_snr)) ** -0.5)


@pytest.mark.parametrize("h", STEPS)
def test_moments_are_their_integrals(h: float) -> None:
    for k, moment in enumerate(exponential_moments(h, 6)):
        integral, _ = quad(
            lambda u, k=k: h * math.exp(-h * (1 - u)) * u**k,
            0,
            1,
            epsabs=0,
            epsrel=1e-12,
            limit=200,
        )
        assert moment == pytest.approx(integral, rel=1e-11)


@pytest.mark.parametrize("h", [*STEPS, 1e-9, 0.5, 1.5])
def test_moments_are_right_to_rounding(h: float) -> None:
    getcontext().prec = 120
    wide = Decimal(h)
    exact = [1 - (-wide).exp()]
    for k in range(1, 7):
        exact.append(1 - k / wide * exact[-1])
    for got, wanted in zip(exponential_moments(h, 7), exact, strict=True):
        assert abs(Decimal(got) / wanted - 1) < Decimal("1e-12")


def test_moments_of_an_infinite_step_are_one() -> None:
    assert exponential_moments(math.inf, 7) == [1.0] * 7


@given(
    st.lists(st.integers(-30, 10), min_size=1, max_size=6, unique=True),
    st.lists(st.floats(-2, 2), min_size=6, max_size=6),
)
def test_weights_integrate_polynomials_exactly(
    nodes: list[int], coefficients: list[float]
) -> None:
    """With the moments of a functional, the rule equals it on each polynomial of lower degree."""
    points = [n / 10 for n in nodes]
    p = coefficients[: len(points)]
    moments = [1 / (k + 1) for k in range(len(points))]  # the integral over [0, 1]
    weights = quadrature_weights(points, moments)
    rule = sum(
        w * np.polynomial.polynomial.polyval(x, p) for w, x in zip(weights, points, strict=True)
    )
    exact = sum(c * m for c, m in zip(p, moments, strict=True))
    assert rule == pytest.approx(exact, rel=1e-6, abs=1e-6 * max(1.0, max(map(abs, weights))))


@given(LOG_SNRS, st.floats(1e-3, 8), st.floats(-3, 3), st.floats(-3, 3))
def test_an_exponential_step_keeps_the_noise_and_moves_the_data(
    log_snr: float, h: float, x0: float, noise: float
) -> None:
    """On `alpha x_0 + sigma noise` with the estimate x_0 it lands on the same line at the next level."""
    t, s = level(log_snr), level(log_snr + h)
    moved = exponential_step(Vector({0: t.alpha, 1: t.sigma}), Vector({0: 1.0}), t, s)
    assert moved.terms[0] == pytest.approx(s.alpha, rel=1e-12)
    assert moved.terms[1] == pytest.approx(s.sigma, rel=1e-12)


@given(LOG_SNRS, st.floats(1e-3, 8), st.floats(0, 1))
def test_two_exponential_steps_with_one_estimate_are_one(
    log_snr: float, h: float, at: float
) -> None:
    t, m, s = level(log_snr), level(log_snr + at * h), level(log_snr + h)
    x, d = Vector({0: 1.0}), Vector({1: 1.0})
    once = exponential_step(x, d, t, s).terms
    twice = exponential_step(exponential_step(x, d, t, m), d, m, s).terms
    assert twice == pytest.approx(once, rel=1e-11, abs=1e-14)


def test_the_noise_estimate_completes_the_estimate_of_x0() -> None:
    t = level(0.7)
    x, d = Vector({0: 1.0}), Vector({1: 1.0})
    whole = t.alpha * d + t.sigma * noise_estimate(x, d, t)
    assert whole.terms == pytest.approx({0: 1.0, 1: 0.0}, abs=1e-15)


@given(LOG_SNRS, st.floats(1e-3, 8), st.floats(0, 3))
def test_a_split_keeps_the_noise_of_the_level(log_snr: float, h: float, eta: float) -> None:
    t, s = level(log_snr), level(log_snr + h)
    split = ancestral_split(t, s, eta)
    assert math.hypot(split.down, split.up) == pytest.approx(s.ratio, rel=1e-12)
    assert 0 <= split.up <= s.ratio
    assert split.down >= 0


@given(LOG_SNRS, st.floats(1e-3, 8))
def test_a_full_split_is_the_posterior(log_snr: float, h: float) -> None:
    t, s = level(log_snr), level(log_snr + h)
    x, d, z = (Vector({k: 1.0}) for k in range(3))
    got = renoised(d, noise_estimate(x, d, t), z, ancestral_split(t, s, 1.0), s).terms
    q = posterior(t, s)
    assert got == pytest.approx({0: q.on_x, 1: q.on_x0, 2: q.std}, rel=1e-9, abs=1e-12)


@given(LOG_SNRS, st.floats(1e-3, 8))
def test_the_posterior_is_that_of_bayes(log_snr: float, h: float) -> None:
    """Product of the Gaussians `q(x_s | x_0)` and, as a function of x_s, `q(x_t | x_s)`."""
    t, s = level(log_snr), level(log_snr + h)
    kernel, q = forward_kernel(s, t), posterior(t, s)
    precision = 1 / s.sigma**2 + (kernel.scale / kernel.std) ** 2
    assert q.std == pytest.approx(precision**-0.5, rel=1e-9)
    assert q.on_x == pytest.approx(kernel.scale / kernel.std**2 / precision, rel=1e-9)
    assert q.on_x0 == pytest.approx(s.alpha / s.sigma**2 / precision, rel=1e-9)


def test_the_ends_of_the_path_need_no_special_case() -> None:
    pure, t, clean = fs.Level(1.0, 0.0, 1.0), level(0.3), fs.Level(0.0, 1.0, 0.0)
    x, d = Vector({0: 1.0}), Vector({1: 1.0})
    assert log_snr_step(pure, t) == log_snr_step(t, clean) == log_snr_step(pure, clean) == math.inf
    assert exponential_step(x, d, pure, t).terms == pytest.approx({0: t.sigma, 1: t.alpha})
    assert exponential_step(x, d, t, clean).terms == {0: 0.0, 1: 1.0}
    assert exponential_step(x, d, pure, clean).terms == {0: 0.0, 1: 1.0}
    assert ancestral_split(t, clean, 1.0) == (0.0, 0.0)
    assert ancestral_split(pure, t, 1.0) == (0.0, t.ratio)
    assert ancestral_split(pure, t, 0.0) == (t.ratio, 0.0)
