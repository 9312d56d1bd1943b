"""The log of a run: one JSON object in a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewstep.errors import CheckpointError


class Log:
    """A file of lines that a killed writer cannot spoil: lines beyond a checkpoint are dropped when a run resumes.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line.

        Raises:
            CheckpointError: It cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(entry), allow_nan=False) + "\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def entries(self) -> Iterator[dict[str, Any]]:
        """Read the lines; one that was cut short by a kill ends them."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    return
                if not isinstance(entry, dict) or not line.endswith("\n"):
                    return
                yield entry

    def cut_after(self, step: int) -> None:
        """Drop the lines of steps that a run is about to do again.

        Raises:
            CheckpointError: The file cannot be written.
        """
        kept = [entry for entry in self.entries() if entry.get("step", 0) <= step]
        temporary = self.path.with_name(f".tmp-{self.path.name}")
        try:
            temporary.write_text(
                "".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8"
            )
            os.replace(temporary, self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write {path} ({error.strerror or error}): free some disk space or check its permissions, then "
        "start again; the last complete checkpoint is unharmed"
    )
