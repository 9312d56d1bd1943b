"""Every untuned setting, ours and the peer's, for a number of network calls, none of them twice.

Settings count as the same if they give the same numbers on a toy problem: most flags of a scheduler do nothing on
most grids, and many schedulers give one grid with so few steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

import fewstep as fs
from fewstep.errors import FewstepError, NonFiniteError
from fewstep.plan.executor import DenoiserLike
from fewstep.process import Process
from fewstep.registry import Entry
from fewstep.samplers import SAMPLERS, SamplerEntry
from fewstep.schedulers import SCHEDULERS
from peers import FAMILIES, FINAL, Family, PeerSetting, products, run, solvers

OURS, PEERS = "ours", "diffusers"
ORDERS = (1, 2, 3, 4)
T = TypeVar("T")
Runner = Callable[[DenoiserLike, Tensor, fs.Noise], Tensor]
"""From a denoiser, the noise to start from (B, ...) and the noise on the way to results (B, ...)."""


@dataclass(frozen=True)
class Trial:
    """A setting with a number of calls, ready to run.

    Attributes:
        side: Whose it is.
        solver: What makes the steps, and its options.
        grid: What makes the levels, and its options.
        calls: Network calls.
        draws: Whether it draws noise.
        run: From denoiser and noise to results.
    """

    side: str
    solver: str
    grid: str
    calls: int
    draws: bool
    run: Runner

    @property
    def name(self) -> str:
        """The setting."""
        return f"{self.solver} | {self.grid}"

    def key(self, budget: int) -> str:
        """Its name in a file of results."""
        return f"{self.side} | {self.name} | {budget}"


def plan_trial(side: str, plan: fs.Plan, solver: str, grid: str) -> Trial:
    """A trial of a plan of ours."""

    def go(denoiser: DenoiserLike, start: Tensor, noise: fs.Noise) -> Tensor:
        return plan.run(denoiser, plan.levels[0].sigma * start, noise)

    return Trial(side, solver, grid, plan.calls, plan.draws > 0, go)


def ours(
    process: Process, budget: int, only: Callable[[str], bool] = lambda name: True
) -> Iterator[Trial]:
    """Our samplers and schedulers with all their presets and choices, and as many steps as the calls pay for."""
    grids = functools.cache(lambda steps: list(_unique(_grids(process, steps), _ratios)))
    for entry in SAMPLERS:
        if entry.needs or entry.eager or not only(entry.name):
            continue
        candidates = _variants(entry)
        some = fs.schedulers.make_grid("karras", process, budget)
        for options in _unique(candidates, lambda o, e=entry: _plan_print(e, o, some)):
            if steps := _affordable(entry, options, process, budget):
                for name, grid in grids(steps):
                    if (plan := _plan(entry, options, grid)) and plan.calls <= budget:
                        yield plan_trial(OURS, plan, _named(entry.name, options), name)


def theirs(
    process: Process, budget: int, only: Callable[[str], bool] = lambda name: True
) -> Iterator[Trial]:
    """The peer's schedulers with all their settings, and as many steps as the calls pay for."""
    for family in FAMILIES:
        if not only(family.name):
            continue
        first = next(products(family.solver)), next(products(family.step))
        grids = _unique(
            products(family.grid), lambda g, f=family, s=first: _peer_print(f, *s, [g], budget)
        )
        default = next(products(family.grid))
        key = "final_sigmas_type"
        ends = [{**default, key: final} for final in FINAL] if key in default else [default]
        alike = _unique(
            solvers(family),
            lambda s, f=family, e=ends: _peer_print(f, s[0], s[1], e, budget),
        )
        pairs = list(alike)
        for grid in grids:
            for solver, step, draws in pairs:
                trial = peer_trial(family.name, grid, solver, step, draws, process, budget)
                if trial is not None:
                    yield trial


def peer_trial(
    family: str,
    grid: Mapping[str, Any],
    solver: Mapping[str, Any],
    step: Mapping[str, Any],
    draws: bool,
    process: Process,
    budget: int,
) -> Trial | None:
    """A trial of the peer; None if the calls do not pay for a step, or the class refuses the settings."""
    setting = PeerSetting(family, {**grid, **solver}, step, draws)
    try:
        scheduler = setting.scheduler(process, budget)
    except Exception:  # whatever a class of diffusers raises for settings that do not go together
        return None
    if scheduler is None:
        return None

    def go(denoiser: DenoiserLike, start: Tensor, noise: fs.Noise) -> Tensor:
        fresh = setting.scheduler(process, budget)
        return run(fresh, setting, denoiser, start, noise.seeds[0])

    of_solver = PeerSetting(family, solver, step, draws).key
    of_grid = PeerSetting("", grid, {}, False).key.strip() or "its own"
    return Trial(PEERS, of_solver, of_grid, len(scheduler.timesteps), draws, go)


def _variants(entry: SamplerEntry) -> Iterator[dict[str, Any]]:
    """Defaults, presets, every choice and every order."""
    yield {}
    yield from (dict(preset) for preset in entry.presets.values())
    values: dict[str, tuple[Any, ...]] = {o.name: o.choices for o in entry.options if o.choices}
    for option in entry.options:
        if option.name == "order" and not option.choices:
            values["order"] = tuple(o for o in ORDERS if option.low <= o <= option.high)
    yield from products(values)


def _grids(process: Process, steps: int) -> Iterator[tuple[str, fs.Grid]]:
    for entry in SCHEDULERS:
        for options in ({}, *entry.presets.values()):
            try:
                grid = fs.schedulers.make_grid(entry.name, process, steps, **options)
            except FewstepError:  # made for another process, or for other numbers of steps
                continue
            yield _named(entry.name, options), grid


def _named(name: str, options: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{option}={value}" for option, value in options.items())])


def _plan(entry: Entry, options: Mapping[str, Any], grid: fs.Grid) -> fs.Plan | None:
    try:
        plan = fs.plan(entry.name, grid, **options)
    except FewstepError:
        return None
    assert isinstance(plan, fs.Plan)
    return plan


def _affordable(
    entry: SamplerEntry, options: Mapping[str, Any], process: Process, budget: int
) -> int:
    """The most steps that the calls pay for, 0 if they pay for none."""
    for steps in range(budget, 0, -1):
        plan = _plan(entry, options, fs.schedulers.make_grid("karras", process, steps))
        if plan is not None and plan.calls <= budget:
            return steps
    return 0


def _unique(items: Iterable[T], fingerprint: Callable[[T], Any]) -> Iterator[T]:
    """The first of all items with the same fingerprint; those with None are left out."""
    seen = set()
    for item in items:
        found = fingerprint(item)
        if found is not None and found not in seen:
            seen.add(found)
            yield item


def _ratios(named: tuple[str, fs.Grid]) -> tuple[float, ...]:
    return tuple(float(f"{ratio:.8g}") for ratio in named[1].ratios)


def _plan_print(entry: Entry, options: Mapping[str, Any], grid: fs.Grid) -> Any:
    plan = _plan(entry, options, grid)
    return plan and (plan.instructions, plan.result)


@functools.cache
def toy(process: Process) -> fs.exact.GaussianMixture:
    """Data of which every number of a scheduler shows in the result; some of it is beyond [-1, 1]."""
    centres = torch.tensor([[-1.3, 0.3], [0.8, -0.5], [0.2, 1.6]], dtype=torch.float64)
    return fs.exact.GaussianMixture(centres, 0.2, process=process)


def _peer_print(
    family: Family,
    solver: Mapping[str, Any],
    step: Mapping[str, Any],
    grids: Iterable[Mapping[str, Any]],
    budget: int,
) -> Any:
    """The results on the toy problem to six digits, None for each grid that fails; None if all of them do."""
    process = fs.process.vp_linear()
    noise = fs.Noise(range(3), (2,), dtype=torch.float64)
    draws = family.random is not None
    found = []
    for grid in grids:
        trial = peer_trial(family.name, grid, solver, step, draws, process, budget)
        result = trial and attempt(trial, toy(process), noise.initial(), noise)
        numbers = None if result is None else result.flatten().tolist()
        found.append(numbers and tuple(float(f"{number:.6g}") for number in numbers))
    return tuple(found) if any(found) else None


def attempt(trial: Trial, denoiser: DenoiserLike, start: Tensor, noise: fs.Noise) -> Tensor | None:
    """The results; None where a setting breaks down, or a class of diffusers refuses it when it steps."""
    try:
        result = trial.run(denoiser, start, noise)
    except NonFiniteError:
        return None
    except Exception:
        if trial.side == OURS:
            raise
        return None
    return result if result.isfinite().all() else None
