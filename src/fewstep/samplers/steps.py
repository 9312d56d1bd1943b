"""The step maths that all samplers are made of. Every formula stands here once, in (alpha, sigma).

A step goes from level t to the less noisy level s; `h = log_snr(s) - log_snr(t) > 0`, infinite when s is clean or t is
pure noise. The functions only add and scale, so they work on a tape's symbolic vectors and on tensors alike.

With `x^ = x / alpha` and `r = sigma / alpha` every forward process has the same ODE,
`dx^ / dr = noise = (x^ - D) / r`, or `dx^ / dlog_snr = D - x^`. So whatever is a method in (x^, r) is one sampler for
all processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from fewstep.plan import Vector
from fewstep.process import Level, Process, log_snr_step

V = TypeVar("V", Vector, Tensor)


class Output(NamedTuple, Generic[V]):
    """An estimate of x_0 (or of the noise) and the level at which it was made."""

    level: Level
    value: V


def is_open(t: Level, s: Level) -> bool:
    """Whether a step has a finite length in log_snr: it neither starts at pure noise nor ends at clean data."""
    return not (t.is_pure_noise or s.is_clean)


def level_between(process: Process, t: Level, s: Level, fraction: float) -> Level:
    """The level at `log_snr(t) + fraction h`; the fraction may be outside 0..1."""
    return process.levels_at([t.ratio * math.exp(-fraction * log_snr_step(t, s))])[0]


def noise_estimate(x: V, denoised: V, t: Level) -> V:
    """The noise that the estimate of x_0 leaves in x: `(x - alpha_t D) / sigma_t`."""
    return (x - t.alpha * denoised) / t.sigma


# ---- first order -----------------------------------------------------------------------------


def exponential_step(x: V, target: V, t: Level, s: Level, eta: float = 0.0) -> V:
    """Solve the ODE from t to s for a constant estimate of x_0, `(sigma_s / sigma_t) x + alpha_s (1 - e^-h) target`.

    This one update is DDIM, Euler in sigma/alpha, DPM-Solver++(1) and the Euler step of rectified flow. With eta > 0
    it is the drift of the reverse SDE of that strength, `(sigma_s / sigma_t) e^(-eta h) x + alpha_s (1 - e^-H) target`,
    `H = (1 + eta) h`, to which noise of standard deviation `fresh_std` belongs.

    Source: Lu et al. 2022, arXiv 2211.01095, equations 9 and 14.
    """
    h = log_snr_step(t, s)
    kept = s.sigma / t.sigma * (math.exp(-eta * h) if eta else 1.0)
    return kept * x + (s.alpha * -math.expm1(-(1 + eta) * h)) * target


def fresh_std(t: Level, s: Level, eta: float) -> float:
    """Standard deviation of the noise that the reverse SDE adds from t to s: `sigma_s sqrt(1 - e^(-2 eta h))`."""
    return s.sigma * math.sqrt(-math.expm1(-2 * eta * log_snr_step(t, s))) if eta else 0.0


def noise_step(x: V, noise: V, t: Level, s: Level) -> V:
    """Solve the ODE from t to s for a constant noise: `x^ + (r_s - r_t) noise`; t must not be pure noise."""
    return (s.alpha / t.alpha) * x + (s.alpha * (s.ratio - t.ratio)) * noise


# ---- fresh noise -----------------------------------------------------------------------------


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


def renoised(denoised: V, kept: V, fresh: V | None, split: Split, s: Level) -> V:
    """Put an estimate of x_0 back on level s: `alpha_s (D + down kept + up fresh)`."""
    point = denoised + split.down * kept
    return s.alpha * (point if fresh is None else point + split.up * fresh)


def raised(x: V, t: Level, s: Level, fresh: V) -> V:
    """Carry a point up from t to the noisier level s with fresh noise: `x^ + sqrt(r_s^2 - r_t^2) fresh`.

    `s.ratio` may exceed `t.ratio` because of churn, a restart, or because t is the kept part of s's noise.
    """
    up = math.sqrt(max(0.0, (s.ratio - t.ratio) * (s.ratio + t.ratio)))
    return (s.alpha / t.alpha) * x + (s.alpha * up) * fresh


# ---- higher order ----------------------------------------------------------------------------


def exponential_moments(h: float, count: int) -> list[float]:
    """`I_k(h) = h int_0^1 e^(-h (1 - u)) u^k du` for k = 0..count-1, the weights of an exponential integrator.

    `I_0 = 1 - e^-h`, `I_k = 1 - (k / h) I_{k-1}`, and all are 1 at h = inf. The recursion cancels for small h, where
    the series `k! h sum_m (-h)^m / (m + k + 1)!` is summed instead. In terms of the phi functions,
    `I_k = k! h phi_{k+1}(-h)`. Negative h gives the weights of the noise form, `-I_k(-h)`.

    Source: Hochbruck, Ostermann 2010, Acta Numerica 19, section 2.

    >>> exponential_moments(math.inf, 3)
    [1.0, 1.0, 1.0]
    """
    if abs(h) < 1.0:
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


def quadrature_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights w with `sum_j w_j nodes_j^k = moments_k`: the rule that is exact for polynomials on these nodes."""
    powers = np.vander(np.array(nodes), len(moments), increasing=True).T
    return np.linalg.solve(powers, np.array(moments)).tolist()


def exponential_rule(
    x: V,
    outputs: Sequence[Output[V]],
    s: Level,
    *,
    eta: float = 0.0,
    noise_form: bool = False,
    moments: Sequence[float] | None = None,
) -> V:
    """Solve the ODE from t to s for outputs that are polynomial in log_snr: one order for each output.

    Data form: `(sigma_s / sigma_t) e^(-eta h) x + alpha_s (I_0 D_t + sum_j w_j / theta_j (D_j - D_t))`, where `I_k(H)`
    with `H = (1 + eta) h`. Noise form: `(alpha_s / alpha_t) x + sigma_s (I_0 e_t + sum_j w_j / theta_j (e_j - e_t))`,
    where `I_k(-h)`. `theta_j` is the place of output j, 0 at t and 1 at s; it may be behind (multistep), between
    (singlestep) or at s (corrector).

    Args:
        x: The point at t.
        outputs: The outputs, the first one at t; estimates of x_0, or of the noise in noise form.
        s: The level to step to.
        eta: Strength of the reverse SDE whose drift is solved.
        noise_form: Which of the two.
        moments: What the weights solve, `sum_j w_j theta_j^(k-1) = moments_k`, k = 1, 2...: by default `I_k`, which is
            exact. Published methods that replace some of them give theirs.

    Source: Hochbruck, Ostermann 2010, Acta Numerica 19; Zhao et al. 2023, arXiv 2302.04867.
    """
    current, *others = outputs
    t = current.level
    h = log_snr_step(t, s)
    if noise_form:
        length, gain, kept = -h, s.sigma, s.alpha / t.alpha
    else:
        length, gain = (1 + eta) * h, s.alpha
        kept = s.sigma / t.sigma * (math.exp(-eta * h) if eta else 1.0)
    exact = exponential_moments(length, len(outputs))
    x = kept * x + (gain * exact[0]) * current.value
    if not others:
        return x
    nodes = [log_snr_step(t, output.level) / h for output in others]
    weights = quadrature_weights(nodes, exact[1:] if moments is None else moments)
    for weight, node, output in zip(weights, nodes, others, strict=True):
        x = x + (gain * weight / node) * (output.value - current.value)
    return x


def adams_rule(x: V, noises: Sequence[Output[V]], s: Level) -> V:
    """`x^ + (r_s - r_t) sum_j c_j noise_j`, exact for noise estimates that are polynomial in `r = sigma / alpha`.

    The first output is the one at t; with all of them behind it this is the Adams-Bashforth method with steps of any
    size. t must not be pure noise.

    Source: Hairer, Norsett, Wanner 1993, Solving Ordinary Differential Equations I, section III.5.
    """
    t = noises[0].level
    nodes = [(output.level.ratio - t.ratio) / (s.ratio - t.ratio) for output in noises]
    weights = quadrature_weights(nodes, [1 / (k + 1) for k in range(len(nodes))])
    return noise_step(x, weighted(weights, [output.value for output in noises]), t, s)


def weighted(weights: Sequence[float], values: Sequence[V]) -> V:
    """`sum_j w_j value_j`."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total
