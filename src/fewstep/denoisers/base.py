"""What every denoiser can do."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fewstep.denoisers.parameterisation import Parameterisation
from fewstep.errors import InvalidInputError, no_guidance, not_differentiable
from fewstep.process import Level, Process

NEARBY = 1e-4
"""Distance in log_snr at which what depends on the level alone is compared, to differentiate it."""


def beside(process: Process, level: Level) -> tuple[Level, Level, Level]:
    """The level a little noisier, the level itself and the one a little less noisy, `NEARBY` apart in log_snr.

    Raises:
        InvalidInputError: If the level is clean or pure noise, where nothing lies beside it.
    """
    if level.is_clean or level.is_pure_noise:
        raise InvalidInputError(
            f"level {level} has no derivative in log_snr; take one with both signal and noise"
        )
    before, after = process.levels_at([level.ratio * math.exp(d) for d in (NEARBY, -NEARBY)])
    return before, level, after


class BaseDenoiser(ABC):
    """An estimator `denoiser(x, level) -> x_0` on a forward process; it holds no state between calls.

    Networks (`Denoiser`), wrappers around other denoisers (`Wrapper`) and closed forms (`exact`) have this in common.

    Args:
        process: The forward process.

    Raises:
        InvalidInputError: If that is no process.
    """

    def __init__(self, process: Process) -> None:
        if not isinstance(process, Process):
            raise InvalidInputError(
                f"process must be a fewstep process such as fewstep.process.vp_linear(), got {process!r}"
            )
        self.process = process

    @abstractmethod
    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """Estimate x_0.

        Args:
            x: The point, shape (B, ...), float32 or float64.
            level: Its noise level.

        Returns:
            The estimate, in x's shape and type.
        """

    def many(self, x: Tensor, levels: Sequence[Level]) -> Tensor:
        """Estimate x_0 at points of several levels, in one network call where that is possible.

        Args:
            x: A batch of points for each level, shape (K, B, ...).
            levels: Their K noise levels.

        Returns:
            The estimates, in x's shape and type; row k is that of `self(x[k], levels[k])`, up to rounding.
        """
        return torch.stack([self(*pair) for pair in zip(x, levels, strict=True)])

    def guided_pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The guided estimate, and the weak one that guidance pushes away from.

        Raises:
            InvalidInputError: If there is no guidance.
        """
        raise no_guidance(self.name)

    def guided_pairs(self, x: Tensor, levels: Sequence[Level]) -> tuple[Tensor, Tensor]:
        """`guided_pair` at points of several levels; see `many`."""
        pairs = [self.guided_pair(*pair) for pair in zip(x, levels, strict=True)]
        guided, weak = (torch.stack(values) for values in zip(*pairs, strict=True))
        return guided, weak

    def variance_pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
        """The estimate of x_0, and where a network has learnt that the variance of a reverse step lies.

        Returns:
            The estimate, and a share v in the shape of x: the variance of the step to any other level is
            `small^(1 - v) large^v`, from the posterior's to that of `q(x_t | x_s)`. None where none was learnt.
        """
        return self(x, level), None

    def derivative(self, x: Tensor, along: Tensor, level: Level) -> Tensor:
        """`dD/dlog_snr` at a point that moves.

        Args:
            x: The point, shape (B, ...).
            along: Its direction, `alpha dx^/dlog_snr` with `x^ = x / alpha`, shape (B, ...); `alpha D - x` follows
                the probability-flow ODE.
            level: Its noise level.

        Returns:
            The derivative, in x's shape and type.

        Raises:
            InvalidInputError: If the estimate cannot be differentiated.
        """
        raise not_differentiable(self.name, "it has no derivative")

    @property
    def parameterisation(self) -> Parameterisation | None:
        """How one network output gives the estimate; None where the estimate is not linear in a single output."""
        return None

    @property
    def passes(self) -> int:
        """Network passes of one picture for one estimate; 2 where guidance evaluates a second one."""
        return 1

    @property
    def name(self) -> str:
        """What to call it in the record of a picture."""
        return type(self).__name__

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one picture, where that is known."""
        return None

    @property
    def num_classes(self) -> int | None:
        """Number of classes, whose labels are 0..num_classes-1, num_classes meaning none; None if not known."""
        return None

    @property
    def device(self) -> torch.device | None:
        """Where x has to be; None for anywhere."""
        return None

    @property
    def conditions(self) -> dict[str, Any]:
        """What the estimate is conditioned on, by name; tensors have the batch as first dimension."""
        return {}

    def with_conditions(self, **conditions: Any) -> Self:
        """The same denoiser with these conditions added.

        Raises:
            InvalidInputError: If it takes no conditions of these names.
        """
        if conditions:
            raise InvalidInputError(
                f"{self.name} takes no conditions, got {', '.join(conditions)}; leave them out"
            )
        return self

    def for_run(self) -> Self:
        """The denoiser to use for one run of a Plan; one that remembers earlier calls returns a fresh copy."""
        return self


class Wrapper(BaseDenoiser):
    """A denoiser around a denoiser, such as guidance or clipping; what it does not change is that of the inner one.

    Args:
        inner: The denoiser.
    """

    def __init__(self, inner: BaseDenoiser) -> None:
        if not isinstance(inner, BaseDenoiser):
            raise InvalidInputError(
                f"{type(self).__name__} goes around a denoiser, got {type(inner).__name__}; "
                "wrap a network first: fewstep.Denoiser(network, process, predicts)"
            )
        super().__init__(inner.process)
        self.inner = inner

    @property
    def passes(self) -> int:
        """Network passes of the inner denoiser."""
        return self.inner.passes

    @property
    def name(self) -> str:
        """Both names."""
        return f"{type(self).__name__}({self.inner.name})"

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the inner denoiser's pictures."""
        return self.inner.shape

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the inner denoiser."""
        return self.inner.num_classes

    @property
    def device(self) -> torch.device | None:
        """Where the inner denoiser is."""
        return self.inner.device

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions of the inner denoiser."""
        return self.inner.conditions

    def with_conditions(self, **conditions: Any) -> Self:
        """The same wrapper around the inner denoiser with these conditions."""
        return self._around(self.inner.with_conditions(**conditions))

    def for_run(self) -> Self:
        """The wrapper around the inner denoiser's copy for a run."""
        return self._around(self.inner.for_run())

    def _around(self, inner: BaseDenoiser) -> Self:
        if inner is self.inner:
            return self
        new = copy.copy(self)
        new.inner = inner
        return new
