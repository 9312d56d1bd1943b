"""The list of samplers, and `plan`, which traces one on a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fewstep.errors import InvalidInputError
from fewstep.plan import EagerPlan, Plan, Vector, trace
from fewstep.registry import Entry, Registry
from fewstep.schedulers import Grid

Family = Literal["ODE", "SDE", "implicit", "momentum", "adaptive", "distilled"]
Need = Literal[
    "guided pair", "differentiable network", "predictor", "statistics", "learned variance"
]
OF_TRAINING: tuple[Need, ...] = ("predictor", "statistics", "learned variance")
"""Needs that only a training meets: of the network itself, or of a companion of it."""


@dataclass(frozen=True)
class SamplerEntry(Entry):
    """A sampler's metadata.

    Attributes:
        family: "ODE" and "SDE" for explicit methods, "implicit" for predictor-correctors and what can be run backwards
            exactly, "momentum" for those that smooth their steps, "adaptive" for those that choose steps by the data,
            "distilled" for those made for consistency and similar models.
        order: Order of convergence with the default options, weak order for those that draw noise; 0 where there is
            none, since the method does not converge to the ODE's or the SDE's solution.
        calls_per_step: Network calls for each step but the last.
        stochastic: Whether the default options draw noise.
        needs: What it asks of the model beyond an estimate of x_0.
        mistake: What is mistaken in the published formula, if anything; the option `corrected` mends it.
        corrected_order: Order of convergence with `corrected`.
        eager: Whether it runs without a table, because its numbers depend on the data.
    """

    family: Family = "ODE"
    order: int = 1
    calls_per_step: int = 1
    stochastic: bool = False
    needs: tuple[Need, ...] = ()
    mistake: str = ""
    corrected_order: int | None = None
    eager: bool = False

    @property
    def adaptive(self) -> bool:
        """Whether it chooses its steps by the data."""
        return self.family == "adaptive"

    @property
    def needs_training(self) -> bool:
        """Whether it runs only on networks that were trained for it, or with a companion that was."""
        return any(need in OF_TRAINING for need in self.needs)


SAMPLERS: Registry[SamplerEntry] = Registry("sampler", SamplerEntry)
SamplerFunction = TypeVar("SamplerFunction", bound=Callable[..., Any])


def sampler(name: str, **metadata: Any) -> Callable[[SamplerFunction], SamplerFunction]:
    """Register `(tape, grid, **options) -> Vector` under a name, with title, paper, order, aliases..."""

    def register(function: SamplerFunction) -> SamplerFunction:
        SAMPLERS.add(name, function, **metadata)
        return function

    return register


def plan(sampler: str | Callable[..., Vector], grid: Grid, **options: Any) -> Plan | EagerPlan:
    """Trace a sampler on a grid.

    Args:
        sampler: A sampler's name, title or alias, or a function `(tape, grid, **options) -> Vector` of your own.
        grid: The levels to visit.
        options: The sampler's options.

    Returns:
        The Plan; run it with `plan.run(denoiser, x, noise)`. For a sampler whose numbers depend on the data, an
        `EagerPlan`, which runs likewise.

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
    resolved = entry.resolve(options)
    # A function among the options looks at the data, so what it decides cannot be traced.
    looks = any(callable(value) for value in resolved.values())
    if entry.eager or looks:
        return EagerPlan(entry.function, grid, entry.name, resolved, entry.adaptive or looks)
    return trace(entry.function, grid, entry.name, **resolved)
