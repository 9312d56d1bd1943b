"""Processes in continuous time: variance preserving, variance exploding, EDM, flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.errors import InvalidInputError
from fewstep.process.base import Process
from fewstep.process.path import Rectified, VarianceExploding, VariancePreserving


def _check_range(name: str, low_name: str, low: float, high_name: str, high: float) -> None:
    if not (0 < low < high < math.inf):
        raise InvalidInputError(
            f"{name}: need 0 < {low_name} < {high_name}, got {low:g} and {high:g}"
        )


class ContinuousVP(Process):
    """`log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2`, t in (0, 1]; see `vp_continuous`."""

    path = VariancePreserving()
    name = "vp_continuous"
    clean_time, t_max = 0.0, 1.0

    def __init__(self, beta_min: float, beta_max: float, t_min: float) -> None:
        _check_range(self.name, "beta_min", beta_min, "beta_max", beta_max)
        _check_range(self.name, "t_min", t_min, "1", 1.0)
        self.options = {"beta_min": beta_min, "beta_max": beta_max, "t_min": t_min}
        self.t_min, self._start, self._rise = t_min, beta_min, beta_max - beta_min

    def _log_snr(self, t: Tensor) -> Tensor:
        log_alpha_bar = -t * (t * self._rise / 2 + self._start)
        return (log_alpha_bar - (-torch.expm1(log_alpha_bar)).log()) / 2

    def _time(self, log_snr: Tensor) -> Tensor:
        at_end = self._rise / 2 + self._start
        decay = softplus(-2 * log_snr, threshold=700.0).clamp(max=at_end)
        return 2 * decay / ((self._start**2 + 2 * self._rise * decay).sqrt() + self._start)


class VE(Process):
    """`sigma = sigma_min (sigma_max / sigma_min)^t`, t in [0, 1]; see `ve`."""

    path = VarianceExploding()
    name = "ve"
    clean_time, t_min, t_max = -math.inf, 0.0, 1.0

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        _check_range(self.name, "sigma_min", sigma_min, "sigma_max", sigma_max)
        self.options = {"sigma_min": sigma_min, "sigma_max": sigma_max}
        self._low, self._range = math.log(sigma_min), math.log(sigma_max / sigma_min)

    def _log_snr(self, t: Tensor) -> Tensor:
        return -(self._low + self._range * t)

    def _time(self, log_snr: Tensor) -> Tensor:
        return (-log_snr - self._low) / self._range


class EDM(Process):
    """`sigma = t`, alpha = 1; see `edm`."""

    path = VarianceExploding()
    name = "edm"
    clean_time = 0.0

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        _check_range(self.name, "sigma_min", sigma_min, "sigma_max", sigma_max)
        self.options = {"sigma_min": sigma_min, "sigma_max": sigma_max}
        self.t_min, self.t_max = sigma_min, sigma_max

    def table_time(self, index: float) -> float:
        return self.t_min * (self.t_max / self.t_min) ** (index / (self.training_steps - 1))

    def table_index(self, t: Tensor) -> Tensor:
        return (
            (t / self.t_min).log() / math.log(self.t_max / self.t_min) * (self.training_steps - 1)
        )

    def _log_snr(self, t: Tensor) -> Tensor:
        return -t.log()

    def _ratio(self, t: Tensor) -> Tensor:
        return t

    def _time(self, log_snr: Tensor) -> Tensor:
        return (-log_snr).exp()


class Flow(Process):
    """`alpha = 1 - t`, `sigma = t`, t in [0, 1]; see `flow`."""

    path = Rectified()
    name = "flow"
    clean_time, t_max = 0.0, 1.0

    def __init__(self, t_min: float) -> None:
        _check_range(self.name, "t_min", t_min, "1", 1.0)
        self.options = {"t_min": t_min}
        self.t_min = t_min

    def _log_snr(self, t: Tensor) -> Tensor:
        return torch.log1p(-t) - t.log()

    def _ratio(self, t: Tensor) -> Tensor:
        return t / (1 - t)

    def _time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr)


def vp_continuous(
    beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3
) -> ContinuousVP:
    """Variance-preserving process with `beta(t)` linear in t, t in (0, 1].

    Source: Song et al. 2021, arXiv 2011.13456, appendix C.

    >>> round(vp_continuous().ratio(1.0), 1)
    152.2
    """
    return ContinuousVP(beta_min, beta_max, t_min)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> VE:
    """Variance-exploding process, sigma geometric in t in [0, 1].

    Source: Song et al. 2021, arXiv 2011.13456, appendix C.
    """
    return VE(sigma_min, sigma_max)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDM:
    """EDM's process: the time is sigma itself.

    Source: Karras et al. 2022, arXiv 2206.00364.
    """
    return EDM(sigma_min, sigma_max)


def flow(t_min: float = 1e-3) -> Flow:
    """Rectified flow: a straight line from data (t = 0) to noise (t = 1).

    Source: Liu, Gong, Liu 2022, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747.
    """
    return Flow(t_min)
