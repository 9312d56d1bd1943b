"""Guidance: pushing the estimate away from a weaker one, `D = D_weak + scale (D_strong - D_weak)`. Scale 1 is off."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fewstep.denoisers.base import BaseDenoiser, Wrapper
from fewstep.errors import InvalidInputError, not_differentiable
from fewstep.process import Level

Interval = tuple[float, float]


@dataclass(frozen=True)
class Projection:
    """Adaptive projected guidance: soften the part of the push that only saturates.

    The push `D_strong - D_weak` gets a momentum over the calls of a run, is shortened to at most `limit`, and its part
    parallel to D_strong is scaled by `parallel`.

    Args:
        parallel: Factor on the parallel part; 1 leaves the push as it is.
        limit: Largest Euclidean length of the push for each image, > 0; inf for none.
        momentum: Weight of the earlier pushes, in (-1, 1); negative values damp them.

    Raises:
        InvalidInputError: If a number is out of range.

    Source: Sadat, Hilliges, Weber 2024, arXiv 2410.02416.
    """

    parallel: float = 0.0
    limit: float = math.inf
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.parallel):
            raise InvalidInputError(f"projection parallel={self.parallel} must be a finite number")
        if not self.limit > 0:
            raise InvalidInputError(f"projection limit={self.limit} must be above 0; inf is none")
        if not -1 < self.momentum < 1:
            raise InvalidInputError(
                f"projection momentum={self.momentum} must be in (-1, 1); -0.5 is usual"
            )


@dataclass
class _Memory:
    """What one run of a Plan remembers: the last push, momentum included."""

    push: Tensor | None = None


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
        strong: BaseDenoiser,
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
        self.scale, self.interval = scale, interval
        self.rescale, self.projection = rescale, projection
        self._memory: _Memory | None = None

    def pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The strong and the weak estimate."""
        strong, weak, _ = self.pair_and_share(x, level)
        return strong, weak

    def pairs(self, x: Tensor, levels: Sequence[Level]) -> tuple[Tensor, Tensor]:
        """`pair` at points of several levels, shape (K, B, ...)."""
        pairs = [self.pair(*pair) for pair in zip(x, levels, strict=True)]
        strong, weak = (torch.stack(values) for values in zip(*pairs, strict=True))
        return strong, weak

    @abstractmethod
    def pair_and_share(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor | None]:
        """The strong and the weak estimate, and where the strong one's variance lies, see `variance_pair`."""

    @abstractmethod
    def derivative_pair(self, x: Tensor, along: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The derivatives of both."""

    @property
    @abstractmethod
    def weak_passes(self) -> int:
        """Network passes for the weak estimate."""

    @property
    def passes(self) -> int:
        """Network passes of one picture for one estimate inside the interval."""
        return self.inner.passes + (0 if self.scale == 1 else self.weak_passes)

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """The guided estimate, in x's shape."""
        if self.scale == 1 or not self._acts(level):
            return self.inner(x, level)
        return self._pushed(*self.pair(x, level))

    def guided_pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The guided and the weak estimate; where guidance does not act, both are the denoiser's own."""
        if not self._acts(level):
            strong = self.inner(x, level)
            return strong, strong
        strong, weak = self.pair(x, level)
        return self._pushed(strong, weak), weak

    def many(self, x: Tensor, levels: Sequence[Level]) -> Tensor:
        """The guided estimates at several levels, shape (K, B, ...)."""
        return self.inner.many(x, levels) if self.scale == 1 else self.guided_pairs(x, levels)[0]

    def guided_pairs(self, x: Tensor, levels: Sequence[Level]) -> tuple[Tensor, Tensor]:
        """`guided_pair` at several levels: those where guidance acts together, and the others together."""
        if self._memory is not None:  # each push needs the one before
            return super().guided_pairs(x, levels)
        guided, weak = torch.empty_like(x), torch.empty_like(x)
        for acts in (True, False):
            rows = [k for k, level in enumerate(levels) if self._acts(level) == acts]
            points, there = x[rows], [levels[k] for k in rows]
            if not rows:
                continue
            if acts:
                strong, weak[rows] = self.pairs(points, there)
                pushed = self._pushed(strong.flatten(0, 1), weak[rows].flatten(0, 1))
                guided[rows] = pushed.reshape(points.shape)
            else:
                guided[rows] = weak[rows] = self.inner.many(points, there)
        return guided, weak

    def variance_pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
        """The guided estimate, and the variance of the strong one."""
        if self.scale == 1 or not self._acts(level):
            return self.inner.variance_pair(x, level)
        strong, weak, share = self.pair_and_share(x, level)
        return self._pushed(strong, weak), share

    def derivative(self, x: Tensor, along: Tensor, level: Level) -> Tensor:
        """The guided derivative; see `BaseDenoiser`."""
        if self.projection is not None or self.rescale:
            raise not_differentiable(
                self.name, "its guidance is not linear; leave projection and rescale out"
            )
        if self.scale == 1 or not self._acts(level):
            return self.inner.derivative(x, along, level)
        strong, weak = self.derivative_pair(x, along, level)
        return strong + (self.scale - 1) * (strong - weak)

    def for_run(self) -> Self:
        """A copy that remembers the pushes of one run alone, where there is momentum."""
        new = super().for_run()
        if self.projection is None or not self.projection.momentum:
            return new
        new = copy.copy(new)
        new._memory = _Memory()
        return new

    def _pushed(self, strong: Tensor, weak: Tensor) -> Tensor:
        push = strong - weak
        if self.projection is not None:
            push = self._projected(push, strong, self.projection)
        guided = strong + (self.scale - 1) * push
        return _with_std_of(strong, guided, self.rescale) if self.rescale else guided

    def _acts(self, level: Level) -> bool:
        return self.interval is None or self.interval[0] < level.ratio <= self.interval[1]

    def _projected(self, push: Tensor, strong: Tensor, projection: Projection) -> Tensor:
        if self._memory is not None:
            if self._memory.push is not None:
                push = push + projection.momentum * self._memory.push
            self._memory.push = push
        shape = push.shape
        push, strong = _rows(push), _rows(strong)
        if math.isfinite(projection.limit):
            length = push.norm(dim=1, keepdim=True).clamp(min=_TINY)
            push = push * (projection.limit / length).clamp(max=1)
        along = (push * strong).sum(1, keepdim=True)
        parallel = along / strong.square().sum(1, keepdim=True).clamp(min=_TINY) * strong
        return (push + (projection.parallel - 1) * parallel).view(shape)


class ClassifierFree(Guided):
    """Classifier-free guidance: the weak estimate is the same network's without the condition, in one batched call.

    Args:
        denoiser: A denoiser with its conditions bound.
        scale: Strength; 1 is off, and then there is no second pass.
        null: The conditions that mean "none", by name; each replaces the denoiser's condition of that name, a tensor.
            Its shape may be anything that broadcasts to the condition's, such as () for labels of shape (B,).
        options: `interval`, `rescale`, `projection` as for `Guided`.

    Raises:
        InvalidInputError: If a number is out of range, or null does not fit the conditions.

    Source: Ho, Salimans 2022, arXiv 2207.12598 (whose w is scale - 1).
    """

    def __init__(
        self, denoiser: BaseDenoiser, scale: float, null: Mapping[str, Any], **options: Any
    ) -> None:
        super().__init__(denoiser, scale, **options)
        if not null:
            raise InvalidInputError(
                'null names no condition, so there is nothing to push away from; give one, such as {"labels": 10}'
            )
        for name, value in null.items():
            if name not in denoiser.conditions:
                raise InvalidInputError(
                    f"the null condition {name!r} has no counterpart; bind it first with with_conditions(...)"
                )
            _replaced(name, denoiser.conditions[name], value)
        self.null = dict(null)

    @property
    def weak_passes(self) -> int:
        """As many as for the strong estimate."""
        return self.inner.passes

    def pair_and_share(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor | None]:
        """The conditional and the unconditional estimate, and the conditional one's variance, in one batched call."""
        both, shares = self._both(x).variance_pair(torch.cat([x, x]), level)
        strong, weak = both.chunk(2)
        return strong, weak, None if shares is None else shares.chunk(2)[0]

    def pairs(self, x: Tensor, levels: Sequence[Level]) -> tuple[Tensor, Tensor]:
        """Both estimates at points of several levels, in one batched call."""
        strong, weak = self._both(x[0]).many(torch.cat([x, x], 1), levels).chunk(2, 1)
        return strong, weak

    def derivative_pair(self, x: Tensor, along: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The derivatives of both."""
        both = self._both(x).derivative(torch.cat([x, x]), torch.cat([along, along]), level)
        strong, weak = both.chunk(2)
        return strong, weak

    def _both(self, x: Tensor) -> BaseDenoiser:
        """The denoiser for the batch twice, with and without the condition."""
        both = {
            name: torch.cat(
                [
                    _per_image(value, x),
                    _per_image(_replaced(name, value, self.null.get(name, value)), x),
                ]
            )
            for name, value in self.inner.conditions.items()
            if isinstance(value, Tensor) and value.ndim
        }
        return self.inner.with_conditions(**both)


class AutoGuided(Guided):
    """Autoguidance: the weak estimate is that of a smaller or less trained model.

    Args:
        denoiser: The model.
        weak: The weaker model of the same data and process.
        scale: Strength; 1 is off.
        options: `interval`, `rescale`, `projection` as for `Guided`.

    Raises:
        InvalidInputError: If a number is out of range, or the models have different processes.

    Source: Karras et al. 2024, arXiv 2406.02507.
    """

    def __init__(
        self, denoiser: BaseDenoiser, weak: BaseDenoiser, scale: float, **options: Any
    ) -> None:
        super().__init__(denoiser, scale, **options)
        if weak.process != denoiser.process:
            raise InvalidInputError(
                f"the weak model has the process {weak.process}, the strong one {denoiser.process}; "
                "take two models of one process"
            )
        self.weak = weak

    @property
    def weak_passes(self) -> int:
        """The weaker model's."""
        return self.weak.passes

    def pair_and_share(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor | None]:
        """The model's estimate and the weaker model's, and the model's own variance."""
        strong, share = self.inner.variance_pair(x, level)
        return strong, self.weak(x, level), share

    def pairs(self, x: Tensor, levels: Sequence[Level]) -> tuple[Tensor, Tensor]:
        """Both estimates at points of several levels."""
        return self.inner.many(x, levels), self.weak.many(x, levels)

    def derivative_pair(self, x: Tensor, along: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The derivatives of both."""
        return self.inner.derivative(x, along, level), self.weak.derivative(x, along, level)

    def with_conditions(self, **conditions: Any) -> Self:
        """Both models with these conditions."""
        return (
            super().with_conditions(**conditions)._against(self.weak.with_conditions(**conditions))
        )

    def for_run(self) -> Self:
        """Both models' copies for a run."""
        return super().for_run()._against(self.weak.for_run())

    def _against(self, weak: BaseDenoiser) -> Self:
        if weak is self.weak:
            return self
        new = copy.copy(self)
        new.weak = weak
        return new


_TINY = 1e-12
"""Below any length that matters, and above zero: keeps 0 / 0 away."""


def _replaced(name: str, value: Any, null: Any) -> Tensor:
    """The null condition in the shape, type and place of the condition that it replaces."""
    if not isinstance(value, Tensor) or not value.ndim:
        raise InvalidInputError(
            f"the condition {name!r} is {value!r}; to be replaced by null it must be a tensor with the batch as first "
            "dimension"
        )
    none = torch.as_tensor(null).to(value)
    try:
        return none.expand_as(value)
    except RuntimeError as error:
        raise InvalidInputError(
            f"the null condition {name!r} of shape {tuple(none.shape)} does not broadcast to the condition's shape "
            f"{tuple(value.shape)}"
        ) from error


def _per_image(value: Tensor, x: Tensor) -> Tensor:
    """A condition that is one for all images, repeated for each."""
    return value.expand(len(x), *value.shape[1:]) if len(value) == 1 else value


def _rows(x: Tensor) -> Tensor:
    """Each image as one row, shape (B, size)."""
    return x.reshape(len(x), -1)


def _with_std_of(reference: Tensor, x: Tensor, share: float) -> Tensor:
    wanted, present = (_rows(v).std(1, correction=0) for v in (reference, x))
    factor = share * wanted / present.clamp(min=_TINY) + (1 - share)
    return x * factor.view(-1, *(1,) * (x.ndim - 1))
