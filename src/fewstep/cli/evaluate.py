"""`fewstep evaluate`: what a model does to images that it saw and to others, and whether its samples are copies."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from fewstep.checkpoints import require_folder, save_json
from fewstep.cli.loading import load_with_progress
from fewstep.data import ImageSet, evenly, save_image, to_uint8
from fewstep.errors import InvalidInputError
from fewstep.metrics import (
    COPY_RATIO,
    LevelLoss,
    loss_by_level,
    nearest_images,
)
from fewstep.models import Model, load
from fewstep.sampling import sample
from fewstep.training.bound import variational_bound
from fewstep.training.held_out import split_rows
from fewstep.training.measuring import REFERENCE_IMAGES, Ruler

BOUND_LEVELS = 20
"""Levels that the variational bound is estimated from."""


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A bundled model, a model folder, or a training run.")
    ],
    data: Annotated[str, typer.Option(help="The images that the model was trained on.")],
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Images that it was not trained on; by default those that its run kept away, if any."
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, help="Samples, and images to measure on.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 20,
    levels: Annotated[int, typer.Option(min=1, help="Noise levels.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of samples and noise.")] = 0,
    weights: Annotated[str, typer.Option(help="ema (averaged) or raw.")] = "ema",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("evaluation"),
) -> None:
    """Measure the loss by noise level, the bound on the likelihood, the share of copies among samples, a distance."""
    require_folder(out)
    trained = load(model, device=device, weights=weights)
    images = _load(trained, data)
    others = None if held_out is None else _load(trained, held_out)
    rows, unseen = _sets(trained, images, others, max(n, REFERENCE_IMAGES))
    seen = images if rows is None else _some(images, rows, max(n, REFERENCE_IMAGES))
    count = min(n, len(seen), len(unseen) if unseen is not None else n)
    if count < 2:
        raise InvalidInputError(
            f"{count} images to measure on; give at least 2 with --data and --held-out"
        )
    errors = {"training": _errors(trained, seen, count, levels, seed)}
    if unseen is not None:
        errors["held out"] = _errors(trained, unseen, count, levels, seed)
    typer.echo(_table(errors, count))
    parts = {"training": seen} | ({} if unseen is None else {"held out": unseen})
    bits = {kind: _bits(trained, part, count, seed) for kind, part in parts.items()}
    typer.echo(
        f"Variational bound, bits per dimension, from {BOUND_LEVELS} levels: "
        + ", ".join(f"{kind} {value:.3f}" for kind, value in bits.items())
    )
    samples = sample(
        trained, n, steps=steps, seed=seed, labels=_sample_labels(trained, seen, n)
    ).images.clamp(-1, 1)
    found = nearest_images(samples, images, rows)
    record: dict[str, Any] = {
        "model": trained.name,
        "data": images.source,
        "images": count,
        "samples": n,
        "steps": steps,
        "seed": seed,
        "losses": {kind: [dataclasses.asdict(loss) for loss in e] for kind, e in errors.items()},
        "bits per dimension": bits,
        "copies": {
            "share": found.copies,
            "ratio below": COPY_RATIO,
            "median ratio": found.ratios.median().item(),
            "typical distance": found.typical,
        },
    }
    typer.echo(
        f"Copies: {found.copies:.0%} of {n} samples are nearer to a training image than {COPY_RATIO:g} of the usual "
        f"distance between training images; median ratio {found.ratios.median():.2f}"
    )
    if unseen is not None:
        real = nearest_images(unseen.batch(evenly(len(unseen), count))[0], images, rows)
        record["copies"]["share of held-out images"] = real.copies
        record["copies"]["median ratio of held-out images"] = real.ratios.median().item()
        typer.echo(
            f"  the same of {count} held-out images: {real.copies:.0%}, median ratio {real.ratios.median():.2f}"
        )
    ruler = Ruler(seen, 2, "training images")
    real_images = seen if unseen is None else unseen
    distances = {
        "samples": ruler.distance(to_uint8(samples)),
        "real images": ruler.distance(real_images.images[evenly(len(real_images), count)]),
    }
    record["distance"] = {"in": ruler.name, **distances}
    typer.echo(
        f"Fréchet distance to the training images in {ruler.name} features: {distances['samples']:.3g} of {n} samples, "
        f"{distances['real images']:.3g} of {count} {'training' if unseen is None else 'held-out'} images"
    )
    save_image(out / "neighbours.png", found.sheet(images), {"model": trained.name, "seed": seed})
    save_json(out / "evaluation.json", _without_nan(record))
    typer.echo(f"Written: {out / 'evaluation.json'}, {out / 'neighbours.png'}")


def _load(model: Model, source: str) -> ImageSet:
    """The images at the model's own size; as in training, files keep their shape if it is the model's already."""
    channels, height, width = model.shape
    size = height if height == width else None
    images = load_with_progress(source, size=size, channels=channels)
    if images.shape != model.shape:
        raise InvalidInputError(
            f"the images of {source} are {images.shape[2]}x{images.shape[1]}, the model's {width}x{height}; give "
            "the images that it was trained on"
        )
    return images


def _sets(
    model: Model, images: ImageSet, others: ImageSet | None, most: int
) -> tuple[Tensor | None, ImageSet | None]:
    """The numbers of the images trained on, None for all, and others: those given, or at most so many kept away."""
    settings: Mapping[str, Any] = model.config.training.get("settings", {})
    share = settings.get("held_out", 0.0)
    same = model.config.training.get("data", {}).get("digest") == images.digest
    if others is not None or not share or not same:
        return None, others
    seen, unseen = split_rows(len(images), share, settings.get("seed", 0))
    return seen, _some(images, unseen, most)


def _some(images: ImageSet, rows: Tensor, most: int) -> ImageSet:
    """At most so many of the images with these numbers, spread evenly; they alone are copied into memory."""
    return images.subset(rows[evenly(len(rows), min(most, len(rows)))])


def _errors(model: Model, images: ImageSet, count: int, levels: int, seed: int) -> list[LevelLoss]:
    return loss_by_level(model, *_shown(model, images, count), levels=levels, seed=seed)


def _bits(model: Model, images: ImageSet, count: int, seed: int) -> float:
    x0, labels = _shown(model, images, count)
    conditions: dict[str, Any] = {} if labels is None else {"labels": labels}
    return variational_bound(model, x0, levels=BOUND_LEVELS, seed=seed, **conditions).total


def _shown(model: Model, images: ImageSet, count: int) -> tuple[Tensor, Tensor | None]:
    """So many images spread over the set, with their labels if these are the model's classes."""
    x0, labels = images.batch(evenly(len(images), count))
    known = model.num_classes and images.class_names == model.class_names
    return x0, labels if known else None


def _sample_labels(model: Model, images: ImageSet, n: int) -> list[int] | None:
    """Classes in the proportions of the data."""
    if not model.num_classes:
        return None
    if images.labels is None or images.class_names != model.class_names:
        return [k % model.num_classes for k in range(n)]
    return images.labels[evenly(len(images), n)].tolist()


def _table(errors: Mapping[str, list[LevelLoss]], count: int) -> str:
    """The error in the noise by level, side by side, and their gap in standard errors."""
    lines = [f"Error in the noise, squared, per pixel; {count} images of each kind"]
    kinds = list(errors)
    gap = len(kinds) == 2
    heads = ["log snr", *kinds] + (["gap", "+-"] if gap else ["+-"])
    lines.append("  ".join(f"{head:>9}" for head in heads))
    for row in zip(*errors.values(), strict=True):
        cells = [row[0].log_snr, *(loss.noise_error for loss in row)]
        if gap:
            cells.append(row[1].noise_error - row[0].noise_error)
        cells.append(math.hypot(*(loss.uncertainty for loss in row)))
        lines.append("  ".join(f"{cell:9.4f}" for cell in cells))
    means = [sum(loss.noise_error for loss in e) / len(e) for e in errors.values()]
    if gap:
        means.append(means[1] - means[0])
    lines.append("  ".join([f"{'mean':>9}", *(f"{mean:9.4f}" for mean in means)]))
    return "\n".join(lines)


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON can hold it: what is not finite becomes null."""
    return json.loads(json.dumps(record), parse_constant=lambda _: None)
