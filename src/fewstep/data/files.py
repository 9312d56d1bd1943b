"""Files that are replaced whole or not at all, and the folder where downloads are kept."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of ``path`` only once it is complete.

    The bytes go to a temporary neighbour; on any failure that neighbour is removed and the old
    file stays as it was.

    Args:
        path: The file to write; its parent folders are created.

    Yields:
        The temporary file, open for writing bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_dir() -> Path:
    """The folder for downloads: ``FEWSTEP_CACHE``, or the platform's cache folder for Fewstep."""
    if chosen := os.environ.get("FEWSTEP_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fewstep"
