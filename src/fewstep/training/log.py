"""The log of a run: one JSON object in a line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewstep.checkpoints import replace_text
from fewstep.errors import CheckpointError


class Log:
    """A file of lines that a killed writer cannot spoil: lines beyond a checkpoint are dropped when a run resumes.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def figures(self, step: int, figures: Mapping[str, Any]) -> None:
        """Add a line; JSON knows no NaN, so null stands for it.

        Raises:
            CheckpointError: It cannot be written.
        """
        entry = {"step": step, **figures, "time": round(time.time(), 3)}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: _plain(v) for k, v in entry.items()}) + "\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def sheet(self, step: int, path: Path) -> None:
        """Write nothing: a sheet's file has the step in its name."""

    def close(self) -> None:
        """Do nothing: every line is on its own."""

    def entries(self) -> Iterator[dict[str, Any]]:
        """Read the lines; one that was cut short by a kill ends them.

        Raises:
            CheckpointError: The file is there but cannot be read.
        """
        try:
            with self.path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        entry = json.loads(line)
                    except ValueError:
                        return
                    if not isinstance(entry, dict) or not line.endswith("\n"):
                        return
                    yield entry
        except FileNotFoundError:
            return
        except OSError as error:
            raise CheckpointError(
                f"cannot read {self.path} ({error.strerror or error}); check its permissions, or move it away: a run "
                "goes on without it"
            ) from error

    def start(self, step: int) -> None:
        """Drop the lines of steps that a run is about to do again.

        Raises:
            CheckpointError: The file cannot be written.
        """
        kept = [entry for entry in self.entries() if entry.get("step", 0) <= step]
        replace_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write {path} ({error.strerror or error}): free some disk space or check its permissions, then "
        "start again; the last complete checkpoint is unharmed"
    )
