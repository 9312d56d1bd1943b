"""Write docs/samplers.md and docs/schedulers.md from the registries, so that they say what the code does.

`python tools/make_docs.py` writes the pages; with `--check` it only says which differ, and then exits with status 1.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fewstep.process import vp_linear
from fewstep.registry import Entry
from fewstep.samplers import SAMPLERS, SamplerEntry, plan
from fewstep.schedulers import SCHEDULERS, Grid, karras, make_grid

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTE = (
    "<!-- Written by tools/make_docs.py from the registry: change the code, then run it again. -->"
)
EXAMPLE_CALL_STEPS, EXAMPLE_LEVEL_STEPS = 10, 5

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

- *Order*: of convergence, with the default options. Twice the steps divide the error by 2 to the power of the order,
  once steps are small. For an SDE it is the error of averages, not that of a single picture.
- *Calls*: network calls for one picture; guidance's second half is not counted.
- *Draws*: draws of noise after the start. Without any, the picture depends on the start alone.

`fewstep samplers` prints this list and `fewstep samplers NAME` one entry. A sampler of your own takes ten lines: see
[Plans](plans.md#a-sampler-of-your-own).
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
its least noisy entry, `n` the number of steps, and `i` counts from 0. *Between entries* says whether a scheduler
visits fractional times of a table. The levels shown are those for 5 steps on `vp_linear`.

`fewstep schedulers` prints this list and `fewstep schedulers NAME` one entry. For levels of your own see
[Sampling](sampling.md#levels-by-hand), for a scheduler of your own [Plans](plans.md#a-scheduler-of-your-own).
"""


def samplers_page() -> str:
    """The page on samplers."""
    columns = ("name", "title", "family", "order", "calls a step", "draws noise", "options")
    table = markdown_table(columns, (_sampler_row(entry) for entry in SAMPLERS))
    sections = (_section(entry, _sampler_facts(entry), "") for entry in SAMPLERS)
    return _page(SAMPLERS_INTRO, table, sections)


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
    paper = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", entry.paper)
    yield f"Source: {paper}"


def _options(entry: Entry) -> str:
    if not entry.options:
        return ""
    rows = ((f"`{o.name}`", f"`{o.default}`", o.allowed, o.description) for o in entry.options)
    return markdown_table(("option", "default", "allowed", "meaning"), rows)


def _option_list(entry: Entry) -> str:
    return ", ".join(f"`{o.name}={o.default}`" for o in entry.options)


def _link(entry: Entry) -> str:
    return f"[`{entry.name}`](#{entry.name})"


def _sampler_row(entry: SamplerEntry) -> Sequence[object]:
    draws = "yes" if entry.stochastic else "no"
    facts = entry.family, entry.order, entry.calls_per_step, draws
    return _link(entry), entry.title, *facts, _option_list(entry)


def _sampler_facts(entry: SamplerEntry) -> Iterator[str]:
    traced = plan(entry.name, karras(vp_linear(), EXAMPLE_CALL_STEPS))
    yield f"{entry.family} of order {entry.order}"
    yield (
        f"{traced.calls} network calls and {traced.draws} draws of noise for {EXAMPLE_CALL_STEPS} "
        "steps, with the default options"
    )


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
            print(f"{path} differs from the registry; run: python tools/make_docs.py")
            status = 1
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
