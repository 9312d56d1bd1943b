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
Words = Annotated[str, typer.Argument(help="Show only entries that contain this text.")]


def samplers(text: Words = "", as_json: AsJson = False) -> None:
    """List the samplers: order of convergence, network calls a step, options, papers."""
    _show("Samplers", _matching(SAMPLERS, text), as_json)


def schedulers(text: Words = "", as_json: AsJson = False) -> None:
    """List the schedulers: which noise levels they visit, options, papers."""
    _show("Schedulers", _matching(SCHEDULERS, text), as_json)


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


def _show(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    columns = [name for name in rows[0] if name not in ("aliases", "stochastic")] if rows else ["name"]
    table = Table(title=title)
    for name in columns:
        table.add_column(name.replace("_", " "), no_wrap=name == "name")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return "\n".join(f"{o['name']}={o['default']} ({o['allowed']})" for o in value)
