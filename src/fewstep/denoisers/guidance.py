"""Guidance: pushing the estimate away from a weaker one, `D = D_weak + scale (D_strong - D_weak)`. Scale 1 is off."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fewstep.denoisers.denoiser import Denoiser, Wrapper
from fewstep.errors import InvalidInputError
from fewstep.process import Level

Interval = tuple[float, float]


@dataclass(frozen=True)
class Projection:
    """Adaptive projected guidance: soften the part of the push that only saturates.

    The push `D_strong - D_weak` gets a momentum over the calls, is shortened to at most `limit`, and its part parallel
    to D_strong is scaled by `parallel`.

    Source: Sadat, Hilliges, Weber 2024, arXiv 2410.02416.

    Attributes:
        parallel: Factor on the parallel part; 1 leaves the push as it is.
        limit: Largest Euclidean length of the push for each image; inf for none.
        momentum: Weight of the earlier pushes; negative values damp them.
    """

    parallel: float = 0.0
    limit: float = math.inf
    momentum: float = 0.0


class Guided(Wrapper):
    """What all kinds of guidance share: when it acts, and what happens to the push.

    Args:
        strong: The denoiser that is pushed.
        scale: Strength; 1 is off.
        interval: Range (low, high] of `sigma / alpha` in which guidance acts; outside it costs nothing
            (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        rescale: Share in 0..1 by which the estimate's standard deviation is brought back to the strong one's
            (Lin et al. 2023, arXiv 2305.08891, section 3.4).
        projection: Adaptive projected guidance.

    Raises:
        InvalidInputError: If a number is out of range.
    """

    def __init__(
        self,
        strong: Denoiser,
        scale: float,
        interval: Interval | None = None,
        rescale: float = 0.0,
        projection: Projection | None = None,
    ) -> None:
        super().__init__(strong)
        if not math.isfinite(scale):
            raise InvalidInputError(
                f"guidance scale={scale} must be a finite number; 1 is off, 1.5 to 7.5 is usual"
            )
        if not 0 <= rescale <= 1:
            raise InvalidInputError(f"guidance rescale={rescale} must be in 0..1")
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise InvalidInputError(
                f"guidance interval={interval} must be (low, high) in sigma/alpha with 0 <= low < high"
            )
        self.scale, self.interval, self.rescale, self.projection = (
            scale,
            interval,
            rescale,
            projection,
        )
        self.passes = 1 if scale == 1 else 2
        self._push: Tensor | None = None

    @abstractmethod
    def pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The strong and the weak estimate."""

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """The guided estimate, in x's shape."""
        if self.scale == 1 or not self._acts(level):
            return self.inner(x, level)
        strong, weak = self.pair(x, level)
        push = strong - weak
        if self.projection is not None:
            push = self._projected(push, strong, self.projection)
        guided = strong + (self.scale - 1) * push
        return _with_std_of(strong, guided, self.rescale) if self.rescale else guided

    def for_run(self) -> Self:
        """A copy that remembers the pushes of one run alone, where there is momentum."""
        new = super().for_run()
        if self.projection is None or not self.projection.momentum:
            return new
        new = copy.copy(new)
        new._push = None
        return new

    def _acts(self, level: Level) -> bool:
        return self.interval is None or self.interval[0] < level.ratio <= self.interval[1]

    def _projected(self, push: Tensor, strong: Tensor, projection: Projection) -> Tensor:
        if projection.momentum:
            push = push if self._push is None else push + projection.momentum * self._push
            self._push = push
        each = tuple(range(1, push.ndim))
        if math.isfinite(projection.limit):
            length = push.square().sum(each, keepdim=True).sqrt()
            push = push * (projection.limit / length.clamp(min=1e-12)).clamp(max=1)
        along = (push * strong).sum(each, keepdim=True) / strong.square().sum(
            each, keepdim=True
        ).clamp(min=1e-12)
        parallel = along * strong
        return push - parallel + projection.parallel * parallel


class ClassifierFree(Guided):
    """Classifier-free guidance: the weak estimate is the same network's without the condition, in one batched call.

    Args:
        denoiser: A denoiser with its conditions bound.
        scale: Strength; 1 is off, and then there is no second pass.
        null: The conditions that mean "none", by name; each replaces the denoiser's condition of that name.
        options: `interval`, `rescale`, `projection` as for `Guided`.

    Source: Ho, Salimans 2022, arXiv 2207.12598 (whose w is scale - 1).
    """

    def __init__(
        self, denoiser: Denoiser, scale: float, null: Mapping[str, Any], **options: Any
    ) -> None:
        super().__init__(denoiser, scale, **options)
        if missing := set(null) - set(denoiser.conditions):
            raise InvalidInputError(
                f"the null condition {sorted(missing)[0]!r} has no counterpart; bind it first with with_conditions(...)"
            )
        self.null = dict(null)

    def pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional estimate."""
        conditions = self.inner.conditions
        both = {
            name: torch.cat(
                [value, torch.as_tensor(self.null.get(name, value)).to(value).expand_as(value)]
            )
            if isinstance(value, Tensor)
            else value
            for name, value in conditions.items()
        }
        strong, weak = self.inner.with_conditions(**both)(torch.cat([x, x]), level).chunk(2)
        return strong, weak


class AutoGuided(Guided):
    """Autoguidance: the weak estimate is that of a smaller or less trained model.

    Args:
        denoiser: The model.
        weak: The weaker model of the same data and process.
        scale: Strength; 1 is off.
        options: `interval`, `rescale`, `projection` as for `Guided`.

    Source: Karras et al. 2024, arXiv 2406.02507.
    """

    def __init__(self, denoiser: Denoiser, weak: Denoiser, scale: float, **options: Any) -> None:
        super().__init__(denoiser, scale, **options)
        self.weak = weak

    def pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The model's estimate and the weaker model's."""
        return self.inner(x, level), self.weak(x, level)

    def with_conditions(self, **conditions: Any) -> Self:
        """Both models with these conditions."""
        new = super().with_conditions(**conditions)
        new.weak = self.weak.with_conditions(**conditions)
        return new


def _with_std_of(reference: Tensor, x: Tensor, share: float) -> Tensor:
    each = tuple(range(1, x.ndim))
    factor = reference.std(each, keepdim=True) / x.std(each, keepdim=True).clamp(min=1e-12)
    return x * (share * factor + (1 - share))
