"""Variance-preserving processes given by a table of betas, as in DDPM."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InvalidInputError
from fewstep.process.base import Process
from fewstep.process.path import VariancePreserving


class DiscreteVP(Process):
    """Variance-preserving process on a table, `alpha_t^2 = prod_{i<=t} (1 - beta_i)`, t = 0..T-1.

    Between the entries log_snr is linear in t. The time -1 stands for clean data.

    Args:
        betas: Noise variances, each in (0, 1), the last may be 1; shape (T,), T >= 2.
        name: Name for `to_dict`.
        options: Options for `to_dict`.
        zero_terminal_snr: Shift and scale alpha so that the last entry is pure noise (Lin et al. 2023,
            arXiv 2305.08891, algorithm 1). Between the last two entries alpha / sigma then falls linearly to 0.

    Source: Ho, Jain, Abbeel 2020, arXiv 2006.11239.
    """

    path = VariancePreserving()
    clean_time = -1.0
    t_min = 0.0

    def __init__(
        self,
        betas: Sequence[float] | np.ndarray,
        name: str,
        options: dict[str, Any],
        zero_terminal_snr: bool = False,
    ) -> None:
        table = _checked_betas(betas, name)
        with np.errstate(divide="ignore"):
            log_alpha_bar = np.cumsum(np.log1p(-table))
            if zero_terminal_snr:
                alpha = np.exp(log_alpha_bar / 2)
                alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
                log_alpha_bar = 2 * np.log(alpha)
            log_snr = (log_alpha_bar - np.log(-np.expm1(log_alpha_bar))) / 2
        self.name, self.options = name, options
        self.training_steps = len(table)
        self.t_max = float(len(table) - 1)
        self._table = torch.from_numpy(log_snr)

    @property
    def betas(self) -> np.ndarray:
        """`beta_t = 1 - alpha_t^2 / alpha_{t-1}^2`, shape (T,)."""
        alpha = np.array(
            [
                level.alpha
                for level in self.levels([float(t) for t in range(-1, self.training_steps)])
            ]
        )
        return 1 - (alpha[1:] / alpha[:-1]) ** 2

    def table_time(self, index: float) -> float:
        return float(index)

    def _log_snr(self, t: Tensor) -> Tensor:
        table = self._table.to(t.device)
        left = t.clamp(min=0).floor().clamp(max=self.training_steps - 2)
        low, high, weight = table[left.long()], table[left.long() + 1], t - left
        straight = torch.lerp(low, high, weight)
        to_pure_noise = low + torch.log1p(-weight.clamp(max=1))
        between = torch.where(high == -math.inf, to_pure_noise, straight)
        return torch.where(t == self.clean_time, math.inf, between)

    def _covers(self, t: Tensor) -> Tensor:
        return (t == self.clean_time) | ((t >= self.t_min) & (t <= self.t_max))

    def _time(self, log_snr: Tensor) -> Tensor:
        table = self._table.numpy()
        finite = table[np.isfinite(table)]
        value = log_snr.detach().cpu().numpy()
        t = np.interp(-value, -finite, np.arange(len(finite)))
        if len(finite) < len(table):
            t = np.where(
                value < finite[-1], len(finite) - np.exp(np.minimum(value - finite[-1], 0)), t
            )
        return torch.as_tensor(t, dtype=torch.float64, device=log_snr.device)

    def _before(self, t: float, s: float | None) -> float:
        return math.ceil(t) - 1.0 if s is None else s


def _checked_betas(betas: Sequence[float] | np.ndarray | Tensor, name: str) -> np.ndarray:
    """The table in float64.

    Raises:
        InvalidInputError: If it is no list of at least two numbers in (0, 1), the last in (0, 1].
    """
    legal = "betas must be a list of at least two numbers in (0, 1), and only the last may be 1"
    try:
        table = np.asarray(betas, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"{name}: {legal}; got {betas!r:.80}") from error
    if table.ndim != 1 or len(table) < 2:
        raise InvalidInputError(f"{name}: {legal}; got shape {table.shape}")
    fine = (table > 0) & (table < 1)
    fine[-1] |= table[-1] == 1
    if not fine.all():
        at = int(np.argmin(fine))
        raise InvalidInputError(f"{name}: {legal}; beta {at} is {table[at]:g}")
    return table


def _named(
    name: str, betas: Callable[[], np.ndarray], steps: int, zero_terminal_snr: bool, **options: Any
) -> DiscreteVP:
    if not isinstance(steps, int) or steps < 2:
        raise InvalidInputError(f"{name}: steps must be a whole number >= 2, got {steps!r}")
    options = {"steps": steps, **options, "zero_terminal_snr": zero_terminal_snr}
    with np.errstate(all="ignore"):  # what comes of senseless options is refused as a table
        table = betas()
    return DiscreteVP(table, name, options, zero_terminal_snr)


def vp_linear(
    steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_terminal_snr: bool = False,
) -> DiscreteVP:
    """DDPM's process: betas linear from `beta_start` to `beta_end`.

    Source: Ho, Jain, Abbeel 2020, arXiv 2006.11239.

    >>> round(vp_linear().ratio(999.0), 3)
    157.407
    """
    return _named(
        "vp_linear",
        lambda: np.linspace(beta_start, beta_end, steps),
        steps,
        zero_terminal_snr,
        beta_start=beta_start,
        beta_end=beta_end,
    )


def vp_scaled_linear(
    steps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> DiscreteVP:
    """Stable Diffusion's process: square roots of the betas are linear.

    Source: Rombach et al. 2022, arXiv 2112.10752.

    >>> round(vp_scaled_linear().ratio(999.0), 4)
    14.6146
    """
    return _named(
        "vp_scaled_linear",
        lambda: np.linspace(np.sqrt(beta_start), np.sqrt(beta_end), steps) ** 2,
        steps,
        zero_terminal_snr,
        beta_start=beta_start,
        beta_end=beta_end,
    )


def vp_cosine(
    steps: int = 1000,
    offset: float = 0.008,
    max_beta: float = 0.999,
    zero_terminal_snr: bool = False,
) -> DiscreteVP:
    """Improved DDPM's process: `alpha^2 = cos^2(pi/2 (u + offset) / (1 + offset))`, betas capped at `max_beta`.

    Source: Nichol, Dhariwal 2021, arXiv 2102.09672.
    """

    def betas() -> np.ndarray:
        u = np.arange(steps + 1) / steps
        alpha_bar = np.cos(np.pi / 2 * (u + offset) / (1 + offset)) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)

    return _named("vp_cosine", betas, steps, zero_terminal_snr, offset=offset, max_beta=max_beta)


def vp_sigmoid(
    steps: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    zero_terminal_snr: bool = False,
) -> DiscreteVP:
    """Process whose `alpha^2` falls as a sigmoid from `start` to `end` with temperature `tau`, betas capped at 0.999.

    Source: Jabri, Fleet, Chen 2022, arXiv 2212.11972; Chen 2023, arXiv 2301.10972.
    """

    def betas() -> np.ndarray:
        u = np.arange(steps + 1) / steps
        curve = 1 / (1 + np.exp(-(u * (end - start) + start) / tau))
        alpha_bar = np.maximum((curve[-1] - curve) / (curve[-1] - curve[0]), 1e-9)
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)

    return _named("vp_sigmoid", betas, steps, zero_terminal_snr, start=start, end=end, tau=tau)


def vp_sigmoid_beta(
    steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_terminal_snr: bool = False,
) -> DiscreteVP:
    """Process whose betas rise as a sigmoid on [-6, 6]; what diffusers calls "sigmoid".

    Source: Xu et al. 2022 (GeoDiff), arXiv 2203.02923.
    """
    return _named(
        "vp_sigmoid_beta",
        lambda: beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, steps))),
        steps,
        zero_terminal_snr,
        beta_start=beta_start,
        beta_end=beta_end,
    )


def vp_from_betas(
    betas: Sequence[float] | np.ndarray | Tensor, zero_terminal_snr: bool = False
) -> DiscreteVP:
    """Process on any table of betas.

    >>> vp_from_betas([0.1, 0.2, 0.3]).training_steps
    3
    """
    listed = _checked_betas(betas, "vp_from_betas").tolist()
    return DiscreteVP(
        listed,
        "vp_from_betas",
        {"betas": listed, "zero_terminal_snr": zero_terminal_snr},
        zero_terminal_snr,
    )
