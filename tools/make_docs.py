"""Write docs/samplers.md, docs/schedulers.md and the table in docs/training.md, so that they say what the code does.

`python tools/make_docs.py` writes the pages; with `--check` it only says which differ, and then exits with status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.plan import Plan
from fewstep.process import vp_linear
from fewstep.registry import Entry, Option
from fewstep.samplers import SAMPLERS, SamplerEntry, plan
from fewstep.samplers.registry import Family
from fewstep.schedulers import SCHEDULERS, Grid, karras, make_grid
from fewstep.testing import measured_order
from fewstep.training import TrainingConfig
from fewstep.training.settings import GROUPS, settings_of

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTE = (
    "<!-- Written by tools/make_docs.py from the registry: change the code, then run it again. -->"
)
EXAMPLE_CALL_STEPS, EXAMPLE_LEVEL_STEPS = 10, 5
CONVERGES = 0.5
"""A measured order below this is none."""

SAMPLERS_INTRO = """\
# Samplers

A sampler decides how to move from one noise level to the next; a [scheduler](schedulers.md) decides which levels
there are. Every sampler runs on the levels of every scheduler and with every [model](models.md). The names of other
tools find them too; case, blanks, dashes and underscores do not matter. From Python and on the command line:

```python
import fewstep as fs

grid = fs.schedulers.karras(fs.process.vp_linear(), steps=10)
plan = fs.plan("unipc", grid, order=3)
assert fs.plan("DPM++ 2M", grid).sampler == "dpmpp_2m"
```

```text
fewstep sample digits --sampler unipc --sampler-option order=3
```

- *Order*: of convergence, with the default options, on steps of any sizes. Twice the steps divide the error by 2 to the
  power of the order, once steps are small. For a sampler that draws noise it is the error of averages, not that of a
  single picture. Some methods, marked with a dash, solve no equation, so more steps do not bring them nearer to
  anything.
- *Calls a step*: network calls for each step but the last; guidance's second half is not counted. Adaptive samplers
  take as many as the data need.
- *Draws noise*: with the default options. Without, the picture depends on the start alone.
- *Needs*: what a sampler asks of the model beyond an estimate of x_0.

`fewstep samplers` prints this list, `fewstep samplers NAME` one entry, and `--family`, `--order`, `--stochastic` and
`--deterministic` choose among them. A sampler of your own takes ten lines: see
[Plans](plans.md#a-sampler-of-your-own).
"""

FAMILIES: dict[Family, str] = {
    "ODE": "ODE: explicit methods without noise",
    "SDE": "SDE: explicit methods that draw noise",
    "implicit": "Predictor-correctors, and methods that can be run backwards exactly",
    "momentum": "Methods that smooth their steps",
    "adaptive": "Methods that choose their steps by the data",
    "distilled": "Methods for consistency and similar models",
}

MISTAKES_INTRO = """\
## Where public codes differ

A well-known name gives the result that it gives elsewhere, so that people get the picture they know. Where the formula
in public code is mistaken, the option `corrected` gives the method that the name promises:

```python
plan = fs.plan("dpmpp_3m", grid, corrected=True)
```

The orders are measured on data whose solution is known, with steps of two sizes in turn, by
`fewstep.testing.measured_order`; *none* means that it does not converge. Samplers that draw noise are also measured
without it.
"""

SCHEDULERS_INTRO = """\
# Schedulers

A scheduler decides which noise levels a [sampler](samplers.md) visits: n + 1 falling levels for n steps, the last one
clean data. From Python and on the command line:

```python
import fewstep as fs

process = fs.process.vp_linear()
print(fs.schedulers.karras(process, steps=5, rho=5.0))
grid = fs.schedulers.make_grid("DDIM uniform", process, steps=5)
assert grid.levels[-1].is_clean
```

```text
fewstep sample digits --scheduler karras --scheduler-option rho=5
```

In the formulas `T` is the number of entries of the training table (1000 for a process in continuous time), index 0
its least noisy entry, `n` the number of steps, and `i` counts from 0; `sigma_max` and `sigma_min` are the ends of the
process's range of `sigma / alpha`. *Between entries* says whether a scheduler visits fractional times of a table. The
levels shown are those for 5 steps on `vp_linear`.

![Levels of each scheduler](images/schedulers.png)

Every scheduler takes every process and every number of steps from 1 up, and its levels fall strictly:

- Formulas and tables in `sigma / alpha` mean the same `sigma / alpha` on every process, so a table made for Stable
  Diffusion starts at 14.6 on a process that goes up to 157. Levels outside the process's range, or twice on its end,
  are spread evenly in log_snr from the end of the range to the nearest level inside.
- Where indices are rounded to the same entry, the later one, seen from clean data, moves up to the next free entry.
  More steps than the table has entries are spread evenly over it.
- A process that starts at pure noise starts there; the curve goes on from one entry of the table below.
- Some names stand for a scheduler with other options: `sgm_uniform` is `normal` with `tail=cut`. Each entry lists
  its own.

`fewstep schedulers` prints this list and `fewstep schedulers NAME` one entry. For levels of your own see
[Sampling](sampling.md#levels-by-hand), for a scheduler of your own [Plans](plans.md#a-scheduler-of-your-own).
"""


def samplers_page() -> str:
    """The page on samplers: a table for each family, the mistakes, and a section for each sampler."""
    columns = ("name", "title", "family", "order", "calls a step", "draws noise", "needs")
    tables = []
    for family, title in FAMILIES.items():
        entries = [entry for entry in SAMPLERS if entry.family == family]
        tables += [f"### {title}\n", markdown_table(columns, map(_sampler_row, entries))]
    sections = (_section(entry, _sampler_facts(entry), "") for entry in SAMPLERS)
    return _page(SAMPLERS_INTRO, "\n".join([*tables, mistakes()]), sections)


def mistakes() -> str:
    """What is mistaken in public code, and the orders of both formulas."""
    columns = ("name", "what is mistaken", "options", "order as published", "order corrected")
    return f"{MISTAKES_INTRO}\n" + markdown_table(columns, _mistake_rows())


def _mistake_rows() -> Iterator[Sequence[object]]:
    for entry in SAMPLERS:
        if entry.mistake and not list(_mistaken(entry)):
            yield _link(entry), entry.mistake, "", "-", "-"
        for options in _mistaken(entry):
            yield (
                _link(entry),
                entry.mistake,
                _given(entry, options),
                *_both_orders(entry, options),
            )


def _both_orders(entry: SamplerEntry, options: Mapping[str, Any]) -> tuple[str, str]:
    return _measured(entry, options), _measured(entry, {**options, "corrected": True})


def _given(entry: SamplerEntry, options: Mapping[str, Any]) -> str:
    values = [f"`{name}={value}`" for name, value in options.items()]
    return ", ".join([*values, *["guidance off"] * ("guided pair" in entry.needs)])


def _mistaken(entry: SamplerEntry) -> Iterator[dict[str, Any]]:
    """The options to show a mistake with: the first name that it concerns, and that without noise."""
    if entry.eager or not entry.mistake:
        return
    names: tuple[Mapping[str, Any], ...] = ({}, *entry.presets.values())
    options = next((dict(given) for given in names if _differs(entry, given)), {})
    yield options
    if entry.stochastic and any(option.name == "eta" for option in entry.options):
        yield {**options, "eta": 0.0}


def _differs(entry: SamplerEntry, options: Mapping[str, Any]) -> bool:
    grid = karras(vp_linear(), EXAMPLE_CALL_STEPS)
    published, corrected = (
        plan(entry.name, grid, **{**options, "corrected": mended}) for mended in (False, True)
    )
    return (
        isinstance(published, Plan)
        and isinstance(corrected, Plan)
        and published.instructions != corrected.instructions
    )


@functools.cache
def _order(name: str, options: tuple[tuple[str, Any], ...]) -> float | None:
    return measured_order(name, **dict(options))


def _measured(entry: SamplerEntry, options: Mapping[str, Any]) -> str:
    """To one decimal, which no rounding of a computer changes."""
    order = _order(entry.name, tuple(options.items()))
    return "none" if order is None or order < CONVERGES else f"{order:.1f}"


def schedulers_page() -> str:
    """The page on schedulers."""
    columns = ("name", "title", "between entries", "options")
    table = markdown_table(columns, (_scheduler_row(entry) for entry in SCHEDULERS))
    sections = (_section(entry, (), _levels(entry)) for entry in SCHEDULERS)
    return _page(SCHEDULERS_INTRO, table, sections)


PAGES: dict[str, Callable[[], str]] = {
    "samplers.md": samplers_page,
    "schedulers.md": schedulers_page,
}


SETTINGS_BEGIN = "<!-- settings: written by tools/make_docs.py -->"
SETTINGS_END = "<!-- end of settings -->"


def training_page() -> str:
    """The page on training as it stands, with the table of settings between its marks renewed."""
    before, _, rest = (DOCS / "training.md").read_text(encoding="utf-8").partition(SETTINGS_BEGIN)
    after = rest.partition(SETTINGS_END)[2]
    return f"{before}{SETTINGS_BEGIN}\n\n{settings_table()}\n{SETTINGS_END}{after}"


def settings_table() -> str:
    """The settings of a training run by group, in the order of the command's help."""
    settings = settings_of(TrainingConfig)
    fields = {field.name: field for field in dataclasses.fields(TrainingConfig)}
    rows = [
        (
            _settings_name(name, fields[name]),
            _settings_default(fields[name]),
            setting.help,
            setting.advice,
        )
        for group in GROUPS
        for name, setting in settings.items()
        if setting.group == group
    ]
    return markdown_table(("setting", "default", "what it means", "sensible values"), rows)


def _settings_name(name: str, field: dataclasses.Field[Any]) -> str:
    needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    return f"`{name.upper()}`" if needed else f"`--{name.replace('_', '-')}`"


def _settings_default(field: dataclasses.Field[Any]) -> str:
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    if value is dataclasses.MISSING or value is None or value == {}:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        value = value["name"]
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


PAGES["training.md"] = training_page


def markdown_table(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; a vertical bar inside a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def description(function: Callable[..., object]) -> str:
    """The paragraphs of a docstring before its arguments, source or example."""
    text = inspect.getdoc(function) or ""
    return re.split(r"^(?:Args|Returns|Raises|Source|Attributes):|^>>>", text, flags=re.MULTILINE)[
        0
    ].strip()


def _page(intro: str, table: str, sections: Iterable[str]) -> str:
    return "\n".join([f"{NOTE}\n", intro, table, *sections])


def _section(entry: Entry, facts: Iterable[str], levels: str) -> str:
    parts = [f"## {entry.name}", f"**{entry.title}.** {description(entry.function)}"]
    parts.append("\n".join(f"- {fact}" for fact in (*facts, *_origin(entry))))
    parts += [block for block in (_options(entry), levels) if block]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _origin(entry: Entry) -> Iterator[str]:
    if entry.aliases:
        yield f"Also found as: {', '.join(f'`{alias}`' for alias in entry.aliases)}"
    for name, options in entry.presets.items():
        given = ", ".join(f"`{option}={value}`" for option, value in options.items())
        yield f"`{name}` is this with {given}"
    paper = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", entry.paper)
    yield f"Source: {paper}"


def _options(entry: Entry) -> str:
    if not entry.options:
        return ""
    columns = ("option", "type", "range", "default", "meaning")
    rows = (
        (f"`{o.name}`", _type(o), o.allowed, f"`{o.default}`", o.description)
        for o in entry.options
    )
    return markdown_table(columns, rows)


def _type(option: Option) -> str:
    return f"`{option.kind.__name__}`"


def _option_list(entry: Entry) -> str:
    return ", ".join(f"`{o.name}={o.default}`" for o in entry.options)


def _link(entry: Entry) -> str:
    return f"[`{entry.name}`](#{entry.name})"


def _sampler_row(entry: SamplerEntry) -> Sequence[object]:
    draws = "yes" if entry.stochastic else "no"
    calls = "as needed" if entry.adaptive else entry.calls_per_step
    facts = entry.family, entry.order or "-", calls, draws, ", ".join(entry.needs)
    return _link(entry), entry.title, *facts


def _sampler_facts(entry: SamplerEntry) -> Iterator[str]:
    yield f"{entry.family} of order {entry.order}" if entry.order else f"{entry.family}, no order"
    if not entry.eager and not entry.needs_training:
        traced = plan(entry.name, karras(vp_linear(), EXAMPLE_CALL_STEPS))
        if isinstance(traced, Plan):
            yield (
                f"{traced.calls} network calls and {traced.draws} draws of noise for {EXAMPLE_CALL_STEPS} "
                "steps, with the default options"
            )
    if entry.needs:
        yield f"Needs: {', '.join(entry.needs)}"
    if entry.mistake:
        yield f"Mistake: {entry.mistake}"
    for options in _mistaken(entry):
        published, corrected = _both_orders(entry, options)
        given = _given(entry, options)
        where = f" with {given}" if given else ""
        yield f"Measured order{where}: {published} as published, {corrected} corrected"


def _scheduler_row(entry: Entry) -> Sequence[object]:
    fractional = any(t % 1 for t in make_grid(entry.name, vp_linear(), 7).times)
    return _link(entry), entry.title, "yes" if fractional else "no", _option_list(entry)


def _levels(entry: Entry) -> str:
    grid: Grid = make_grid(entry.name, vp_linear(), EXAMPLE_LEVEL_STEPS)
    rows = (
        ("`t`", *(f"{t:.5g}" for t in grid.times)),
        ("`sigma / alpha`", *(f"{ratio:.4g}" for ratio in grid.ratios)),
    )
    return markdown_table(("level", *range(len(grid.levels))), rows)


def main() -> int:
    """Write the pages, or compare them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare, change nothing")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")
    arguments = parser.parse_args()
    status = 0
    for name, page in PAGES.items():
        path, text = arguments.docs / name, page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if arguments.check:
            print(f"{path} differs from the code; run: python tools/make_docs.py")
            status = 1
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
