"""Samplers whose numbers depend on the data: they cannot become a table, so they run on tensors as they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import CallLimitError, InvalidInputError, NonFiniteError
from fewstep.plan.executor import (
    DenoiserLike,
    NoiseSource,
    Progress,
    checked_start,
    derivative,
    drawn,
    estimate,
    finite,
    guided_pair,
    variance_pair,
)
from fewstep.plan.instructions import Draw
from fewstep.plan.plan import GridLike
from fewstep.process import Level, Process


@dataclass(frozen=True)
class Solution:
    """Where an eager run ended, and what it took.

    Attributes:
        x: The point at the last level, shape (B, ...).
        calls: Network calls.
        accepted: Steps that were taken.
        rejected: Steps that were tried and were not accurate enough.
    """

    x: Tensor
    calls: int
    accepted: int
    rejected: int


class EagerTape:
    """What a `Tape` is to a traced sampler: the same calls, answered at once with tensors.

    Attributes:
        start: The point at the first level of the grid.
        calls: Network calls so far.
        limit: Largest number of calls; a sampler with a step control sets it. None: no limit.
        accepted: Counted by samplers with a step control.
        rejected: Likewise.
    """

    def __init__(
        self,
        name: str,
        denoiser: Any,
        start: Tensor,
        noise: NoiseSource | None,
        on_step: Callable[[Progress], None] | None,
    ) -> None:
        self.start, self.calls, self.accepted, self.rejected = start, 0, 0, 0
        self.limit: int | None = None
        self._name, self._denoiser, self._noise, self._on_step = name, denoiser, noise, on_step

    def denoise(self, x: Tensor, level: Level) -> Tensor:
        """Estimate x_0 from the point x at a level: one network call."""
        self._count(level)
        denoised = self._checked(estimate(self._denoiser, x, level), level)
        self._report(x, level, denoised)
        return denoised

    def denoise_pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The guided and the weak estimate: one call of a guided denoiser."""
        self._count(level)
        guided, weak = guided_pair(self._denoiser, x, level)
        self._checked(weak, level)
        self._report(x, level, self._checked(guided, level))
        return guided, weak

    def denoise_with_variance(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """The estimate of x_0 and where the learnt variance lies, see `BaseDenoiser.variance_pair`: one call."""
        self._count(level)
        denoised, share = variance_pair(self._denoiser, x, level)
        self._checked(share, level)
        self._report(x, level, self._checked(denoised, level))
        return denoised, share

    def derivative(self, x: Tensor, along: Tensor, level: Level) -> Tensor:
        """`dD/dlog_snr` at the point x when it moves along a direction: one network call."""
        self._count(level)
        return self._checked(derivative(self._denoiser, x, along, level), level)

    def noise(self, start: Level, end: Level, lap: int = 0) -> Tensor:
        """A standard normal tensor that belongs to the path between two levels."""
        if self._noise is None:
            raise InvalidInputError(
                f"{self._name} draws noise; give noise=fewstep.Noise(seeds, shape)"
            )
        return drawn(self._noise, Draw(0, start, end, lap), self.start)

    def settle(self, x: Tensor) -> Tensor:
        """Return x: a tensor has its own place already."""
        return x

    def declare_inexact(self, rule: str) -> None:
        """Nothing: the rules are for tables."""

    def _count(self, level: Level) -> None:
        if level.is_clean:
            raise InvalidInputError(
                "a clean level (sigma = 0) cannot be denoised; use the last estimate instead"
            )
        if self.limit is not None and self.calls >= self.limit:
            raise CallLimitError(
                f"{self._name} is at {level} after {self.calls} network calls, {self.accepted} accepted and "
                f"{self.rejected} rejected steps, and max_calls={self.limit} allows no more; raise max_calls, or "
                "loosen rtol and atol"
            )
        self.calls += 1

    def _checked(self, denoised: Tensor, level: Level) -> Tensor:
        if not finite(denoised):
            raise NonFiniteError(
                f"{self._name}: the estimate of x_0 at call {self.calls}, level {level}, holds a NaN or infinity; "
                "check that `predicts` and the process are right (fewstep.testing.check_denoiser)"
            )
        return denoised

    def _report(self, x: Tensor, level: Level, denoised: Tensor) -> None:
        if self._on_step is not None:
            self._on_step(Progress(self.calls, self.limit or 0, level, x, denoised))


@dataclass(frozen=True)
class EagerPlan:
    """A sampler on one grid that is run as it is written; it has `run` and `levels` like a `Plan`, but no table.

    Attributes:
        function: The sampler, `(tape, grid, **options) -> tensor`.
        grid: The levels.
        sampler: Its name.
        options: Its options.
        adaptive: Whether its steps may depend on the data, so that the images of a batch share them.
    """

    function: Callable[..., Any]
    grid: GridLike
    sampler: str = "custom"
    options: Mapping[str, Any] = field(default_factory=dict)
    adaptive: bool = True

    @property
    def levels(self) -> tuple[Level, ...]:
        """The grid's levels, noisy to clean."""
        return tuple(self.grid.levels)

    @property
    def process(self) -> Process:
        """The forward process that the levels belong to."""
        return self.grid.process

    @property
    def scheduler(self) -> str:
        """Name of the scheduler."""
        return self.grid.scheduler

    @property
    def scheduler_options(self) -> Mapping[str, Any]:
        """The scheduler's options."""
        return self.grid.options

    @property
    def name(self) -> str:
        """Sampler, scheduler and number of steps."""
        return f"{self.sampler}/{self.scheduler}-{len(self.levels) - 1}"

    def run(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        noise: NoiseSource | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """Carry x from the first level of the grid to the last; see `Plan.run`."""
        return self.solve(denoiser, x, noise, on_step).x

    @torch.no_grad()
    def solve(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        noise: NoiseSource | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> Solution:
        """Like `run`, and say what it took.

        Raises:
            CallLimitError: If a sampler with a step control does not arrive within its `max_calls`.
        """
        x = checked_start(self.name, x, draws=0, noise=noise)
        if hasattr(denoiser, "for_run"):
            denoiser = denoiser.for_run()  # type: ignore[attr-defined]
        tape = EagerTape(self.name, denoiser, x, noise, on_step)
        result = self.function(tape, self.grid, **self.options)
        return Solution(result, tape.calls, tape.accepted, tape.rejected)

    def __str__(self) -> str:
        calls = (
            "as many network calls as the data need" if self.adaptive else "run as it is written"
        )
        return f"{self.name}: {calls}"
