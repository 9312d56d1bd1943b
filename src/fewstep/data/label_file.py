"""Labels and captions from a CSV file."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator
from itertools import compress, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fewstep.data.captions import CaptionList
from fewstep.data.sources import PROGRESS_EVERY, Names, OnProgress
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
    are relative to the folder of the pictures. They are held as numbers of 8 bytes, so that a
    million rows take little memory, and read again where a message has to name some.

    Args:
        path: The file, UTF-8.
        on_progress: Told of long files.

    Attributes:
        has_labels: Whether it has labels.

    Raises:
        DataError: If it cannot be read, a row is incomplete, or a picture occurs twice.
    """

    def __init__(self, path: Path, on_progress: OnProgress | None = None) -> None:
        self.path = path
        self.has_labels = False
        keys, labels = array("q"), array("i")
        number: dict[str | None, int] = {}
        captions = CaptionList()
        for line, (name, label, caption) in self._entries():
            keys.append(hash(name))
            labels.append(number.setdefault(label, len(number)))
            captions.append(caption)
            if on_progress is not None and line % PROGRESS_EVERY == 0:
                on_progress("reading labels", line, None)
        unsorted = np.frombuffer(keys, np.int64)
        self._order = unsorted.argsort(kind="stable")
        self._keys = unsorted[self._order]
        self._labels, self._label_names = labels, list(number)
        self._captions = captions.captions()
        self._require_unique()

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._keys)

    def row(self, name: str) -> Row | None:
        """Return what the file says of a picture; None: nothing."""
        place = int(self._keys.searchsorted(hash(name)))
        if place == len(self) or self._keys[place] != hash(name):
            return None
        k = int(self._order[place])
        label = self._label_names[self._labels[k]]
        return Row(label, self._captions[k] if self._captions else None)

    def require_match(self, names: Names, source: str) -> None:
        """Demand a row for every picture and a picture for every row.

        Raises:
            DataError: The message counts and names what is missing on both sides.
        """
        pictures = np.fromiter(map(hash, names), np.int64, len(names))
        if np.array_equal(np.unique(pictures), self._keys):
            return
        without_row = ~np.isin(pictures, self._keys)
        without_picture = set(self._keys[~np.isin(self._keys, pictures)].tolist())
        missing = sorted(set(compress(names, without_row)))
        unknown = sorted(n for _, (n, *_) in self._entries() if hash(n) in without_picture)
        faults = [
            f"{len(some)} {what}, such as {', '.join(some[:SHOWN])}"
            for some, what in (
                (missing, f"of {len(names)} images in {source} are not in it"),
                (unknown, f"of its {len(self)} rows name no image there"),
            )
            if some
        ]
        raise DataError(
            f"the label file {self.path} does not match: {'; '.join(faults)}. Names are relative to "
            "the folder of the images, endings included: correct the rows, or move what has none"
        )

    def _require_unique(self) -> None:
        again = self._order[1:][self._keys[1:] == self._keys[:-1]]
        if not len(again):
            return
        first = int(again.min())
        line, (name, *_) = next(islice(self._entries(), first, None))
        raise DataError(f"{self.path} names {name} twice, again in row {line}; delete one")

    def _entries(self) -> Iterator[tuple[int, tuple[str, str | None, str | None]]]:
        """Yield the number of each row and its file name, label and caption."""
        columns: dict[str, int] | None = None
        for number, line in enumerate(_lines(self.path), 1):
            if columns is None:
                found = _columns(line, self.path)
                columns = found or {"file": 0, "label": 1}
                self.has_labels = "label" in columns
                if found:
                    continue
            yield number, self._entry(line, columns, number)

    def _entry(
        self, line: list[str], columns: dict[str, int], number: int
    ) -> tuple[str, str | None, str | None]:
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
        return name, label, cell.get("caption")


def _lines(path: Path) -> Iterator[list[str]]:
    """Yield the lines that are not empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line in csv.reader(file):
                if any(cell.strip() for cell in line):
                    yield line
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
