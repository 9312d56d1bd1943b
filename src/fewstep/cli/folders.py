"""Folders that a command is asked to write."""

from __future__ import annotations

from pathlib import Path

from fewstep.errors import InvalidInputError


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
