"""One noise level, and what happens between two of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from fewstep.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class Level:
    """One noise level of the forward path `x_t = alpha x_0 + sigma noise`.

    Attributes:
        t: Time in the network's own unit (0..999 for a table of 1000 steps, 0..1 for flow, sigma for EDM).
        alpha: Weight of the data, >= 0.
        sigma: Weight of the noise, >= 0; 0 means clean.

    >>> Level(t=0.5, alpha=0.5, sigma=0.5).ratio
    1.0
    """

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """`sigma / alpha`, in [0, inf]: what k-diffusion and ComfyUI call sigma."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_snr(self) -> float:
        """`log(alpha / sigma)`, in [-inf, inf]: DPM-Solver's lambda."""
        if self.is_clean:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha else -math.inf

    @property
    def is_clean(self) -> bool:
        """Whether no noise is left (`sigma = 0`)."""
        return self.sigma == 0.0

    @property
    def is_pure_noise(self) -> bool:
        """Whether no signal is left (`alpha = 0`)."""
        return self.alpha == 0.0

    def __str__(self) -> str:
        return f"t={self.t:.6g} (alpha={self.alpha:.6g}, sigma={self.sigma:.6g})"


def log_snr_step(t: Level, s: Level) -> float:
    """Length of the step from t to s, `h = log_snr(s) - log_snr(t)`; infinite at either end of the path."""
    return s.log_snr - t.log_snr


def _falling_step(t: Level, s: Level) -> float:
    """`log_snr_step`, for s that must be less noisy than t."""
    if not s.ratio < t.ratio:
        raise InvalidInputError(
            f"the level {s} is not less noisy than {t}; of the two, give the noisier one as t"
        )
    return log_snr_step(t, s)


class Kernel(NamedTuple):
    """The Gaussian `N(scale x, std^2)`."""

    scale: float
    std: float


def forward_kernel(s: Level, t: Level) -> Kernel:
    """`q(x_t | x_s) = N(a x_s, sigma_t^2 - a^2 sigma_s^2)` with `a = alpha_t / alpha_s`, for s less noisy than t.

    Raises:
        InvalidInputError: If s is not less noisy than t.

    Source: Kingma et al. 2021, arXiv 2107.00630, appendix A.

    >>> forward_kernel(Level(0, 1.0, 0.0), Level(1, 0.8, 0.6))
    Kernel(scale=0.8, std=0.6)
    """
    fresh = -math.expm1(-2 * _falling_step(t, s))
    return Kernel(t.alpha / s.alpha, t.sigma * math.sqrt(fresh))


class Posterior(NamedTuple):
    """The Gaussian `N(on_x x_t + on_x0 x_0, std^2)`."""

    on_x: float
    on_x0: float
    std: float


def posterior(t: Level, s: Level) -> Posterior:
    """`q(x_s | x_t, x_0)` for s less noisy than t.

    With `h` the step in log_snr: mean `e^-h (sigma_s / sigma_t) x_t + alpha_s (1 - e^-2h) x_0`,
    standard deviation `sigma_s sqrt(1 - e^-2h)`. On neighbouring levels of a variance-preserving table these are
    the posterior mean and variance (beta tilde) of DDPM.

    Raises:
        InvalidInputError: If s is not less noisy than t.

    Source: Ho, Jain, Abbeel 2020, arXiv 2006.11239, equations 6 and 7.

    >>> posterior(Level(1, 0.8, 0.6), Level(0, 1.0, 0.0))
    Posterior(on_x=0.0, on_x0=1.0, std=0.0)
    """
    h = _falling_step(t, s)
    fresh = -math.expm1(-2 * h)
    return Posterior(math.exp(-h) * s.sigma / t.sigma, s.alpha * fresh, s.sigma * math.sqrt(fresh))
