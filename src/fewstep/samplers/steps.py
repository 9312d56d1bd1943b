"""The step maths that all samplers are made of. Every formula stands here once, in (alpha, sigma).

A step goes from level t to the less noisy level s; `h = log_snr(s) - log_snr(t) > 0`, infinite when s is clean or t is
pure noise. The functions only add and scale, so they work on a tape's symbolic vectors and on tensors alike.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import numpy as np

from fewstep.plan import Vector
from fewstep.process import Level, log_snr_step

V = TypeVar("V", bound=Vector)


class Output(NamedTuple):
    """An estimate of x_0 and the level at which it was made."""

    level: Level
    value: Vector


def exponential_step(x: Vector, target: Vector, t: Level, s: Level) -> Vector:
    """Solve the ODE from t to s for a constant estimate of x_0: `(sigma_s / sigma_t) x + alpha_s (1 - e^-h) target`.

    This one update is DDIM, Euler in sigma/alpha, DPM-Solver++(1) and the Euler step of rectified flow.

    Source: Lu et al. 2022, arXiv 2211.01095, equation 9.
    """
    return (s.sigma / t.sigma) * x + (s.alpha * -math.expm1(-log_snr_step(t, s))) * target


def noise_estimate(x: Vector, denoised: Vector, t: Level) -> Vector:
    """The noise that the estimate of x_0 leaves in x: `(x - alpha_t D) / sigma_t`."""
    return (x - t.alpha * denoised) / t.sigma


class Split(NamedTuple):
    """A level's noise `sigma / alpha` divided into a kept and a fresh part, `down^2 + up^2 = ratio^2`."""

    down: float
    up: float


def ancestral_split(t: Level, s: Level, eta: float) -> Split:
    """How much of the noise at s is kept and how much is fresh: `up = min(r_s, eta r_s sqrt(1 - r_s^2 / r_t^2))`.

    With eta = 1 the step is the posterior of the forward process (DDPM), with 0 it is deterministic (DDIM).

    Source: Song, Meng, Ermon 2021, arXiv 2010.02502, equation 16, written for any path.
    """
    up = s.ratio * min(1.0, eta * math.sqrt(-math.expm1(-2 * log_snr_step(t, s))))
    return Split(math.sqrt(max(0.0, (s.ratio - up) * (s.ratio + up))), up)


def renoised(
    denoised: Vector, kept: Vector, fresh: Vector | None, split: Split, s: Level
) -> Vector:
    """Put an estimate of x_0 back on level s: `alpha_s (D + down kept + up fresh)`."""
    point = denoised + split.down * kept
    return s.alpha * (point if fresh is None else point + split.up * fresh)


def exponential_moments(h: float, count: int) -> list[float]:
    """`I_k(h) = h int_0^1 e^(-h (1 - u)) u^k du` for k = 0..count-1, the weights of an exponential integrator.

    `I_0 = 1 - e^-h`, `I_k = 1 - (k / h) I_{k-1}`, and all are 1 at h = inf. The recursion cancels for small h, where
    the series `k! h sum_m (-h)^m / (m + k + 1)!` is summed instead. In terms of the phi functions,
    `I_k = k! h phi_{k+1}(-h)`.

    Source: Hochbruck, Ostermann 2010, Acta Numerica 19, section 2.

    >>> exponential_moments(math.inf, 3)
    [1.0, 1.0, 1.0]
    """
    if h < 1.0:
        return [_moment_series(h, k) for k in range(count)]
    moments = [-math.expm1(-h)]
    for k in range(1, count):
        moments.append(1 - k / h * moments[-1])
    return moments


def _moment_series(h: float, k: int) -> float:
    term = total = h / (k + 1)
    for m in range(1, 30):
        term *= -h / (m + k + 1)
        total += term
    return total


def quadrature_weights(nodes: list[float], moments: list[float]) -> list[float]:
    """Weights w with `sum_j w_j nodes_j^k = moments_k`: the rule that is exact for polynomials on these nodes."""
    powers = np.vander(np.array(nodes), len(moments), increasing=True).T
    return np.linalg.solve(powers, np.array(moments)).tolist()
