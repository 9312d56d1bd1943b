"""Results of a long benchmark, kept in a file, so that an interrupted one goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from fewstep.errors import InvalidInputError

SECONDS = 2.0
"""Least time between two writings of the file, which may be long."""


class Results:
    """Rows by key, in a JSON file that is written as they come, and at the end of a `with` block.

    Args:
        path: The file.
        conditions: What all rows have in common, such as the number of images; a file with others is refused.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        self.path, self.conditions = path, dict(conditions)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        self._written = -SECONDS
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["conditions"] != self.conditions:
                raise InvalidInputError(
                    f"{path} holds results of {stored['conditions']}, not {self.conditions}; give another --cache"
                )
            self.rows = stored["results"]

    def add(self, key: str, row: dict[str, Any]) -> dict[str, Any]:
        """Keep a result, and return it."""
        self.rows[key] = row
        if time.monotonic() - self._written >= SECONDS:
            self.write()
        return row

    def write(self) -> None:
        """Write all rows; a kill at any time leaves either the old file or the new one."""
        text = json.dumps({"conditions": self.conditions, "results": self.rows}, indent=1)
        new = self.path.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        new.replace(self.path)
        self._written = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()
