"""What the sweeps over all samplers run: every sampler that has a table, with each value of each option.

The cases come from the registry alone, so a new sampler is proved as soon as it is registered.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fewstep.errors import FewstepError
from fewstep.plan import EagerPlan, Plan
from fewstep.process import edm
from fewstep.registry import Option
from fewstep.samplers import SAMPLERS, SamplerEntry, plan
from fewstep.schedulers import karras

ENTRIES = list(SAMPLERS)
TRACED = [e for e in ENTRIES if not e.eager and not e.needs_training]
APART = [e for e in ENTRIES if e not in TRACED]

NUMBERS: dict[str, tuple[float, ...]] = {
    "eta": (0.0, 0.5, 1.0),
    "s_churn": (1.0, 8.0),
    "s_noise": (1.1,),
}
"""Values to try of options that are well known; others are tried on both sides of their default."""

MOST_TOGETHER = 24
"""Up to this many combinations of choices are all tried; beyond, one choice differs from the default at a time."""


BY_TIME = {"middle": "time", "variable": "t", "boundary": "time", "variance": "large"}
"""Options with which a method goes by the process's own time, or its own scale, and so differs between processes."""


@dataclass(frozen=True, repr=False)
class Case:
    """A sampler and the options that differ from its defaults."""

    entry: SamplerEntry
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def is_named(self) -> bool:
        """Whether a name stands for these options: the sampler's own, or that of a preset."""
        return not self.options or any(
            self.entry.resolve(self.options) == self.entry.resolve(given)
            for given in self.entry.presets.values()
        )

    @property
    def is_path_invariant(self) -> bool:
        """Whether it must give the same `x / alpha` on every process."""
        return not BY_TIME.items() & self.options.items()

    def __repr__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


def variants(entry: SamplerEntry) -> list[Case]:
    """The defaults, the presets, the choices together, and each number by itself; no two are the same."""
    candidates = [{}, *map(dict, entry.presets.values()), *_choices(entry), *_numbers(entry)]
    cases: dict[str, Case] = {}
    for options in candidates:
        resolved = {k: entry.resolve(options)[k] for k in options}
        different = {
            o.name: resolved[o.name]
            for o in entry.options
            if o.name in resolved and resolved[o.name] != o.default
        }
        cases.setdefault(str(Case(entry, different)), Case(entry, different))
    return list(cases.values())


def _choices(entry: SamplerEntry) -> Iterator[dict[str, Any]]:
    values = {o.name: _discrete(o) for o in entry.options}
    values = {name: found for name, found in values.items() if len(found) > 1}
    if math.prod(map(len, values.values())) <= MOST_TOGETHER:
        for together in itertools.product(*values.values()):
            yield dict(zip(values, together, strict=True))
    for name, found in values.items():
        for value in found:
            yield {name: value}
            if "corrected" in values:
                yield {name: value, "corrected": True}


def _discrete(option: Option) -> list[Any]:
    if option.choices:
        return list(option.choices)
    if option.kind is bool:
        return [False, True]
    if option.kind is not int:
        return []
    if option.high - option.low <= 6:
        return list(range(int(option.low), int(option.high) + 1))
    return [v for v in (option.low, option.default, option.default + 1) if _legal(option, v)]


def _numbers(entry: SamplerEntry) -> Iterator[dict[str, Any]]:
    for option in entry.options:
        if option.kind is float and not option.choices:
            beside = (0.8 * option.default, 1.25 * option.default) if option.default else (0.3,)
            for value in NUMBERS.get(option.name, beside):
                if _legal(option, value):
                    yield {option.name: value}


def _legal(option: Option, value: float) -> bool:
    return math.isfinite(value) and option.low <= value <= option.high


def corrected(entry: SamplerEntry) -> Case:
    """The first of the defaults and the presets that the correction changes, corrected."""
    levels = karras(edm(), 8)
    for options in ({}, *entry.presets.values()):
        mended = {**options, "corrected": True}
        published, right = (plan(entry.name, levels, **o) for o in (options, mended))
        if _table(published) != _table(right):
            return Case(entry, mended)
    raise AssertionError(f"corrected=True changes neither {entry.name} nor its presets")


def draws_noise(case: Case) -> bool:
    """Whether it draws noise; one that cannot be traced does not, and fails in test_rules.py."""
    with contextlib.suppress(FewstepError):
        traced = plan(case.name, karras(edm(), 8), **case.options)
        return isinstance(traced, Plan) and traced.draws > 0
    return False


def _table(traced: Plan | EagerPlan) -> object:
    return traced.instructions if isinstance(traced, Plan) else traced.options


CASES = [case for entry in TRACED for case in variants(entry)]
