"""The commands and their names."""

from __future__ import annotations

from typing import Annotated

import typer

from fewstep import __version__
from fewstep.cli.average import average
from fewstep.cli.data import data
from fewstep.cli.demo import demo
from fewstep.cli.doctor import doctor
from fewstep.cli.evaluate import evaluate
from fewstep.cli.export import export
from fewstep.cli.importing import import_model
from fewstep.cli.info import info
from fewstep.cli.listing import samplers, schedulers
from fewstep.cli.runs import runs
from fewstep.cli.sample import sample
from fewstep.cli.statistics import statistics
from fewstep.cli.train import train
from fewstep.cli.tune import tune

app = typer.Typer(
    name="fewstep",
    help="Train diffusion models, and sample them in as few network calls as the mathematics allows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fewstep {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options before the command."""


for command in (
    sample,
    train,
    average,
    runs,
    tune,
    data,
    evaluate,
    info,
    export,
    statistics,
    demo,
    samplers,
    schedulers,
    doctor,
):
    app.command()(command)
app.command("import")(import_model)
