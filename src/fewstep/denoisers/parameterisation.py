"""What a network predicts, and how that gives the estimate of x_0.

Each kind is one pair (a, b): a perfect network's output is `F = a x_0 + b noise` on the level
`x = alpha x_0 + sigma noise`. Solving the two equations for x_0 gives the estimate `D = skip x + out F` with
`skip = b / d`, `out = -sigma / d`, `d = alpha b - sigma a`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewstep.errors import InvalidInputError, unknown_name
from fewstep.process import Level

Number = TypeVar("Number", float, Tensor)

SIGMA_DATA = 0.5
"""Standard deviation of the data that EDM networks are preconditioned for."""


def _edm(alpha: Any, sigma: Any) -> tuple[Any, Any]:
    norm = ((SIGMA_DATA * alpha) ** 2 + sigma**2) ** 0.5
    return sigma / (SIGMA_DATA * norm), -SIGMA_DATA * alpha / norm


TARGETS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "noise": lambda alpha, sigma: (0.0, 1.0),
    "data": lambda alpha, sigma: (1.0, 0.0),
    "velocity": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (-1.0, 1.0),
    "score": lambda alpha, sigma: (0.0, -1 / sigma),
    "edm": _edm,
}
"""The pair (a, b) of each kind: noise `eps`; data `x_0`; velocity `alpha eps - sigma x_0` (Salimans, Ho 2022,
arXiv 2202.00512); flow `eps - x_0` (Liu et al. 2022, arXiv 2209.03003); score `-eps / sigma` (Song et al. 2021,
arXiv 2011.13456); edm, `(x_0 - c_skip x) / c_out` of Karras et al. 2022, arXiv 2206.00364, table 1, on `x / alpha`."""

SILENT_AT_PURE_NOISE = ("noise", "score", "edm")
"""Kinds that cannot be asked where alpha = 0: the output does not determine x_0, or the network's time is infinite."""


@dataclass(frozen=True)
class Parameterisation:
    """The kind of a network's prediction, as numbers at a level.

    Args:
        predicts: "noise", "data", "velocity", "flow", "score" or "edm"; `TARGETS` says what each means.

    Raises:
        UnknownNameError: If there is no such prediction.

    >>> Parameterisation("noise").skip_out(Level(0.0, 0.8, 0.6))
    (1.25, -0.7499999999999999)
    """

    predicts: str

    def __post_init__(self) -> None:
        if self.predicts not in TARGETS:
            raise unknown_name(
                "prediction", self.predicts, TARGETS, "It says what the network's output means"
            )

    def skip_out(self, level: Level) -> tuple[float, float]:
        """The numbers of `D = skip x + out F`.

        Raises:
            InvalidInputError: If the output does not determine x_0 at this level.
        """
        if level.is_clean:
            raise InvalidInputError(
                f"level {level} is clean: x is alpha x_0 there and needs no network; "
                "ask at a level with sigma > 0"
            )
        if level.is_pure_noise and self.predicts in SILENT_AT_PURE_NOISE:
            raise InvalidInputError(
                f"a network that predicts {self.predicts} says nothing about the data at level {level}; "
                "start from a level with alpha > 0, or use a network that predicts velocity, flow or data"
            )
        return self.estimate_of(level.alpha, level.sigma)

    def input_scale(self, level: Level) -> float:
        """What x is multiplied with before the network sees it."""
        return self.input_of(level.t, level.alpha, level.sigma)[0]

    def time(self, level: Level) -> float:
        """What the network is told as time."""
        return self.input_of(level.t, level.alpha, level.sigma)[1]

    def estimate_of(self, alpha: Number, sigma: Number) -> tuple[Number, Number]:
        """The numbers (skip, out) of `D = skip x + out F`, for one level or a float64 tensor of many."""
        a, b = TARGETS[self.predicts](alpha, sigma)
        determinant = alpha * b - sigma * a
        return b / determinant, -sigma / determinant

    def input_of(self, t: Number, alpha: Number, sigma: Number) -> tuple[Any, Any]:
        """What x is multiplied with before the network sees it, and what the network is told as time.

        For edm `1 / sqrt((SIGMA_DATA alpha)^2 + sigma^2)` and `ln(sigma / alpha) / 4`, else 1 and t.
        """
        if self.predicts != "edm":
            return 1.0, t
        ratio = sigma / alpha
        log_ratio = ratio.log() if isinstance(ratio, Tensor) else math.log(ratio)
        return ((SIGMA_DATA * alpha) ** 2 + sigma**2) ** -0.5, log_ratio / 4


def variance_share(output: Tensor) -> Tensor:
    """Return `(v + 1) / 2`: a network says by a number in -1..1 where between two variances its own lies.

    Source: Nichol, Dhariwal 2021, arXiv:2102.09672, equation 15.
    """
    return (output + 1) / 2


def training_target(
    predicts: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """The output of a perfect network, `a x_0 + b noise`: the F with `skip x + out F = x_0`.

    Args:
        predicts: Kind of prediction, see `TARGETS`.
        x0: Data, shape (B, ...).
        noise: Standard normal, the shape of x0.
        alpha: Weights of the data in float64, shape broadcastable to x0.
        sigma: Weights of the noise, > 0, likewise.

    Returns:
        The target, in x0's shape and type.

    Raises:
        UnknownNameError: If there is no such prediction.

    >>> one, alpha, sigma = torch.ones(1), torch.tensor([0.8]), torch.tensor([0.6])
    >>> training_target("velocity", 3 * one, 2 * one, alpha, sigma)
    tensor([-0.2000])
    """
    a, b = TARGETS[Parameterisation(predicts).predicts](alpha, sigma)
    return torch.as_tensor(a).to(x0) * x0 + torch.as_tensor(b).to(x0) * noise
