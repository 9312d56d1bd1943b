"""What a network predicts, and how that gives the estimate of x_0.

Each kind is one pair (skip, out) with `D = skip x + out F` on the level `x = alpha x_0 + sigma noise`, F the network's
output. Everything else follows from the pair: the training target is the F for which D is x_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewstep.errors import InvalidInputError, unknown_name
from fewstep.process import Level

SkipOut = Callable[[Any, Any], tuple[Any, Any]]

SIGMA_DATA = 0.5
"""Standard deviation of the data that EDM networks are preconditioned for."""


def _edm(alpha: Any, sigma: Any) -> tuple[Any, Any]:
    total = (SIGMA_DATA * alpha) ** 2 + sigma**2
    return SIGMA_DATA**2 * alpha / total, sigma * SIGMA_DATA / total**0.5


SKIP_OUT: dict[str, SkipOut] = {
    "noise": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "data": lambda alpha, sigma: (0.0 * alpha, 1.0 + 0.0 * sigma),
    "velocity": lambda alpha, sigma: (
        alpha / (alpha**2 + sigma**2),
        -sigma / (alpha**2 + sigma**2),
    ),
    "flow": lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    "score": lambda alpha, sigma: (1 / alpha, sigma**2 / alpha),
    "edm": _edm,
}
"""The pair (skip, out) of each kind: noise `eps`; data `x_0`; velocity `alpha eps - sigma x_0` (Salimans, Ho 2022,
arXiv 2202.00512); flow `eps - x_0` (Liu et al. 2022, arXiv 2209.03003); score `-eps / sigma` (Song et al. 2021,
arXiv 2011.13456); edm, the preconditioned network of Karras et al. 2022, arXiv 2206.00364, table 1."""


@dataclass(frozen=True)
class Parameterisation:
    """The kind of a network's prediction, as numbers at a level.

    >>> Parameterisation("noise").skip_out(Level(0.0, 0.8, 0.6))
    (1.25, -0.7499999999999999)
    """

    predicts: str

    def __post_init__(self) -> None:
        if self.predicts not in SKIP_OUT:
            raise unknown_name(
                "prediction", self.predicts, SKIP_OUT, "It says what the network's output means"
            )

    def skip_out(self, level: Level) -> tuple[float, float]:
        """The numbers of `D = skip x + out F`.

        Raises:
            InvalidInputError: If the output does not determine x_0 at this level.
        """
        if level.is_pure_noise and self.predicts in ("noise", "score"):
            raise InvalidInputError(
                f"a network that predicts {self.predicts} says nothing about the data at level {level}; "
                "start from a level with alpha > 0, or use a network that predicts velocity, flow or data"
            )
        return SKIP_OUT[self.predicts](level.alpha, level.sigma)

    def input_scale(self, level: Level) -> float:
        """What x is multiplied with before the network sees it."""
        if self.predicts != "edm":
            return 1.0
        return 1.0 / math.hypot(SIGMA_DATA * level.alpha, level.sigma)

    def time(self, level: Level) -> float:
        """What the network is told as time."""
        return math.log(level.ratio) / 4 if self.predicts == "edm" else level.t


def training_target(
    predicts: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """The output that a perfect network would give: the F with `skip x + out F = x_0`.

    Args:
        predicts: Kind of prediction.
        x0: Data, shape (B, ...).
        noise: Standard normal, the shape of x0.
        alpha: Weights of the data in float64, shape broadcastable to x0.
        sigma: Weights of the noise, likewise.

    Returns:
        The target, in x0's shape and type.
    """
    Parameterisation(predicts)
    skip, out = SKIP_OUT[predicts](alpha, sigma)
    on_x0, on_noise = (1 - skip * alpha) / out, -skip * sigma / out
    return on_x0.to(x0) * x0 + on_noise.to(x0) * noise
