"""Labels and captions from a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fewstep.errors import DataError

COLUMNS = {
    "file": ("file_name", "filename", "file"),
    "label": ("label", "class"),
    "caption": ("caption", "text"),
}
SHOWN = 3


class Row(NamedTuple):
    """What a label file says of a picture."""

    label: str | None
    caption: str | None


class LabelFile:
    """A CSV file with the columns file_name and label or caption or both, one row for each picture.

    The header may be left out where there are exactly two columns, file name and label. File names
    are relative to the folder of the pictures.

    Args:
        path: The file, UTF-8.

    Attributes:
        rows: What it says of each picture, by file name.
        has_labels: Whether it has labels.

    Raises:
        DataError: If it cannot be read, a row is incomplete, or a picture occurs twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = _read(path)
        columns = _columns(lines[0], path) if lines else {}
        start = 1 if columns else 0
        columns = columns or {"file": 0, "label": 1}
        self.has_labels = "label" in columns
        self.rows: dict[str, Row] = {}
        for number, line in enumerate(lines[start:], start + 1):
            self._add(line, columns, number)

    def _add(self, line: list[str], columns: dict[str, int], number: int) -> None:
        if len(line) <= max(columns.values()):
            raise DataError(
                f"row {number} of {self.path} has {len(line)} columns, but "
                f"{max(columns.values()) + 1} are needed: {','.join(line)[:60]!r}; complete it"
            )
        cell = {kind: line[column].strip() or None for kind, column in columns.items()}
        name = (cell["file"] or "").replace("\\", "/").removeprefix("./")
        label = cell.get("label")
        if not name or (self.has_labels and label is None):
            raise DataError(
                f"row {number} of {self.path} lacks its {'label' if name else 'file name'}; complete it"
            )
        if name in self.rows:
            raise DataError(f"{self.path} names {name} twice, again in row {number}; delete one")
        self.rows[name] = Row(label, cell.get("caption"))

    def require_match(self, names: Iterable[str], source: str) -> None:
        """Demand a row for every picture and a picture for every row.

        Raises:
            DataError: The message counts and names what is missing on both sides.
        """
        pictures = set(names)
        missing = sorted(pictures - self.rows.keys())
        unknown = sorted(self.rows.keys() - pictures)
        if not missing and not unknown:
            return
        faults = [
            f"{len(some)} {what}, such as {', '.join(some[:SHOWN])}"
            for some, what in (
                (missing, f"of {len(pictures)} images in {source} are not in it"),
                (unknown, f"of its {len(self.rows)} rows name no image there"),
            )
            if some
        ]
        raise DataError(
            f"the label file {self.path} does not match: {'; '.join(faults)}. Names are relative to "
            "the folder of the images, endings included: correct the rows, or move what has none"
        )


def _read(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [line for line in csv.reader(file) if any(cell.strip() for cell in line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"cannot read the label file {path}: {error}; needed is a CSV file in UTF-8 with the "
            "columns file_name,label (or caption)"
        ) from error


def _columns(header: list[str], path: Path) -> dict[str, int]:
    """Where each kind of column is; empty if the first line is no header."""
    names = [name.strip().lower() for name in header]
    found = {
        kind: names.index(name)
        for kind, known in COLUMNS.items()
        for name in known[::-1]
        if name in names
    }
    if "file" in found and len(found) > 1:
        return found
    if len(names) == 2 and "file" not in found:
        return {}
    raise DataError(
        f"the first line of {path} is {','.join(header)[:80]!r}; needed are the columns file_name and "
        "label or caption (or two columns without a header: file name, label)"
    )
