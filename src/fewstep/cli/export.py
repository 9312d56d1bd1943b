"""`fewstep export`: the levels of a plan, or a whole model, for another program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from fewstep.cli.folders import not_taken
from fewstep.errors import InvalidInputError
from fewstep.integrations import export_pipeline, export_sigmas
from fewstep.models import load
from fewstep.plan import Plan


def export(
    what: Annotated[
        str,
        typer.Argument(
            help="A file with a plan, as fewstep tune writes it; for diffusers-pipeline a model."
        ),
    ],
    to: Annotated[
        Literal["comfyui", "diffusers", "k-diffusion", "diffusers-pipeline"],
        typer.Option(help="The program that is to run it."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write, for diffusers-pipeline.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Weights of a model: ema, raw or one of its further averages.")
    ] = "ema",
) -> None:
    """Print a plan for another program, as JSON; or write a model as a pipeline folder of diffusers."""
    if to == "diffusers-pipeline":
        if out is None:
            raise InvalidInputError("--to diffusers-pipeline writes a folder; give it with --out")
        notes = export_pipeline(load(what, weights=weights), not_taken(out))
        typer.echo(f"Written: {out}. Use it: diffusers.DDIMPipeline.from_pretrained({str(out)!r})")
    else:
        if out is not None:
            raise InvalidInputError(f"--to {to} prints a plan; leave out --out, and use > FILE")
        told = export_sigmas(Plan.from_json(Path(what)), to)
        typer.echo(json.dumps(told, indent=2, allow_nan=False))
        notes = told["notes"]
    for note in notes:
        typer.echo(f"Note: {note}", err=True)
