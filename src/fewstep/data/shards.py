"""Pictures in tar archives, read as a stream: WebDataset shards, and archives of a folder."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Self

from fewstep.data.label_file import LabelFile
from fewstep.data.sources import (
    SPLIT_FOLDERS,
    Names,
    OnProgress,
    Picture,
    is_hidden,
    is_picture,
    stem_of,
)
from fewstep.errors import DataError

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
SIDE_FILES = (".cls", ".txt", ".json")
PATTERN = re.compile(r"[*?\[{]")
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")


class _Member(tarfile.TarInfo):
    """A member whose damaged or missing header is an error; tarfile itself would take it for the archive's end.

    A complete archive ends in blocks of zeros, so one that was cut between two members is found out too.
    """

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except _DAMAGED as error:
            raise _ReadError(str(error)) from error
        except _NoHeader as error:
            if not tarfile.offset:
                raise
            raise _ReadError("its end is missing") from error


_DAMAGED = (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError)  # pyright: ignore[reportAttributeAccessIssue]
_NoHeader = tarfile.EmptyHeaderError  # pyright: ignore[reportAttributeAccessIssue]
_ReadError = tarfile.ReadError


class Shards:
    """The pictures of one or more tar archives, which are never unpacked.

    A sample is the run of neighbouring members that share a name: a picture and, if there are any,
    ``.cls`` (class number or name), ``.txt`` (caption) and ``.json`` (``label`` or ``class``,
    ``caption`` or ``text``). Without these, folders inside the archive are classes, as on disk; a
    folder that all pictures share is passed over, and so are those of other splits.

    Args:
        root: What was asked for, for messages.
        files: The archives, in order.
        split: ``"train"`` or ``"test"``.
        labels: A label file that names members, or None.
        on_progress: Told how far the label file is read.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        split: str,
        labels: Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.root = root
        self._files, self._split = files, split
        self._table = None if labels is None else LabelFile(labels, on_progress)

    def count(self) -> None:
        """The number is not known before the archives are read."""

    def content_bytes(self) -> int:
        """Return the bytes of all archives."""
        return sum(file.stat().st_size for file in self._files)

    def fingerprint(self, on_progress: OnProgress | None = None) -> str:
        """Return a digest of the names, sizes and times of change of the archives."""
        digest = hashlib.blake2b(digest_size=16)
        for file in (*self._files, *([self._table.path] if self._table else [])):
            state = file.stat()
            digest.update(f"{file}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def pictures(self) -> Iterator[Picture]:
        """Yield every picture of the split, in the order of the archives.

        Raises:
            DataError: An archive is damaged, has no picture of the split, or does not match the label file.
        """
        names = Names()
        splits: set[str] = set()
        for file in self._files:
            for sample in _samples(file):
                for picture in _pictures_of(sample):
                    split, place = _split_and_place(picture.name)
                    splits.add(split or "")
                    if (split or "train") != self._split:
                        continue
                    label = picture.label
                    if label is None:
                        label = "/".join(place) + "/"
                    caption = picture.caption
                    if self._table is not None:
                        names.append(picture.name)
                        row = self._table.row(picture.name)
                        if row is not None:
                            label, caption = row.label or label, row.caption or caption
                    yield Picture(picture.name, picture.data, label, caption)
        if self._table is not None:
            self._table.require_match(names, str(self.root))
        if "" in splits and len(splits) > 1:
            raise DataError(
                f"{self.root} holds splits ({', '.join(sorted(splits - {''}))}) and images that belong "
                "to none of them; put these into one of the splits"
            )
        available = splits - {""} or {"train"}
        if self._split not in available:
            raise DataError(
                f"{self.root} has no {self._split!r} split; it holds {', '.join(sorted(available))}"
            )

    def class_of(self, labels: Sequence[str]) -> dict[str, str]:
        """Return the class for each label: what a side file says, or the folder (which ends in ``/``).

        Raises:
            DataError: Some pictures have a class and some have none.
        """
        places = {
            label: [folder for folder in label.split("/") if folder]
            for label in labels
            if label.endswith("/")
        }
        shared = {place[0] if place else "" for place in places.values()}
        depth = 1 if len(shared) == 1 and shared != {""} else 0
        classes = {
            label: place[depth] if len(place) > depth else "" for label, place in places.items()
        }
        classes.update({label: label for label in labels if label not in places})
        if len(places) < len(labels) and places:
            # Side files decide; the folders are only where the samples lie.
            raise DataError(
                f"some images in {self.root} have a class of their own and some, in the folder "
                f"{next(iter(places)) or 'at the top'}, have none; give each its .cls or .json file, or none"
            )
        named = {name for name in classes.values() if name}
        if named and "" in classes.values():
            raise DataError(
                f"{self.root} mixes class folders ({', '.join(sorted(named)[:3])}) with images that have "
                "no class; put these into a folder of their own class"
            )
        return classes if named else {}


def is_archive(path: Path) -> bool:
    """Whether a file's name ends as tar archives do."""
    return path.name.lower().endswith(ENDINGS)


def archives_in(folder: Path) -> list[Path]:
    """Return the tar archives directly in a folder, in the order of their names."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not is_hidden(e.name)]
    return [folder / name for name in sorted(names) if is_archive(folder / name)]


def is_pattern(source: str) -> bool:
    """Whether a source stands for several files, as in ``train-{000..012}.tar`` or ``*.tar``."""
    return PATTERN.search(source) is not None


def matching(pattern: str) -> list[Path]:
    """Return the archives that a pattern with braces and wildcards names, in order.

    Raises:
        DataError: One that the braces name does not exist, or nothing matches.
    """
    files: list[Path] = []
    for name in expand_braces(pattern):
        found = sorted(map(Path, glob.glob(name)))
        if not found:
            raise DataError(f"no file matches {name}; check the pattern {pattern}")
        files += found
    others = [file for file in files if not is_archive(file)]
    if others:
        raise DataError(
            f"{others[0]} is no tar archive; a pattern names tar shards: give the folder that images lie in instead"
        )
    return files


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield the names that ``{000..012}`` and ``{a,b}`` stand for.

    >>> list(expand_braces("x-{08..10}.tar"))
    ['x-08.tar', 'x-09.tar', 'x-10.tar']
    """
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    numbers = NUMBERS.fullmatch(match[1])
    choices = match[1].split(",")
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        choices = [f"{k:0{len(numbers[1])}d}" for k in range(first, last + 1)]
    for choice in choices:
        yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _samples(file: Path) -> Iterator[list[tuple[str, bytes]]]:
    """Yield the runs of neighbouring members with one name, each with its content."""
    for _, run in itertools.groupby(_members(file), key=lambda member: stem_of(member[0])):
        yield list(run)


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    done = 0
    try:
        with tarfile.open(file, mode="r|*", tarinfo=_Member) as archive:
            while (member := archive.next()) is not None:
                vars(archive)["members"] = []  # tarfile would keep every header
                name = str(PurePosixPath(member.name))
                wanted = is_picture(name) or name.lower().endswith(SIDE_FILES)
                if not member.isfile() or not wanted or any(map(is_hidden, name.split("/"))):
                    continue
                content = archive.extractfile(member)
                assert content is not None  # regular files have content
                yield name, content.read()
                done += 1
    except (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"the archive {file} is cut short or damaged ({error}), after {done} files: copy it again"
        ) from error


def _pictures_of(sample: list[tuple[str, bytes]]) -> Iterator[Picture]:
    label = caption = None
    for name, content in sample:
        ending = name.lower().rpartition(".")[2]
        if ending == "cls":
            label = content.decode(errors="replace").strip() or None
        elif ending == "txt":
            caption = content.decode(errors="replace").strip() or None
        elif ending == "json":
            facts = _facts(content)
            label = label or _text(facts, "label", "class")
            caption = caption or _text(facts, "caption", "text")
    for name, content in sample:
        if is_picture(name):
            yield Picture(name, content, label, caption)


def _facts(content: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _text(facts: dict[str, Any], *names: str) -> str | None:
    values = [facts[name] for name in names if isinstance(facts.get(name), int | str)]
    return str(values[0]) if values else None


def _split_and_place(name: str) -> tuple[str | None, tuple[str, ...]]:
    """The split that a member belongs to, if any, and its folders, of which ``.`` is that of the split."""
    folders = tuple(name.split("/")[:-1])
    for depth, folder in enumerate(folders[:2]):
        if folder in SPLIT_FOLDERS:
            return folder, (".", *folders[depth + 1 :])
    return None, folders
