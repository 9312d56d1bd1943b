"""The three curves (alpha, sigma) can move on; `ratio = sigma / alpha` tells where on the curve."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, hypot, ones_like

from fewstep.errors import InvalidInputError


class Path(ABC):
    """Maps `ratio` in [0, inf] to alpha and sigma, and back."""

    @abstractmethod
    def alpha_of(self, ratio: Tensor) -> Tensor:
        """Weight of the data at a ratio."""

    @abstractmethod
    def sigma_of(self, ratio: Tensor) -> Tensor:
        """Weight of the noise at a ratio."""

    @abstractmethod
    def ratio_of_alpha(self, alpha: Tensor) -> Tensor:
        """Inverse of `alpha_of`."""

    @abstractmethod
    def ratio_of_sigma(self, sigma: Tensor) -> Tensor:
        """Inverse of `sigma_of`."""


class VariancePreserving(Path):
    """`alpha^2 + sigma^2 = 1`."""

    def alpha_of(self, ratio: Tensor) -> Tensor:
        return 1 / hypot(ones_like(ratio), ratio)

    def sigma_of(self, ratio: Tensor) -> Tensor:
        return 1 / hypot(ones_like(ratio), 1 / ratio)

    def ratio_of_alpha(self, alpha: Tensor) -> Tensor:
        return ((1 - alpha) * (1 + alpha)).sqrt() / alpha

    def ratio_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma / ((1 - sigma) * (1 + sigma)).sqrt()


class VarianceExploding(Path):
    """`alpha = 1`."""

    def alpha_of(self, ratio: Tensor) -> Tensor:
        return ones_like(ratio)

    def sigma_of(self, ratio: Tensor) -> Tensor:
        return ratio

    def ratio_of_alpha(self, alpha: Tensor) -> Tensor:
        raise InvalidInputError(
            "alpha is 1 at every time of a variance-exploding process; give sigma or ratio instead"
        )

    def ratio_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


class Rectified(Path):
    """`alpha + sigma = 1`."""

    def alpha_of(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + ratio)

    def sigma_of(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)

    def ratio_of_alpha(self, alpha: Tensor) -> Tensor:
        return (1 - alpha) / alpha

    def ratio_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma / (1 - sigma)
