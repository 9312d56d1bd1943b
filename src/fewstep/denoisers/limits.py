"""Keeping the estimate of x_0 inside the range of images."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from fewstep.denoisers.base import BaseDenoiser, Wrapper
from fewstep.errors import InvalidInputError
from fewstep.process import Level


class Limit(Wrapper):
    """What the limits on an estimate share."""

    @abstractmethod
    def limited(self, denoised: Tensor) -> Tensor:
        """The estimate inside the limits."""

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """The limited estimate, in x's shape."""
        return self.limited(self.inner(x, level))

    def many(self, x: Tensor, levels: Sequence[Level]) -> Tensor:
        """The limited estimates."""
        return self._limited_rows(self.inner.many(x, levels))

    def guided_pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Both estimates, limited."""
        guided, weak = self.inner.guided_pair(x, level)
        return self.limited(guided), self.limited(weak)

    def variance_pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
        """The limited estimate, and the variance as it is."""
        denoised, share = self.inner.variance_pair(x, level)
        return self.limited(denoised), share

    def guided_pairs(self, x: Tensor, levels: Sequence[Level]) -> tuple[Tensor, Tensor]:
        """Both estimates at several levels, limited."""
        guided, weak = self.inner.guided_pairs(x, levels)
        return self._limited_rows(guided), self._limited_rows(weak)

    def _limited_rows(self, denoised: Tensor) -> Tensor:
        return self.limited(denoised.flatten(0, 1)).reshape(denoised.shape)


class Clipped(Limit):
    """Clip the estimate of x_0 to a range: `min(max(D, low), high)`.

    Args:
        denoiser: The denoiser.
        low: Smallest value.
        high: Largest value, > low.

    Raises:
        InvalidInputError: If the range is empty.

    Source: Ho, Jain, Abbeel 2020, arXiv 2006.11239 (their sampling code).
    """

    def __init__(self, denoiser: BaseDenoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(denoiser)
        if not low < high:
            raise InvalidInputError(
                f"clipping range {low}..{high} is empty; low must be below high"
            )
        self.low, self.high = low, high

    def limited(self, denoised: Tensor) -> Tensor:
        """The clipped estimate."""
        return denoised.clamp(self.low, self.high)


class DynamicThreshold(Limit):
    """Clip each image at its own quantile of `|D|` and scale it back to [-1, 1], where that quantile exceeds 1.

    With `s = min(max(quantile, 1), ceiling)`: `min(max(D, -s), s) / s`.

    Args:
        denoiser: The denoiser.
        quantile: Share of pixels that stay unclipped, in (0, 1].
        ceiling: Largest threshold s, >= 1; at 1 this is `Clipped`.

    Raises:
        InvalidInputError: If a number is out of range.

    Source: Saharia et al. 2022, arXiv 2205.11487, section 2.3.
    """

    def __init__(
        self, denoiser: BaseDenoiser, quantile: float = 0.995, ceiling: float = math.inf
    ) -> None:
        super().__init__(denoiser)
        if not 0 < quantile <= 1:
            raise InvalidInputError(f"quantile={quantile} must be in (0, 1]; 0.995 is usual")
        if not ceiling >= 1:
            raise InvalidInputError(f"ceiling={ceiling} must be at least 1")
        self.quantile, self.ceiling = quantile, ceiling

    def limited(self, denoised: Tensor) -> Tensor:
        """The thresholded estimate, inside [-1, 1]."""
        rows = denoised.reshape(len(denoised), -1)
        limit = rows.abs().quantile(self.quantile, dim=1).clamp(1.0, self.ceiling)
        limit = limit.view(-1, *(1,) * (denoised.ndim - 1))
        return denoised.clamp(-limit, limit) / limit
