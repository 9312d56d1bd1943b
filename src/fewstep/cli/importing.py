"""`fewstep import`: a checkpoint of another code as a model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from fewstep.cli.folders import not_taken
from fewstep.cli.reading import json_object
from fewstep.integrations import NullClass, Weights, import_checkpoint
from fewstep.models import Model
from fewstep.networks import presets

SET_BY_TRAINING = (
    "in_channels",
    "out_channels",
    "num_classes",
    "context_width",
    "augment_width",
    "time_scale",
)
"""Options of a network that follow from images and process."""


def import_model(
    source: Annotated[
        str,
        typer.Argument(
            help="A pipeline folder of diffusers, the folder of a UNet2DModel, or a file of DDPM's networks in PyTorch."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    name: Annotated[str, typer.Option(help="What to call it; by default as the source.")] = "",
    weights: Annotated[
        Weights,
        typer.Option(help="Which weights to take, if there are two sets: averaged or raw."),
    ] = "ema",
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Edge of the images in pixels; by default what the source says."),
    ] = None,
    process: Annotated[
        str | None,
        typer.Option(help="Its process, if the source tells none: a name, or JSON with options."),
    ] = None,
    predicts: Annotated[
        str | None,
        typer.Option(help="What it predicts, if the source does not tell: noise, data, velocity."),
    ] = None,
    null_class: Annotated[
        NullClass | None,
        typer.Option(
            help="For networks with classes: the last of them means 'no class', or add the mean of all for that."
        ),
    ] = None,
) -> None:
    """Turn a checkpoint of another code into a model that sample, tune and train --start-from take."""
    not_taken(out)
    model = import_checkpoint(
        source,
        name=name,
        weights=weights,
        size=size,
        process=None if process is None else _process(process),
        predicts=predicts,
        null_class=null_class,
    )
    model.save(out)
    _tell(model)
    typer.echo(f"Written: {out}. Use it: fewstep sample {out} --n 16 --out grid.png")
    typer.echo(f"Train it further: {_further(model, out)}")


def _process(text: str) -> dict[str, Any]:
    """Read a process, by name or as JSON."""
    return json_object("--process", text) if text.lstrip().startswith("{") else {"name": text}


def _further(model: Model, out: Path) -> str:
    """The command that trains the model further: only on the same options do its weights compute the same."""
    options = model.config.network.to_dict()
    differing = {
        name: {
            field: value
            for field, value in options.items()
            if value != preset.config.to_dict()[field] and field not in SET_BY_TRAINING
        }
        for name, preset in presets().items()
        if type(preset.config) is type(model.config.network)
    }
    nearest = min(differing, key=lambda name: len(differing[name]))
    words = ["fewstep", "train", "IMAGES", "--start-from", str(out), "--network", nearest]
    if differing[nearest]:
        words += ["--network-options", json.dumps(differing[nearest])]
    words += ["--predicts", model.config.predicts]
    process = dict(model.config.process)
    if "betas" not in process:  # a table does not fit on a line
        words += ["--process", json.dumps(process)]
    return shlex.join(words)


def _tell(model: Model) -> None:
    """Print what was found, and what was taken for granted."""
    assert isinstance(model.network, nn.Module)
    record, network = model.config.training["imported"], model.config.network
    count = sum(weight.numel() for weight in model.network.parameters())
    channels, height, width = model.shape
    rows = {
        "found": record["kind"],
        "weights": record["weights"],
        "network": f"{network.kind}, {count:,} parameters",
        "images": f"{channels} x {height} x {width}",
        "classes": str(model.num_classes or "none"),
        "process": f"{model.process.name}, {model.process.training_steps} steps",
        "predicts": model.config.predicts,
    }
    for title, value in rows.items():
        typer.echo(f"{title:<10}{value}")
    for assumption in record["assumed"]:
        typer.echo(f"Taken for granted: {assumption}")
