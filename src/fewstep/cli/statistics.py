"""`fewstep statistics`: what DPM-Solver-v3 has to know of a model."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from fewstep.models import load
from fewstep.samplers.statistics import model_statistics


def statistics(
    model: Annotated[
        str,
        typer.Argument(help="A bundled model such as digits, a model folder, or a training run."),
    ],
    out: Annotated[str, typer.Option(help="The file to write.")] = "statistics.safetensors",
    n: Annotated[
        int, typer.Option("--n", min=2, help="Number of images; more are more exact.")
    ] = 64,
    levels: Annotated[int, typer.Option(min=3, help="Number of noise levels.")] = 120,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images.")] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images that go through the network together.")
    ] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps...")] = "cpu",
) -> None:
    """Take the statistics of a model for the sampler dpm_solver_v3."""
    trained = load(model, device=device)
    if trained.num_classes:
        labels = torch.arange(n, device=trained.device) % trained.num_classes
        trained = trained.with_conditions(labels=labels)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("noise levels", total=levels)
        taken = model_statistics(
            trained,
            trained.shape,
            n,
            seed=seed,
            levels=levels,
            batch_size=batch_size,
            on_level=lambda done, of: bar.update(task, completed=done),
        )
    taken.save(out)
    typer.echo(f"{taken}: {out}")
    typer.echo(
        f"Use them: fewstep sample {model} --sampler dpm_solver_v3 --sampler-option statistics={out}"
    )
