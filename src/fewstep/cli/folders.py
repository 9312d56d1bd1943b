"""Folders that a command is asked to write."""

from __future__ import annotations

from pathlib import Path

from fewstep.checkpoints import require_folder
from fewstep.errors import InvalidInputError
from fewstep.models import CHECKPOINTS, CONFIG_FILE


def not_taken(folder: Path) -> Path:
    """Return a folder that may be written: one that does not exist or is empty.

    Raises:
        InvalidInputError: Something is there already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInputError(
            f"--out {folder} exists already, and it would be replaced; give another folder, or remove it first"
        )
    return folder


def for_a_run(out: Path, data: str) -> Path:
    """Return the folder of a run, if a run may live there; asked before images are loaded, which may take long.

    Args:
        out: The folder.
        data: Where the images come from.

    Raises:
        CheckpointError: A file is in its way.
        InvalidInputError: It is a model that is no run, or lies among the images, which its sheets would join.
    """
    require_folder(out)
    if (out / CONFIG_FILE).exists() and not (out / CHECKPOINTS).exists():
        raise InvalidInputError(
            f"--out {out} holds a model, not a run; give another folder, with --start-from {out} to begin with its "
            "weights"
        )
    images = Path(data)
    if data and images.is_dir() and out.resolve().is_relative_to(images.resolve()):
        raise InvalidInputError(
            f"--out {out} lies in the folder of the images, {data}, so that sheets of samples would be taken for "
            "images when the run goes on; give an --out outside it"
        )
    return out
