"""`fewstep export`: the levels of a plan for another program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fewstep.integrations import Program, export_sigmas
from fewstep.plan import Plan


def export(
    plan: Annotated[Path, typer.Argument(help="A file with a plan, as fewstep tune writes it.")],
    to: Annotated[Program, typer.Option(help="The program that is to run it.")],
) -> None:
    """Print a plan for another program, as JSON: which sampler, and the list of sigmas to give it."""
    told = export_sigmas(Plan.from_json(plan), to)
    typer.echo(json.dumps(told, indent=2, allow_nan=False))
    for note in told["notes"]:
        typer.echo(f"Note: {note}", err=True)
