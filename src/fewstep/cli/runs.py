"""`fewstep runs`: what became of the training runs below a folder."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fewstep.errors import InvalidInputError, unknown_name

if TYPE_CHECKING:
    from fewstep.training.runs import RunSummary

FALLING = ("written", "step", "images_per_second", "seconds")
"""Sorted from the largest value; the others from the smallest."""

SORTS = (*FALLING, "name", "state", "loss", "error_unseen", "distance")
WIDE = 240


def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look, at any depth.")] = Path("runs"),
    sort: Annotated[str, typer.Option(help=f"What to sort by: {', '.join(SORTS)}.")] = "written",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List training runs: state, step, last loss and distance, speed, time, data, network, newest sheet."""
    from fewstep.training.runs import find_runs

    if sort not in SORTS:
        raise unknown_name("sort", sort, SORTS)
    if not folder.is_dir():
        raise InvalidInputError(
            f"there is no folder {folder}; give the folder that holds the runs of `fewstep train`"
        )
    found = _sorted(find_runs(folder), sort)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(run) for run in found], indent=2))
    elif found:
        _show(found)
    else:
        typer.echo(
            f"No runs below {folder}; begin one with: fewstep train DATA --out {folder}/first"
        )


def _sorted(found: list[RunSummary], key: str) -> list[RunSummary]:
    """Sort by a field; runs that do not say come last."""
    known = [run for run in found if getattr(run, key) is not None]
    known.sort(key=lambda run: getattr(run, key), reverse=key in FALLING)
    return known + [run for run in found if getattr(run, key) is None]


def _show(found: list[RunSummary]) -> None:
    """Print a table, without the columns that no run has anything to say in."""
    rows = [_cells(run) for run in found]
    titles = [title for title in rows[0] if any(row[title] for row in rows)]
    table = Table()
    for title in titles:
        table.add_column(title, no_wrap=True)
    for row in rows:
        table.add_row(*(row[title] or "-" for title in titles))
    # What is read by a program or a pager is not cut off at the width of some terminal.
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    for run in found:
        if run.sheet:
            typer.echo(f"{run.name}: {run.sheet}")


def _cells(run: RunSummary) -> dict[str, str]:
    return {
        "name": run.name,
        "state": run.state,
        "step": "" if run.step is None else f"{run.step}/{run.steps or '?'}",
        "loss": _figure(run.loss, ".4f"),
        "held out": _figure(run.error_unseen, ".4f"),
        "distance": _figure(run.distance, ".4g"),
        "images/s": _figure(run.images_per_second, ".0f"),
        "trained": "" if run.seconds is None else _clock(run.seconds),
        "written": ""
        if not run.written
        else time.strftime("%Y-%m-%d %H:%M", time.localtime(run.written)),
        "data": run.data or "",
        "network": run.network or "",
    }


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
