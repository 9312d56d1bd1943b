"""Every untuned setting, ours and the peer's, for a number of network calls, none of them twice.

Settings of the peer count as the same if they give the same numbers on a toy problem: most flags of a scheduler do
nothing on most grids. Ours count as the same if grid and instructions are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

import fewstep as fs
from fewstep.errors import FewstepError, NonFiniteError
from fewstep.plan.executor import DenoiserLike
from fewstep.process import Level, Process
from fewstep.registry import Option
from fewstep.samplers import SAMPLERS, SamplerEntry
from fewstep.schedulers import SCHEDULERS
from peers import FAMILIES, FINAL, SIGMA_KIND, Family, PeerRun, Refused, defaults, products

OURS, PEERS = "ours", "diffusers"
ORDERS = (1, 2, 3, 4)
LAST = "final_sigmas_type"
T = TypeVar("T")


class Draws:
    """Fresh noise for each stretch of the path, from one generator: all draws of a plan are independent."""

    def __init__(self, seed: int, like: Tensor) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._like = like

    def __call__(self, start: Level, end: Level) -> Tensor:
        like = self._like
        return torch.randn(like.shape, generator=self._generator, dtype=like.dtype)

    def on_lap(self, lap: int) -> Self:
        """The same: each draw is fresh anyway."""
        return self


@dataclass(frozen=True)
class Trial:
    """A setting with a number of calls, ready to run.

    Attributes:
        calls: Network calls.
        draws: Whether it draws noise.
        run: From denoiser, standard normal start (B, ...) and a seed for further noise to results (B, ...).
    """

    calls: int
    draws: bool
    run: Callable[[DenoiserLike, Tensor, int], Tensor]

    def attempt(self, denoiser: DenoiserLike, start: Tensor, seed: int) -> Tensor | None:
        """The results; None where they are not finite, or the setting is refused when it steps."""
        try:
            result = self.run(denoiser, start, seed)
        except (NonFiniteError, Refused):
            return None
        return result if result.isfinite().all() else None


@dataclass(frozen=True)
class Recipe:
    """A setting for any number of calls.

    Attributes:
        side: Whose it is.
        solver: A sampler of ours, or a class of the peer.
        options: Its options, but those that decide the levels.
        scheduler: A scheduler of ours; nothing for the peer.
        grid: Options that decide the levels.
        step: Arguments of the peer's `step`.
        draws: Whether it draws noise.
    """

    side: str
    solver: str
    options: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = ""
    grid: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    draws: bool = False

    @property
    def of_grid(self) -> str:
        """What makes the levels, in words."""
        return _words(self.scheduler, self._told(self.grid)) or "default levels"

    def _told(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options but those of the peer's that are as by default."""
        usual = defaults(self.solver) if self.side == PEERS else {}
        return {n: value for n, value in options.items() if n not in usual or value != usual[n]}

    @property
    def name(self) -> str:
        """All of it in words."""
        return f"{_words(self.solver, self._told({**self.options, **self.step}))} | {self.of_grid}"

    def key(self, budget: int) -> str:
        """Its name in a file of results."""
        return f"{self.side} | {self.name} | {budget}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    def trial(self, process: Process, budget: int) -> Trial | None:
        """With as many steps as the calls pay for; None if they pay for none, or the options do not go together."""
        if self.side == PEERS:
            config = {**self.options, **self.grid}
            made = PeerRun(self.solver, config, self.step, self.draws, process, budget)
            calls = made.calls
            return Trial(calls, self.draws, made.run) if calls else None
        for steps in range(budget, 0, -1):
            grid = _grid(self.scheduler, self.grid, process, steps)
            plan = grid and _plan(self.solver, self.options, grid)
            if plan and plan.calls <= budget:
                return plan_trial(plan)
        return None


def plan_trial(plan: fs.Plan) -> Trial:
    """A trial of a plan of ours."""

    def run(denoiser: DenoiserLike, start: Tensor, seed: int) -> Tensor:
        return plan.run(denoiser, plan.levels[0].sigma * start, Draws(seed, start))

    return Trial(plan.calls, plan.draws > 0, run)


def peer_recipe(
    family: Family, solver: Mapping[str, Any], step: Mapping[str, Any], grid: Mapping[str, Any]
) -> Recipe:
    """A recipe of the peer."""
    draws = family.draws({**solver, **step})
    return Recipe(PEERS, family.name, solver, "", grid, step, draws)


Named = tuple[Recipe, Trial]


def ours(
    process: Process, budget: int, only: Callable[[str], bool] = lambda name: True
) -> Iterator[Named]:
    """Our samplers and schedulers with all their presets, choices and orders."""
    grids = functools.cache(lambda steps: list(_unique(_grids(process, steps), _ratios)))
    some = fs.schedulers.karras(process, steps=budget)
    for entry in SAMPLERS:
        if entry.needs or entry.eager or not only(entry.name):
            continue
        variants = _unique(_variants(entry), lambda o, e=entry: _instructions(e.name, o, some))
        for options in variants:
            for name, given, grid in grids(_affordable(entry, options, process, budget)):
                plan = _plan(entry.name, options, grid)
                if plan and plan.calls <= budget:
                    trial = plan_trial(plan)
                    recipe = Recipe(OURS, entry.name, options, name, given, draws=trial.draws)
                    yield recipe, trial


def theirs(
    process: Process, budget: int, only: Callable[[str], bool] = lambda name: True
) -> Iterator[Named]:
    """The peer's schedulers with all their settings."""
    for family in FAMILIES:
        if not only(family.name):
            continue

        plain = next(products(family.grid))
        ends = [{**plain, LAST: final} for final in FINAL] if LAST in plain else [plain]
        pairs = itertools.product(products(family.solver), products(family.step))
        found = list(
            _unique(pairs, lambda p, f=family, e=ends: _on_toy(f, *p, e, process, budget))
        )
        if not found:
            continue
        grids = _unique(
            products(family.grid),
            lambda g, f=family, p=found[0]: _on_toy(f, *p, [g], process, budget),
        )
        for grid in grids:
            for solver, step in found:
                recipe = peer_recipe(family, solver, step, grid)
                if trial := recipe.trial(process, budget):
                    yield recipe, trial


def _words(name: str, options: Mapping[str, Any]) -> str:
    given = dict(options)
    kind = given.pop(SIGMA_KIND, "")
    if kind:
        given = {kind: True, **given}
    words = (f"{option}={_word(value)}" for option, value in given.items())
    return " ".join([name, *words]).strip()


def _word(value: Any) -> str:
    return (",".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _variants(entry: SamplerEntry) -> Iterator[dict[str, Any]]:
    """Defaults, presets, and every combination of choices and orders."""
    yield {}
    yield from (dict(preset) for preset in entry.presets.values())
    values = {o.name: o.choices or _orders(o) for o in entry.options}
    yield from products({name: chosen for name, chosen in values.items() if chosen})


def _orders(option: Option) -> tuple[int, ...]:
    if option.name != "order":
        return ()
    return tuple(order for order in ORDERS if option.low <= order <= option.high)


def _grids(process: Process, steps: int) -> Iterator[tuple[str, dict[str, Any], fs.Grid]]:
    for entry in SCHEDULERS:
        for options in ({}, *entry.presets.values()):
            if grid := _grid(entry.name, options, process, steps):
                yield entry.name, dict(options), grid


def _grid(name: str, options: Mapping[str, Any], process: Process, steps: int) -> fs.Grid | None:
    """None where a scheduler was made for another process, or for other numbers of steps."""
    if steps < 1:
        return None
    try:
        return fs.schedulers.make_grid(name, process, steps, **options)
    except FewstepError:
        return None


def _plan(name: str, options: Mapping[str, Any], grid: fs.Grid) -> fs.Plan | None:
    try:
        plan = fs.plan(name, grid, **options)
    except FewstepError:
        return None
    assert isinstance(plan, fs.Plan)
    return plan


def _affordable(
    entry: SamplerEntry, options: Mapping[str, Any], process: Process, budget: int
) -> int:
    """The most steps that the calls pay for, 0 if they pay for none."""
    for steps in range(budget, 0, -1):
        plan = _plan(entry.name, options, fs.schedulers.karras(process, steps=steps))
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


def _ratios(named: tuple[str, Any, fs.Grid]) -> tuple[float, ...]:
    return tuple(float(f"{ratio:.8g}") for ratio in named[2].ratios)


def _instructions(name: str, options: Mapping[str, Any], grid: fs.Grid) -> Any:
    plan = _plan(name, options, grid)
    return plan and (plan.instructions, plan.result)


@functools.cache
def toy(process: Process) -> fs.exact.GaussianMixture:
    """Data of which every number of a scheduler shows in the result; some of it is beyond [-1, 1]."""
    centres = torch.tensor([[-1.3, 0.3], [0.8, -0.5], [0.2, 1.6]], dtype=torch.float64)
    return fs.exact.GaussianMixture(centres, 0.2, process=process)


def _on_toy(
    family: Family,
    solver: Mapping[str, Any],
    step: Mapping[str, Any],
    grids: Iterable[Mapping[str, Any]],
    process: Process,
    budget: int,
) -> Any:
    """The results on the toy problem to six digits, None for each grid that fails; None if all of them do."""
    start = fs.Noise(range(3), (2,), dtype=torch.float64).initial()
    found = []
    for grid in grids:
        trial = peer_recipe(family, solver, step, grid).trial(process, budget)
        result = trial and trial.attempt(toy(process), start, 0)
        numbers = None if result is None else result.flatten().tolist()
        found.append(numbers and tuple(float(f"{number:.6g}") for number in numbers))
    return tuple(found) if any(found) else None
