"""Loading images with a word on the way, and what is said of those that were left out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from fewstep.cli.launched import Seldom
from fewstep.data import ImageSet, OnProgress, load_images
from fewstep.errors import DataError

QUIET_SECONDS = 3.0
SHOWN = 3
SKIPPED_FILE = "skipped.txt"


def load_with_progress(source: str, **options: Any) -> ImageSet:
    """Call `load_images`; on standard error, say every few seconds how far it is."""
    return load_images(source, on_progress=progress_lines(), **options)


def progress_lines() -> OnProgress:
    """Return what says on standard error every few seconds how far a long task is."""
    due = Seldom(QUIET_SECONDS)

    def say(what: str, done: int, total: int | None) -> None:
        if due():
            share = "" if total is None else f" of {total} ({done / total:.0%})"
            typer.echo(f"{what}: {done}{share}", err=True)
            sys.stderr.flush()

    return say


def report_skipped(images: ImageSet, folder: Path | None = None) -> None:
    """Say which files could not be read: the first few here, all of them in a file of the folder."""
    if not images.skipped:
        return
    for path, reason in images.skipped[:SHOWN]:
        typer.echo(f"  skipped {path}: {reason}", err=True)
    if folder is None:
        return
    target = folder / SKIPPED_FILE
    lines = "".join(f"{path}\t{' '.join(reason.split())}\n" for path, reason in images.skipped)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target.write_text(lines, encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"cannot write {target}: {error.strerror or error}; choose another folder"
        ) from error
    if len(images.skipped) > SHOWN:
        typer.echo(f"  all {len(images.skipped)} of them: {target}", err=True)
