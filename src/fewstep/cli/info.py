"""`fewstep info`: what a model is, how it was trained, which plans are tuned to it; and what networks cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from fewstep.cli.reading import json_object
from fewstep.errors import InvalidInputError
from fewstep.models import WEIGHT_FILES, Model, load
from fewstep.tuned import TunedPlan, guidance_text, plans_of

SHOWN = 60
"""Characters of an option of the process that are shown; a table of betas is longer."""


def info(
    model: Annotated[
        str | None,
        typer.Argument(help="A bundled model such as digits, a model folder, or a training run."),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="In place of a model: tell what a preset costs, or all of them with 'all'.",
            rich_help_panel="Network",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Edge of the images; by default what the preset is made for.",
            rich_help_panel="Network",
        ),
    ] = None,
    network_options: Annotated[
        str,
        typer.Option(
            help="What differs from the preset, as JSON: '{\"channels\": [32, 64]}'.",
            rich_help_panel="Network",
        ),
    ] = "{}",
    batch_size: Annotated[
        int, typer.Option(help="Images in a batch.", rich_help_panel="Network")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Tell what a model is, its process, network, training and tuned plans; or what a network costs."""
    if (model is None) == (network is None):
        raise InvalidInputError(
            "give either a model, such as digits, or --network with a preset, such as --network small"
        )
    if model is None:
        assert network is not None
        from fewstep.cli.network_cost import show_networks  # for it needs much more of torch

        options = json_object("--network-options", network_options)
        show_networks(network, size, options, batch_size, as_json)
        return
    facts = described(load(model))
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False))
        return
    table = Table(show_header=False, title="Model")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    used = [plan for plan in facts["plans"] if not plan["fault"]]
    if used:
        typer.echo(f"Plans tuned to it, in {Path(used[0]['file']).parent}:")
        console.print(_plans(used))
    else:
        typer.echo(f"No plan is tuned to it; make one with: fewstep tune {model} --steps 5")
    for plan in facts["plans"]:
        if plan["fault"]:
            typer.echo(f"not used: {plan['file']}: {plan['fault']}")


def described(model: Model) -> dict[str, Any]:
    """A loaded model as plain data."""
    config, process = model.config.to_dict(), model.process
    assert model.folder is not None and isinstance(model.network, nn.Module)
    return {
        "name": model.name,
        "folder": str(model.folder),
        "shape": list(model.shape),
        "class_names": list(model.class_names),
        "predicts": config["predicts"],
        "process": config["process"],
        "sigma_over_alpha": [_plain(process.least_noisy.ratio), _plain(process.noisiest.ratio)],
        "network": config["network"],
        "parameters": sum(weight.numel() for weight in model.network.parameters()),
        "bytes": (model.folder / WEIGHT_FILES["ema"]).stat().st_size,
        "training": config["training"],
        "recommended": config["recommended"],
        "plans": [_plan(entry) for entry in plans_of(model)],
    }


def _plan(entry: TunedPlan) -> dict[str, Any]:
    purpose = entry.purpose
    return {
        "calls": entry.plan and entry.plan.calls,
        "guidance": purpose and purpose.guidance,
        "method": purpose and purpose.method,
        "error": purpose and purpose.error,
        "start": purpose and purpose.start,
        "start_error": purpose and purpose.start_error,
        "gain": purpose and _plain(purpose.gain),
        "file": str(entry.file),
        "fault": entry.fault,
    }


def _rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    channels, height, width = facts["shape"]
    yield "name", facts["name"] or "-"
    yield "folder", facts["folder"]
    yield "images", f"{channels} x {height} x {width} (channels, height, width)"
    names = facts["class_names"]
    yield "classes", f"{len(names)}: {', '.join(names)}" if names else "none"
    yield "predicts", facts["predicts"]
    yield "process", _process(facts["process"])
    low, high = facts["sigma_over_alpha"]
    yield "sigma / alpha", f"{float(low):.6g} .. {float(high):.6g}"
    yield "network", f"{facts['network']['class']}, {facts['parameters']:,} parameters"
    yield "weights", f"{facts['bytes'] / 1e6:.1f} MB on disk"
    yield "training", _training(facts["training"]) or "not recorded"
    yield "recommended", ", ".join(_options(facts["recommended"])) or "none"


def _process(process: Mapping[str, Any]) -> str:
    options = {name: value for name, value in process.items() if name != "name"}
    return f"{process['name']} ({', '.join(_options(options))})" if options else process["name"]


def _options(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        text = str(value)
        yield f"{name}={text if len(text) <= SHOWN else text[:SHOWN] + '...'}"


def _training(record: Mapping[str, Any]) -> str:
    """The record of the training in words; it may hold anything, since users write it too."""
    data = record.get("data")
    source = data.get("source") if isinstance(data, dict) else None
    told = {"step": "step {}", "images_seen": "{} images seen", "seconds": "{} seconds"}
    parts = [text.format(_number(record[key])) for key, text in told.items() if key in record]
    return ", ".join([*parts, *([f"on {source}"] if source else [])])


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _plans(plans: Iterable[Mapping[str, Any]]) -> Table:
    table = Table()
    for column in ("calls", "guidance", "found by", "distance", "best untuned", "gain", "file"):
        table.add_column(column, overflow="fold")
    for plan in plans:
        table.add_row(
            str(plan["calls"]),
            guidance_text(plan["guidance"]),
            plan["method"],
            f"{plan['error']:.4f}",
            f"{plan['start_error']:.4f} {plan['start']}",
            f"{float(plan['gain']):.2f}",
            Path(plan["file"]).name,
        )
    return table


def _plain(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else str(value)
