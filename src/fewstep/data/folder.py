"""Folders of pictures of any size and kind; classes by sub-folder or label file, captions beside the pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from fewstep.data.label_file import LabelFile
from fewstep.data.sources import (
    PROGRESS_EVERY,
    SPLIT_FOLDERS,
    SUFFIXES,
    Names,
    OnProgress,
    Picture,
    is_hidden,
    is_picture,
    stem_of,
)
from fewstep.errors import DataError

LABEL_FILES = ("labels.csv", "metadata.csv")


class NoPicturesError(DataError):
    """A folder holds no pictures; it may hold archives of them."""


class Folder:
    """All pictures below a folder, by name: of a million files only the names are held.

    Sub-folders are classes in the order of their names; what lies deeper belongs to the sub-folder.
    A label file (``labels.csv`` or ``metadata.csv`` in the folder, or the one given) goes before
    them. ``name.txt`` beside ``name.jpg`` is its caption. Hidden files and files that are no
    pictures are passed over.

    Args:
        root: An existing folder.
        labels: A label file; None: one that lies in the folder, if any.
        on_progress: Told of long scans.

    Raises:
        NoPicturesError: If there are no pictures.
        DataError: If the label file does not match them.
    """

    def __init__(
        self, root: Path, labels: Path | None = None, on_progress: OnProgress | None = None
    ) -> None:
        self.root = root
        self._names = Names()
        self._captioned = bytearray()  # for each name, whether it has a caption beside it
        for name, captioned in _pictures(str(root), "", ()):
            self._names.append(name)
            self._captioned.append(captioned)
            if on_progress is not None and len(self._names) % PROGRESS_EVERY == 0:
                on_progress("finding images", len(self._names), None)
        if not self._names:
            raise NoPicturesError(
                f"no images in {root}; put files there that end in {', '.join(SUFFIXES)}, directly or "
                "in one sub-folder for each class, or tar shards of such files"
            )
        if labels is None:
            found = [root / name for name in LABEL_FILES if (root / name).is_file()]
            labels = found[0] if found else None
        self._table = None if labels is None else LabelFile(labels, on_progress)
        if self._table is not None:
            self._table.require_match(self._names, str(root))

    def count(self) -> int:
        """Return how many pictures there are."""
        return len(self._names)

    def content_bytes(self) -> int:
        """Return the bytes of all pictures, reckoned from at most 1000 of them."""
        some = islice(self._names, 0, None, max(1, len(self._names) // 1000))
        sizes = [_size(f"{self.root}/{name}") for name in some]
        return sum(sizes) * len(self._names) // len(sizes)

    def fingerprint(self, on_progress: OnProgress | None = None) -> str:
        """Return a digest of the names, sizes and times of change of all files."""
        digest = hashlib.blake2b(digest_size=16)
        total = len(self._names)
        for done, (name, captioned) in enumerate(zip(self._names, self._captioned, strict=True)):
            _add_state(digest, f"{self.root}/{name}", name)
            if captioned:
                _add_state(digest, f"{self.root}/{stem_of(name)}.txt", "caption")
            if on_progress is not None and done % PROGRESS_EVERY == 0:
                on_progress("looking for changed files", done, total)
        if self._table is not None:
            _add_state(digest, str(self._table.path), "labels")
        return digest.hexdigest()

    def pictures(self) -> Iterator[Picture]:
        """Yield every picture, in the order of the names."""
        table = self._table
        for name, captioned in zip(self._names, self._captioned, strict=True):
            row = table.row(name) if table is not None else None
            label = row.label if row is not None else None
            if label is None and (table is None or not table.has_labels):
                label = name.partition("/")[0] if "/" in name else None
            caption = row.caption if row is not None else None
            if caption is None and captioned:
                caption = _caption_beside(f"{self.root}/{stem_of(name)}.txt")
            yield Picture(name, f"{self.root}/{name}", label, caption)

    def class_of(self, labels: Sequence[str]) -> dict[str, str]:
        """Return the classes of the label file, or the sub-folders.

        Raises:
            DataError: Pictures lie beside the class sub-folders.
        """
        if self._table is None or not self._table.has_labels:
            self._require_no_strays(labels)
        return {label: label for label in labels}

    def _require_no_strays(self, folders: Sequence[str]) -> None:
        strays = [name for name in self._names if "/" not in name]
        if folders and strays:
            raise DataError(
                f"{self.root} mixes class sub-folders ({', '.join(sorted(folders)[:3])}) with "
                f"{len(strays)} images that have no class, such as {strays[0]}: move these into a "
                "sub-folder, or all images into one folder for a model without classes, or give "
                "each image a class in labels.csv"
            )


def split_folder(folder: Path, split: str) -> Path:
    """Return the sub-folder of a split where the only sub-folders are splits, else the folder itself.

    Raises:
        DataError: If there is no such split.
    """
    with os.scandir(folder) as entries:
        names = {e.name for e in entries if not is_hidden(e.name) and e.is_dir()}
    if split in names and names <= SPLIT_FOLDERS:
        return folder / split
    if split != "train":
        raise DataError(
            f"{folder} has no {split!r} split: put those images in {folder / split} beside "
            f"{folder / 'train'}, or give the folder of the {split} images with split='train'"
        )
    return folder


def _pictures(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Yield the names of all pictures below a folder, in order, and whether a caption lies beside each.

    Circular links end the descent.
    """
    resolved = os.path.realpath(folder)
    if resolved in above:
        return
    with os.scandir(folder) as entries:
        # A folder's name is marked by the slash that no file's name can hold.
        names = [e.name + "/" * e.is_dir() for e in entries if not is_hidden(e.name)]
    names.sort(key=lambda name: name.rstrip("/"))
    texts = {stem_of(name) for name in names if name.lower().endswith(".txt")}
    for name in names:
        if name.endswith("/"):
            yield from _pictures(f"{folder}/{name[:-1]}", prefix + name, (*above, resolved))
        elif is_picture(name):
            yield prefix + name, stem_of(name) in texts


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a dangling link: reported when it is read
        return 0


def _add_state(digest: hashlib.blake2b, path: str, name: str) -> None:
    try:
        state = os.stat(path)
        digest.update(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode(errors="replace"))
    except OSError:  # a dangling link: reported when it is read
        digest.update(f"{name}\0missing\n".encode(errors="replace"))


def _caption_beside(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip() or None
    except OSError:
        return None
