"""`fewstep samplers` and `fewstep schedulers`: what the registries know."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from fewstep.errors import unknown_name
from fewstep.registry import Entry, Option
from fewstep.samplers import SAMPLERS, SamplerEntry
from fewstep.samplers.registry import Family
from fewstep.schedulers import SCHEDULERS

AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Words = Annotated[str, typer.Argument(help="Show the entries that contain this text, in detail.")]
FAMILIES: tuple[str, ...] = get_args(Family)


def samplers(
    text: Words = "",
    family: Annotated[
        str, typer.Option(help=f"Show one family alone: {', '.join(FAMILIES)}.")
    ] = "",
    order: Annotated[
        int | None,
        typer.Option(
            min=0, help="Show those of this order; 0: of none, as they solve no equation."
        ),
    ] = None,
    stochastic: Annotated[
        bool | None,
        typer.Option(
            "--stochastic/--deterministic",
            help="Show those that draw noise, or those that do not.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the samplers: family, order of convergence, network calls a step, noise, needs, options, papers."""
    wanted = _family(family)
    found = [
        entry
        for entry in SAMPLERS
        if wanted in ("", entry.family)
        and order in (None, entry.order)
        and stochastic in (None, entry.stochastic)
    ]
    rows = _matching(found, text)
    if not as_json and not text and rows:
        columns = ("name", "title", "family", "order", "calls a step", "noise", "needs")
        _table("Samplers", columns, map(_sampler_cells, sorted(rows, key=_rank)))
        for line in _presets(rows):
            typer.echo(line)
    else:
        _show("samplers", rows, as_json)


def schedulers(text: Words = "", as_json: AsJson = False) -> None:
    """List the schedulers: which noise levels they visit, options, papers."""
    rows = _matching(SCHEDULERS, text)
    if not as_json and not text:
        cells = [(row["name"], row["title"], _defaults(row)) for row in rows]
        _table("Schedulers", ("name", "title", "options"), cells)
        for line in _presets(rows):
            typer.echo(line)
    else:
        _show("schedulers", rows, as_json)


def described(entry: Entry) -> dict[str, Any]:
    """An entry's metadata as plain data."""
    row: dict[str, Any] = {"name": entry.name, "title": entry.title, "summary": entry.summary}
    if isinstance(entry, SamplerEntry):
        row |= {
            "family": entry.family,
            "order": entry.order,
            "corrected_order": entry.corrected_order,
            "mistake": entry.mistake,
            "calls_per_step": entry.calls_per_step,
            "stochastic": entry.stochastic,
            "needs": list(entry.needs),
            "adaptive": entry.adaptive,
        }
    return {
        **row,
        "options": [_option(option) for option in entry.options],
        "aliases": list(entry.aliases),
        "presets": {name: dict(options) for name, options in entry.presets.items()},
        "paper": entry.paper,
    }


def _option(option: Option) -> dict[str, Any]:
    return {
        "name": option.name,
        "type": option.kind.__name__,
        "default": _plain(option.default),
        "low": _plain(option.low),
        "high": _plain(option.high),
        "choices": list(option.choices),
        "allowed": option.allowed,
        "description": option.description,
    }


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _family(name: str) -> str:
    """The family of that name, in whatever case; "" for all."""
    by_key = {family.lower(): family for family in FAMILIES}
    if name and name.lower() not in by_key:
        raise unknown_name("family", name, FAMILIES)
    return by_key.get(name.lower(), "")


def _matching(entries: Iterable[Entry], text: str) -> list[dict[str, Any]]:
    rows = [described(entry) for entry in entries]
    return [row for row in rows if text.lower() in json.dumps(row, ensure_ascii=False).lower()]


def _show(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False))
    elif rows:
        typer.echo("\n".join(_details(row) for row in rows))
    else:
        typer.echo(f"No entry of {title} matches; see all with: fewstep {title}")


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(title=title)
    for k, column in enumerate(columns):
        table.add_column(column, no_wrap=k == 0)  # a name that is cut off finds nothing
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)
    typer.echo(f"Details of one: fewstep {title.lower()} NAME")


def _rank(row: Mapping[str, Any]) -> int:
    return FAMILIES.index(row["family"])


def _sampler_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    noise = "yes" if row["stochastic"] else "no"
    needs = ", ".join(row["needs"])
    return (
        row["name"],
        row["title"],
        row["family"],
        _order(row),
        str(row["calls_per_step"]),
        noise,
        needs,
    )


def _order(row: Mapping[str, Any]) -> str:
    order = str(row["order"] or "-")
    mended = row["corrected_order"]
    return f"{order} ({mended} corrected)" if mended not in (None, row["order"]) else order


def _presets(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Lines such as `uni_pc_bh2 = unipc variant=bh2`."""
    for row in rows:
        for name, options in row["presets"].items():
            given = " ".join(f"{option}={value}" for option, value in options.items())
            yield f"{name} = {row['name']} {given}"


def _defaults(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{o['name']}={o['default']}" for o in row["options"])


def _details(row: Mapping[str, Any]) -> str:
    lines = [f"{row['name']} ({row['title']})", f"  {row['summary']}"]
    if "family" in row:
        noise = "draws noise" if row["stochastic"] else "draws no noise"
        calls = "as the data need" if row["adaptive"] else row["calls_per_step"]
        lines.append(
            f"  family: {row['family']}, order: {_order(row)}, calls a step: {calls}, {noise}"
        )
        lines += [f"  needs: {', '.join(row['needs'])}"] * bool(row["needs"])
        lines += [f"  mistake: {row['mistake']}; corrected=true mends it"] * bool(row["mistake"])
    lines += [
        f"  option {o['name']}={o['default']}: {o['description']} ({o['allowed']})"
        for o in row["options"]
    ]
    if row["aliases"]:
        lines.append(f"  also known as: {', '.join(row['aliases'])}")
    lines += [f"  preset {line}" for line in _presets([row])]
    return "\n".join([*lines, f"  source: {row['paper']}"])
