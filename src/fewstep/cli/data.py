"""`fewstep data`: what a source of images holds, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from fewstep.cli.loading import load_with_progress, progress_lines, report_skipped
from fewstep.data import (
    ImageSet,
    check_images,
    evenly,
    labelled_sheet,
    save_image,
    write_npz,
)
from fewstep.errors import InvalidInputError

SHEET_CLASSES, SHEET_COLUMNS, SHEET_ROWS = 20, 10, 10
LISTED_CLASSES = 20
CAPTION_LENGTH = 60


def data(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder (sub-folders are classes), a tar archive, a folder of them or a pattern, an .npz file, "
            "or a name such as mnist-1000."
        ),
    ],
    size: Annotated[
        int | None,
        typer.Option(help="Edge of the square images in pixels; by default as they are."),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="1 (grey) or 3 (RGB); by default as they are.")
    ] = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    labels: Annotated[
        str | None, typer.Option(help="A CSV file with file_name and label or caption.")
    ] = None,
    cache: Annotated[
        str, typer.Option(help="Decoded images on disk: auto, off, or a folder.")
    ] = "auto",
    out: Annotated[
        str | None,
        typer.Option(help="Write the images as .npz, or a sheet of some of them as .png."),
    ] = None,
) -> None:
    """Load images, check them, and say what they are; exit status 1 if they cannot be trained on."""
    if out is not None and Path(out).suffix.lower() not in (".npz", ".png"):
        raise InvalidInputError(
            f"--out {out!r}; let the name end in .npz (all images) or .png (a sheet)"
        )
    images = load_with_progress(
        source, size=size, channels=channels, split=split, labels=labels, cache=cache
    )
    for line in _description(images):
        typer.echo(line)
    findings = check_images(images, progress_lines())
    for finding in findings:
        typer.echo(f"{finding.severity.capitalize()}: {finding.message}")
    report_skipped(images)
    if not findings:
        typer.echo("Nothing stands in the way of training on them.")
    if out is not None:
        _write(Path(out), images)
        typer.echo(f"Written: {out}")
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(1)


def _description(images: ImageSet) -> Iterator[str]:
    channels, height, width = images.shape
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    yield (
        f"{images.source}: {len(images)} images of {width}x{height}, {kind}; "
        f"{images.images.numel() / 2**20:.1f} MiB"
    )
    if images.labels is not None:
        inside = (images.labels >= 0) & (images.labels < images.num_classes)
        counts = torch.bincount(images.labels[inside], minlength=images.num_classes).tolist()
        listed = list(zip(images.class_names, counts, strict=True))[:LISTED_CLASSES]
        more = "" if images.num_classes <= LISTED_CLASSES else ", ..."
        named = ", ".join(f"{name} {count}" for name, count in listed)
        yield f"{images.num_classes} classes: {named}{more}"
    else:
        yield "no classes"
    count = sum(caption is not None for caption in images.captions)
    if count:
        first = next(caption for caption in images.captions if caption is not None)
        shown = first if len(first) <= CAPTION_LENGTH else first[:CAPTION_LENGTH] + "..."
        yield f"{count} captions, such as {shown!r}"


def _write(path: Path, images: ImageSet) -> None:
    if path.suffix.lower() == ".npz":
        write_npz(path, images)
        return
    save_image(path, labelled_sheet(_sheet_rows(images)))


def _sheet_rows(images: ImageSet) -> list[tuple[str, torch.Tensor]]:
    """A row for each class; without classes, images from all over the set."""
    if images.labels is None:
        shown = evenly(len(images), min(len(images), SHEET_ROWS * SHEET_COLUMNS))
        chosen = shown.split(SHEET_COLUMNS)
        return [(f"{int(rows[0])}...", images.images[rows]) for rows in chosen]
    rows = []
    for label, name in enumerate(images.class_names[:SHEET_CLASSES]):
        members = (images.labels == label).nonzero().flatten()[:SHEET_COLUMNS]
        if len(members):
            rows.append((name, images.images[members]))
    return rows
