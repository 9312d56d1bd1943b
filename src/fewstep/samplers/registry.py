"""The list of samplers, and `plan`, which traces one on a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fewstep.errors import InvalidInputError
from fewstep.plan import Plan, Vector, trace
from fewstep.registry import Entry, Registry
from fewstep.schedulers import Grid


@dataclass(frozen=True)
class SamplerEntry(Entry):
    """A sampler's metadata.

    Attributes:
        family: "ODE" or "SDE".
        order: Order of convergence with the default options, weak order for an SDE.
        calls_per_step: Network calls for each step but the last.
        stochastic: Whether the default options draw noise.
    """

    family: Literal["ODE", "SDE"] = "ODE"
    order: int = 1
    calls_per_step: int = 1
    stochastic: bool = False


SAMPLERS: Registry[SamplerEntry] = Registry("sampler", SamplerEntry)


def sampler(
    name: str, **metadata: Any
) -> Callable[[Callable[..., Vector]], Callable[..., Vector]]:
    """Register `(tape, grid, **options) -> Vector` under a name, with title, paper, order, aliases..."""

    def register(function: Callable[..., Vector]) -> Callable[..., Vector]:
        SAMPLERS.add(name, function, **metadata)
        return function

    return register


def plan(sampler: str | Callable[..., Vector], grid: Grid, **options: Any) -> Plan:
    """Trace a sampler on a grid.

    Args:
        sampler: A sampler's name, title or alias, or a function `(tape, grid, **options) -> Vector` of your own.
        grid: The levels to visit.
        options: The sampler's options.

    Returns:
        The Plan; run it with `plan.run(denoiser, x, noise)`.

    Raises:
        UnknownNameError: If there is no such sampler or option.
        InvalidInputError: If an option is out of range, or the sampler cannot run on the grid.

    >>> import fewstep as fs
    >>> print(fs.plan("unipc", fs.schedulers.karras(fs.process.edm(), steps=8), order=3))
    unipc/karras-8: 8 network calls, 0 noise draws
    """
    if not isinstance(grid, Grid):
        raise InvalidInputError(
            f"grid must be a fewstep.Grid, got {type(grid).__name__}; make one with a scheduler such as "
            "fewstep.schedulers.karras(process, steps), or with Grid.from_ratios(process, [...])"
        )
    if callable(sampler):
        return trace(sampler, grid, getattr(sampler, "__name__", "custom"), **options)
    entry = SAMPLERS.find(sampler)
    return trace(entry.function, grid, entry.name, **entry.resolve(options))
