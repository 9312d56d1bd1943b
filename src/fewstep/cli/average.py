"""`fewstep average`: which of a run's averages is best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.folders import not_taken
from fewstep.errors import InvalidInputError
from fewstep.models import load


def average(
    run: Annotated[str, typer.Argument(help="A training run or one of its checkpoints.")],
    data: Annotated[
        str, typer.Option(help="Images that the run was not trained on: folder, .npz or name.")
    ],
    n: Annotated[int, typer.Option("--n", min=1, help="Use the first so many images.")] = 256,
    levels: Annotated[int, typer.Option(min=1, help="Noise levels for each image.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the best weights as a model folder.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps...")] = "cpu",
) -> None:
    """Measure the loss of each average of a run on other images, and say which is best."""
    from fewstep.data import load_images
    from fewstep.training import choose_average, held_out_loss

    if out is not None:
        not_taken(out)
    shape = load(run).shape
    images = load_images(data, size=shape[-1], channels=shape[0])
    if images.shape != shape:
        raise InvalidInputError(
            f"the images of {data} have the shape {images.shape}, the model {shape}; give images of the same kind"
        )
    x0, labels = images.batch(range(min(n, len(images))))

    def measure(model) -> float:
        known = labels if model.num_classes and model.num_classes == images.num_classes else None
        return held_out_loss(model, x0, known, levels=levels, seed=seed)

    choice = choose_average(run, measure, device)
    for name, figure in choice.measured.items():
        typer.echo(f"{name:<16} {figure:.6f}")
    typer.echo(f"Best: {choice.best}. Use it: fewstep sample {run} --weights {choice.best}")
    if out is not None:
        load(run, weights=choice.best).save(out)
        typer.echo(f"Written as a model: {out}")
