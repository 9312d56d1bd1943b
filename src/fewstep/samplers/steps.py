"""The step maths that all samplers are made of. Every formula stands here once, in (alpha, sigma).

A step goes from level t to the less noisy level s; `h = log_snr(s) - log_snr(t) > 0`, infinite when s is clean or t is
pure noise. The functions only add and scale, so they work on a tape's symbolic vectors and on tensors alike.

With `x^ = x / alpha` and `r = sigma / alpha` every forward process has the same ODE,
`dx^ / dr = noise = (x^ - D) / r`, or `dx^ / dlog_snr = D - x^`. So whatever is a method in (x^, r) is one sampler for
all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from fewstep.plan import Tape, Vector
from fewstep.process import Level, Process, log_snr_step

V = TypeVar("V", Vector, Tensor)
Form = Literal["ratio", "flow_time"]
"""The variable that a step is measured in."""


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
    length = (1 + eta) * log_snr_step(t, s)
    return decay(t, s, eta) * x + (s.alpha * -math.expm1(-length)) * target


def decay(t: Level, s: Level, eta: float = 0.0) -> float:
    """What the reverse SDE keeps from t to s of a deviation from the estimate: `(sigma_s / sigma_t) e^(-eta h)`."""
    return s.sigma / t.sigma * (math.exp(-eta * log_snr_step(t, s)) if eta else 1.0)


def fresh_std(t: Level, s: Level, eta: float, *, noise_form: bool = False) -> float:
    """Standard deviation of the noise that the reverse SDE adds from t to s: `sigma_s sqrt(1 - e^(-2 eta h))`.

    In noise form, where x^ itself does not decay, `sigma_s sqrt(eta (e^2h - 1))`.
    """
    if not eta:
        return 0.0
    h = log_snr_step(t, s)
    return s.sigma * math.sqrt(
        eta * math.expm1(2 * h) if noise_form else -math.expm1(-2 * eta * h)
    )


def noise_step(x: V, noise: V, t: Level, s: Level) -> V:
    """Solve the ODE from t to s for a constant noise: `x^ + (r_s - r_t) noise`; t must not be pure noise."""
    return (s.alpha / t.alpha) * x + (s.alpha * (s.ratio - t.ratio)) * noise


# ---- in flow time: y = x / (alpha + sigma) moves by dy / du = velocity, u = sigma / (alpha + sigma) ---


def flow_time(t: Level) -> float:
    """`u = sigma / (alpha + sigma)`, the time that a flow model would give the level, from 0 (data) to 1 (noise)."""
    return t.sigma / (t.alpha + t.sigma)


def flow_level(process: Process, u: float) -> Level:
    """The level whose `flow_time` is u."""
    return process.levels_at([u / (1 - u) if u < 1 else math.inf])[0]


def velocity_estimate(x: V, denoised: V, t: Level) -> V:
    """The velocity of a flow model, `noise - x_0`, that an estimate of x_0 stands for."""
    return noise_estimate(x, denoised, t) - denoised


def velocity_step(x: V, velocity: V, t: Level, s: Level) -> V:
    """Solve the ODE from t to s for a constant velocity, `y + (u_s - u_t) velocity`; t may be pure noise."""
    size_t, size_s = t.alpha + t.sigma, s.alpha + s.sigma
    return (size_s / size_t) * x + (size_s * (flow_time(s) - flow_time(t))) * velocity


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


def kept_level(
    process: Process,
    t: Level,
    s: Level,
    eta: float,
    variable: Form = "ratio",
) -> Level:
    """The level that holds the kept part of s's noise: an ancestral step solves the ODE down to it, then is `raised`.

    Its ratio is `ancestral_split(t, s, eta).down`. With the variable `flow_time` eta counts in u instead, as on flow
    models in ComfyUI: `u_kept = u_s (1 - eta (1 - u_s / u_t))`. With eta = 0 it is s itself.
    """
    if eta == 0 or s.is_clean:
        return s
    if variable == "ratio":
        return process.levels_at([ancestral_split(t, s, eta).down])[0]
    u_t, u_s = flow_time(t), flow_time(s)
    return flow_level(process, u_s * max(0.0, 1 - eta * (1 - u_s / u_t)))


def as_far_back(process: Process, t: Level, kept: Level, s: Level) -> Level:
    """The level as far behind s in log_snr as t is behind `kept`, to which an ancestral step from t to s goes down.

    There the ancestral multistep methods take the estimate made at t to lie.
    """
    return process.levels_at([s.ratio * t.ratio / kept.ratio])[0]


def raised(x: V, t: Level, s: Level, fresh: V) -> V:
    """Carry a point up from t to the noisier level s with fresh noise: `x^ + sqrt(r_s^2 - r_t^2) fresh`.

    `s.ratio` may exceed `t.ratio` because of churn, a restart, or because t is the kept part of s's noise.
    """
    up = math.sqrt(max(0.0, (s.ratio - t.ratio) * (s.ratio + t.ratio)))
    return (s.alpha / t.alpha) * x + (s.alpha * up) * fresh


def renewed(
    tape: Tape, x: Vector, kept: Level, t: Level, s: Level, s_noise: float = 1.0
) -> Vector:
    """Raise a point from its `kept_level` up to s with the noise of the path from t to s."""
    return raised(x, kept, s, s_noise * tape.noise(t, s)) if kept.ratio < s.ratio else x


def freshened(tape: Tape, x: Vector, t: Level, s: Level, std: float) -> Vector:
    """Add the noise of the path from t to s with a standard deviation; nothing is drawn where that is 0."""
    return x + std * tape.noise(t, s) if std > 0 else x


def brownian_pair(
    tape: Tape, t: Level, m: Level, s: Level, s_noise: float
) -> tuple[Vector, Vector]:
    """The noise from t to m and that from t to s, on a path that is Brownian in `sigma / alpha`."""
    early = s_noise * tape.noise(t, m)
    if m is s:
        return early, early
    share = (t.ratio - m.ratio) / (t.ratio - s.ratio)
    late = s_noise * tape.noise(m, s)
    return early, math.sqrt(share) * early + math.sqrt(1 - share) * late


def stage_noises(tape: Tape, levels: Sequence[Level], eta: float, s_noise: float) -> list[Vector]:
    """What the noise of one path of the reverse SDE, begun at the first level, amounts to at each later one.

    From one level to the next it decays as x does and is freshened, so that stages and step share their noise.

    Source: Gonzalez et al. 2023, arXiv 2305.14267, section 4.
    """
    noise, noises = Vector({}), []
    for t, s in pairwise(levels):
        noise = freshened(tape, decay(t, s, eta) * noise, t, s, s_noise * fresh_std(t, s, eta))
        noises.append(noise)
    return noises


def declare_noise_factor(tape: Tape, eta: float, s_noise: float) -> None:
    """Declare that a factor on the fresh noise changes the noise of the levels on purpose."""
    if eta > 0 and s_noise != 1.0:
        tape.declare_inexact("noise")


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
    where `I_k(-h)`; with eta, `1 + eta` times what follows x. `theta_j` is the place of output j, 0 at t and 1 at s; it
    may be behind (multistep), between (singlestep) or at s (corrector).

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
        length, gain, kept = -h, (1 + eta) * s.sigma, s.alpha / t.alpha
    else:
        length, gain, kept = (1 + eta) * h, s.alpha, decay(t, s, eta)
    exact = exponential_moments(length, len(outputs))
    x = kept * x + (gain * exact[0]) * current.value
    if not others:
        return x
    nodes = [log_snr_step(t, output.level) / h for output in others]
    weights = quadrature_weights(nodes, exact[1:] if moments is None else moments)
    for weight, node, output in zip(weights, nodes, others, strict=True):
        x = x + (gain * weight / node) * (output.value - current.value)
    return x


def look_back(outputs: Sequence[Output[V]], s: Level, order: int) -> list[Output[V]]:
    """The outputs that a multistep method of an order uses for its step to s, newest first.

    Only the newest for a step to clean data; none made at pure noise but the newest, since log_snr is infinite there.

    Args:
        outputs: All outputs so far, oldest first.
        s: The level to step to.
        order: Largest number of outputs to use.
    """
    newest, *older = outputs[::-1]
    if s.is_clean:
        return [newest]
    return [newest, *(output for output in older[: order - 1] if not output.level.is_pure_noise)]


def sde_rule(
    tape: Tape,
    x: Vector,
    outputs: Sequence[Output[Vector]],
    s: Level,
    *,
    eta: float,
    s_noise: float = 1.0,
    noise_form: bool = False,
    moments: Sequence[float] | None = None,
) -> Vector:
    """One step of the reverse SDE: the `exponential_rule` for its drift, then its noise times a factor."""
    t = outputs[0].level
    x = exponential_rule(x, outputs, s, eta=eta, noise_form=noise_form, moments=moments)
    return freshened(tape, x, t, s, s_noise * fresh_std(t, s, eta, noise_form=noise_form))


def dpm_moments(
    length: float, count: int, solver_type: Literal["midpoint", "heun"], corrected: bool
) -> list[float]:
    """Moments for `exponential_rule` with which the DPM-Solver multistep methods are published.

    One earlier output: `I_0 / 2` (midpoint), or the exact `I_1` (heun). Two: `I_1, I_2 / 2` where exactness asks for
    `I_1, I_2`, so that the published third order is in truth the second; `corrected` takes the exact ones.

    Args:
        length: `(1 + eta) h` in data form, `-h` in noise form.
        count: Number of earlier outputs.
        solver_type: Of the second-order step.
        corrected: Whether the third-order step is exact.

    Source: Lu et al. 2022, arXiv 2211.01095, and its implementations.
    """
    exact = exponential_moments(length, count + 1)
    if count == 1 and solver_type == "midpoint":
        return [exact[0] / 2]
    if count == 2 and not corrected:
        return [exact[1], exact[2] / 2]
    return exact[1:]


def adams_rule(x: V, noises: Sequence[Output[V]], s: Level) -> V:
    """`x^ + (r_s - r_t) sum_j c_j noise_j`, exact for noise estimates that are polynomial in `r = sigma / alpha`.

    The first output is the one at t; with all of them behind it this is the Adams-Bashforth method with steps of any
    size. t must not be pure noise.

    Source: Hairer, Norsett, Wanner 1993, Solving Ordinary Differential Equations I, section III.5.
    """
    t = noises[0].level
    nodes = [(output.level.ratio - t.ratio) / (s.ratio - t.ratio) for output in noises]
    return noise_step(x, weighted(adams_weights(nodes), [o.value for o in noises]), t, s)


def adams_weights(nodes: Sequence[float]) -> list[float]:
    """Weights w with `sum_j w_j f(nodes_j) = int_0^1 f`, exact for polynomials; nodes 0, -1, -2... are equal steps.

    >>> [round(w, 9) for w in adams_weights([0, -1])]
    [1.5, -0.5]
    """
    return quadrature_weights(nodes, [1 / (k + 1) for k in range(len(nodes))])


GAUSS = np.polynomial.legendre.leggauss(16)
"""Nodes in -1..1 and weights of Gauss and Legendre's rule."""


def integral(function: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """`int_low^high function`, by 16 Gauss points on panels of length 1/4 at most; for smooth functions of log_snr.

    >>> round(integral(np.cos, 0.0, math.pi / 2), 12)
    1.0
    """
    panels = max(1, math.ceil(4 * (high - low)))
    nodes, weights = GAUSS
    edges = np.linspace(low, high, panels + 1)
    half = np.diff(edges)[:, None] / 2
    return float((half * weights * function(edges[:-1, None] + half * (1 + nodes))).sum())


def weighted(weights: Sequence[float], values: Sequence[V]) -> V:
    """`sum_j w_j value_j`."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total
