"""What can be read picture by picture: the things a folder and an archive have in common."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fewstep.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLIT_FOLDERS = {"train", "test", "val", "valid", "validation"}
LARGEST_CLASS_NUMBER = 99_999

OnProgress = Callable[[str, int, int | None], None]
"""Called with what is being done, how many files are done, and how many there are, if that is known."""

PROGRESS_EVERY = 4096
"""Files or rows between two reports of what takes microseconds for each."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is not decoded yet.

    Args:
        name: Its place in the folder or archive, with ``/``.
        data: A file's path, or its content.
        label: Its class by name, or None.
        caption: What it shows in words, or None.
    """

    name: str
    data: str | bytes
    label: str | None = None
    caption: str | None = None

    def open(self) -> str | io.BytesIO:
        """Return what Pillow can open."""
        return self.data if isinstance(self.data, str) else io.BytesIO(self.data)


class Names:
    """Many names in little memory: joined by blocks, and taken apart again block by block.

    >>> names = Names()
    >>> for name in ("a/1.png", "a/2.png"):
    ...     names.append(name)
    >>> len(names), list(names)
    (2, ['a/1.png', 'a/2.png'])
    """

    BLOCK = 4096
    BETWEEN = "\0"
    """No file has it in its name."""

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._last: list[str] = []

    def append(self, name: str) -> None:
        """Add a name at the end."""
        self._last.append(name)
        if len(self._last) == self.BLOCK:
            self._blocks.append(self.BETWEEN.join(self._last))
            self._last = []

    def __len__(self) -> int:
        """The number of names."""
        return len(self._blocks) * self.BLOCK + len(self._last)

    def __iter__(self) -> Iterator[str]:
        """Go through the names in order."""
        for block in self._blocks:
            yield from block.split(self.BETWEEN)
        yield from self._last


class Source(Protocol):
    """Pictures in a fixed order, to be gone through once."""

    root: Path
    """Where the pictures lie, for messages and records."""

    def count(self) -> int | None:
        """Return how many pictures there are, if that can be known before they are read."""
        ...

    def content_bytes(self) -> int:
        """Return the bytes of all files that are going to be read."""
        ...

    def fingerprint(self, on_progress: OnProgress | None = None) -> str:
        """Return a digest that changes when a file is added, removed, renamed or rewritten."""
        ...

    def pictures(self) -> Iterator[Picture]:
        """Yield every picture."""
        ...

    def class_of(self, labels: Sequence[str]) -> dict[str, str]:
        """Return the class that each of the labels of the pictures stands for; empty: no classes."""
        ...


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that people do not see."""
    return name.startswith(".") or name == "__MACOSX"


def is_picture(name: str) -> bool:
    """Whether a file's name ends as pictures do."""
    return name.lower().endswith(SUFFIXES)


def stem_of(name: str) -> str:
    """A file's name without its ending, folders included."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)


def order_classes(labels: set[str], source: str) -> tuple[str, ...]:
    """Put class names in order: by name, or 0 to the largest where all are whole numbers.

    >>> order_classes({"dog", "cat"}, "photos"), order_classes({"2", "0"}, "photos")
    (('cat', 'dog'), ('0', '1', '2'))
    """
    if not labels or not all(label.isascii() and label.isdigit() for label in labels):
        return tuple(sorted(labels))
    largest = max(map(int, labels))
    if largest > LARGEST_CLASS_NUMBER:
        raise DataError(
            f"the labels of {source} are whole numbers up to {largest}; class numbers go from 0 to "
            f"{LARGEST_CLASS_NUMBER} at most: number the classes from 0, or use names"
        )
    return tuple(str(number) for number in range(largest + 1))
