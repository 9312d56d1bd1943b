"""The noise levels that a sampler visits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
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
                f"a grid needs at least 2 levels, got {len(self.levels)}; give a noisy one first, and end with 0 "
                "(clean data) or where the run should stop"
            )
        for i, (t, s) in enumerate(pairwise(self.ratios)):
            if not s < t:
                raise InvalidInputError(
                    f"grid levels must fall strictly, but level {i + 1} (sigma/alpha={s:g}) does not lie below "
                    f"level {i} ({t:g}); sort the list from noisy to clean and drop repeats"
                )

    @classmethod
    def from_ratios(cls, process: Process, ratios: Iterable[float]) -> Grid:
        """A grid of hand-written `sigma / alpha` values, run exactly as given.

        Args:
            process: The forward process.
            ratios: Falling numbers in [0, inf]; end with 0 to finish at clean data. These are the sigmas of
                k-diffusion and ComfyUI for every model but flow models.

        Raises:
            InvalidInputError: If a value is negative or not a number, or the list does not fall, or it is infinite
                and the process has no pure noise.

        >>> from fewstep.process import edm
        >>> Grid.from_ratios(edm(), [80, 5, 0.5, 0]).ratios
        [80.0, 5.0, 0.5, 0.0]
        """
        return cls(process, tuple(process.levels_at(_numbers(ratios))))

    @classmethod
    def from_times(cls, process: Process, times: Iterable[float], end_clean: bool = True) -> Grid:
        """A grid of hand-written times in the process's own unit, then clean data.

        Args:
            process: The forward process.
            times: Falling times inside the process's range; they may be fractional.
            end_clean: Whether clean data is appended as the last level, unless it is there already.

        Raises:
            InvalidInputError: If a time is out of range, or the list does not fall.

        >>> from fewstep.process import vp_linear
        >>> [level.t for level in Grid.from_times(vp_linear(), [999, 500, 250.5]).levels]
        [999.0, 500.0, 250.5, -1.0]
        """
        levels = process.levels(_numbers(times))
        if end_clean and not (levels and levels[-1].is_clean):
            levels.append(process.clean)
        return cls(process, tuple(levels))

    @property
    def steps(self) -> tuple[tuple[Level, Level], ...]:
        """The pairs (from, to), one for each step."""
        return tuple(pairwise(self.levels))

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


def _numbers(values: Iterable[float]) -> list[float]:
    """Floats of anything listed, such as an array.

    Raises:
        InvalidInputError: If one of them is no number.
    """
    listed = list(values)
    try:
        return [float(value) for value in listed]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"a grid is a list of numbers; got {listed!r:.80}") from error
