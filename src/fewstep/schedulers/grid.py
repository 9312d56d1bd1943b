"""The noise levels that a sampler visits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.errors import InvalidInputError
from fewstep.process import Level, Process


@dataclass(frozen=True)
class Grid:
    """Levels from noisy to clean: n + 1 of them for n steps. They decide everything; no sampler looks elsewhere.

    Attributes:
        process: The forward process that the levels belong to.
        levels: At least two levels, noise strictly falling.
        scheduler: The name of the scheduler that made the grid.
        options: The scheduler's options.

    Raises:
        InvalidInputError: If there are fewer than two levels, or the noise does not fall strictly.
    """

    process: Process
    levels: tuple[Level, ...]
    scheduler: str = "custom"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.levels) < 2:
            raise InvalidInputError(
                f"a grid needs at least 2 levels, got {len(self.levels)}; end it with 0 for clean data"
            )
        for i, (t, s) in enumerate(self.steps):
            if not s.ratio < t.ratio:
                raise InvalidInputError(
                    f"grid levels must fall strictly, but level {i + 1} (sigma/alpha={s.ratio:g}) does not lie below "
                    f"level {i} ({t.ratio:g}); sort the list from noisy to clean and drop repeats"
                )

    @classmethod
    def from_ratios(cls, process: Process, ratios: Iterable[float]) -> Grid:
        """A grid of hand-written `sigma / alpha` values, run exactly as given.

        Args:
            process: The forward process.
            ratios: Falling numbers in [0, inf]; end with 0 to finish at clean data. These are the sigmas of
                k-diffusion and ComfyUI for every model but flow models.

        Raises:
            InvalidInputError: If a value is negative or not a number, or the list does not fall.

        >>> from fewstep.process import edm
        >>> Grid.from_ratios(edm(), [80, 5, 0.5, 0]).ratios
        [80.0, 5.0, 0.5, 0.0]
        """
        values = [float(r) for r in ratios]
        for value in values:
            if not value >= 0:
                raise InvalidInputError(
                    f"sigma/alpha={value:g} is not a level; every value must be in [0, inf]"
                )
        return cls(process, tuple(process.levels_at(values)))

    @classmethod
    def from_times(cls, process: Process, times: Iterable[float], end_clean: bool = True) -> Grid:
        """A grid of hand-written times in the process's own unit, then clean data.

        Args:
            process: The forward process.
            times: Falling times inside the process's range; they may be fractional.
            end_clean: Whether clean data is appended as the last level.

        Raises:
            InvalidInputError: If a time is out of range, or the list does not fall.

        >>> from fewstep.process import vp_linear
        >>> [level.t for level in Grid.from_times(vp_linear(), [999, 500, 250.5]).levels]
        [999.0, 500.0, 250.5, -1.0]
        """
        levels = process.levels([float(t) for t in times])
        return cls(process, (*levels, process.clean) if end_clean else tuple(levels))

    @property
    def steps(self) -> tuple[tuple[Level, Level], ...]:
        """The pairs (from, to), one for each step."""
        return tuple(zip(self.levels, self.levels[1:], strict=False))

    @property
    def ratios(self) -> list[float]:
        """`sigma / alpha` of every level."""
        return [level.ratio for level in self.levels]

    @property
    def times(self) -> list[float]:
        """Time of every level."""
        return [level.t for level in self.levels]

    def __str__(self) -> str:
        shown = ", ".join("inf" if math.isinf(r) else f"{r:.6g}" for r in self.ratios)
        return f"{self.scheduler} on {self.process.name}, {len(self.steps)} steps: {shown}"
