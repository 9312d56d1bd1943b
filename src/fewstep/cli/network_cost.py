"""The tables of `fewstep info --network`: parameters, operations and memory of networks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from fewstep.errors import InvalidInputError, unknown_name
from fewstep.networks import class_of, presets
from fewstep.networks.cost import NetworkCost, cost

ALL = "all"


def show_networks(
    name: str, size: int | None, options: Mapping[str, Any], batch_size: int, as_json: bool
) -> None:
    """Print what a preset costs, part by part, or one line for each preset.

    Raises:
        InvalidInputError: An unknown preset or option, or a value out of range.
    """
    known = presets()
    if name != ALL and name not in known:
        raise unknown_name("preset", name, [*known, ALL])
    if min(batch_size, 1 if size is None else size) < 1:
        raise InvalidInputError(
            f"size = {size} and batch_size = {batch_size} are not allowed; give numbers of at least 1"
        )
    if name == ALL and options:
        raise InvalidInputError("--network-options go with one preset; name it with --network")
    chosen = known if name == ALL else {name: known[name]}
    configs = {preset: entry.config.replace(**options) for preset, entry in chosen.items()}
    costs = {
        preset: cost(config, size or known[preset].size, batch_size)
        for preset, config in configs.items()
    }
    if as_json:
        facts = {
            preset: {"class": class_of(configs[preset]), **dataclasses.asdict(each)}
            for preset, each in costs.items()
        }
        typer.echo(json.dumps(facts if name == ALL else facts[name], indent=2))
        return
    console = Console()
    if name == ALL:
        console.print(_overview(costs))
        typer.echo("training: GFLOP of a step; checkp.: MB with checkpoint_activations.")
    else:
        console.print(_parts(name, costs[name]))
        typer.echo(_totals(costs[name]))
    typer.echo(
        "GFLOP: 10^9 operations of convolutions and matrix products, a multiplication and an addition being two. "
        "MB: 10^6 bytes kept for the gradient in float32; half as many in bfloat16."
    )


def _overview(costs: Mapping[str, NetworkCost]) -> Table:
    table = Table()
    table.add_column("preset", no_wrap=True)
    for column in ("images", "parameters", "GFLOP", "training", "MB", "checkp."):
        table.add_column(column, justify="right", overflow="fold")
    for name, each in costs.items():
        table.add_row(
            name,
            _images(each),
            f"{each.parameters / 1e6:.1f}M",
            f"{each.flops / 1e9:.2f}",
            f"{each.training_flops / 1e9:.2f}",
            f"{each.memory / 1e6:.1f}",
            f"{each.checkpointed_memory / 1e6:.1f}",
        )
    return table


def _parts(name: str, network: NetworkCost) -> Table:
    table = Table(title=f"{name}, {_images(network)}")
    table.add_column("part", no_wrap=True)
    for column in ("layers", "output", "parameters", "GFLOP", "MB"):
        table.add_column(column, justify="right", overflow="fold")
    for part in network.parts:
        table.add_row(
            part.name,
            str(part.layers),
            "x".join(map(str, part.shape)),
            f"{part.parameters:,}",
            f"{part.flops / 1e9:.3f}",
            f"{part.memory / 1e6:.2f}",
        )
    return table


def _totals(network: NetworkCost) -> str:
    return (
        f"{network.parameters:,} parameters; forward {network.flops / 1e9:.2f} GFLOP, training "
        f"{network.training_flops / 1e9:.2f} GFLOP; kept for the gradient {network.memory / 1e6:.1f} MB, with "
        f"checkpoint_activations {network.checkpointed_memory / 1e6:.1f} MB"
    )


def _images(network: NetworkCost) -> str:
    return "x".join(map(str, (network.batch_size, *network.shape)))
