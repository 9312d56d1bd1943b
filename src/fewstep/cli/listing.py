"""`fewstep samplers` and `fewstep schedulers`: what the registries know."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fewstep.registry import Entry
from fewstep.samplers import SAMPLERS, SamplerEntry
from fewstep.schedulers import SCHEDULERS

AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Words = Annotated[str, typer.Argument(help="Show the entries that contain this text, in detail.")]


def samplers(text: Words = "", as_json: AsJson = False) -> None:
    """List the samplers: order of convergence, network calls a step, options, papers."""
    _show("Samplers", _matching(SAMPLERS, text), bool(text), as_json)


def schedulers(text: Words = "", as_json: AsJson = False) -> None:
    """List the schedulers: which noise levels they visit, options, papers."""
    _show("Schedulers", _matching(SCHEDULERS, text), bool(text), as_json)


def described(entry: Entry) -> dict[str, Any]:
    """An entry's metadata as plain data."""
    row: dict[str, Any] = {"name": entry.name, "title": entry.title, "summary": entry.summary}
    if isinstance(entry, SamplerEntry):
        row |= {
            "family": entry.family,
            "order": entry.order,
            "calls_per_step": entry.calls_per_step,
            "stochastic": entry.stochastic,
        }
    options = [
        {"name": o.name, "default": o.default, "allowed": o.allowed, "description": o.description}
        for o in entry.options
    ]
    return {**row, "options": options, "aliases": list(entry.aliases), "paper": entry.paper}


def _matching(entries: Iterable[Entry], text: str) -> list[dict[str, Any]]:
    rows = [described(entry) for entry in entries]
    return [row for row in rows if text.lower() in json.dumps(row, ensure_ascii=False).lower()]


def _show(title: str, rows: list[dict[str, Any]], details: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    elif not rows:
        typer.echo(f"No entry of {title.lower()} contains that text; leave it out to see all")
    elif details:
        for row in rows:
            typer.echo(_details(row))
    else:
        columns = [
            name
            for name in ("name", "title", "family", "order", "calls_per_step")
            if name in rows[0]
        ]
        table = Table(*(name.replace("_", " ") for name in columns), "options", title=title)
        for row in rows:
            options = ", ".join(f"{o['name']}={o['default']}" for o in row["options"])
            table.add_row(*(str(row[name]) for name in columns), options)
        Console().print(table)
        typer.echo(f"Details of one: fewstep {title.lower()} NAME")


def _details(row: dict[str, Any]) -> str:
    lines = [f"{row['name']} ({row['title']})", f"  {row['summary']}"]
    lines += [
        f"  {name.replace('_', ' ')}: {row[name]}"
        for name in ("family", "order", "calls_per_step", "stochastic")
        if name in row
    ]
    lines += [
        f"  option {o['name']}={o['default']}: {o['description']} ({o['allowed']})"
        for o in row["options"]
    ]
    if row["aliases"]:
        lines.append(f"  also known as: {', '.join(row['aliases'])}")
    return "\n".join([*lines, f"  source: {row['paper']}"])
