"""A folder of shards: what it is for, what is there already, and what is missing."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.bulk.formats import FORMATS, Content
from fewstep.checkpoints import load_json
from fewstep.data.files import replacing
from fewstep.errors import CheckpointError, DataError, InvalidInputError

INDEX_FILE = "shards.json"
KIND, VERSION = "fewstep-shards", 1
SHOWN = 4
"""Settings that a refusal names, the plainest first: a plan has hundreds of numbers."""
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, tarfile.TarError)


@dataclass(frozen=True)
class Shards:
    """Pictures 0 to n - 1 in a folder, so many to a shard.

    Args:
        folder: Where they lie.
        n: Number of pictures.
        settings: Everything that decides the files but their number; plain data.
    """

    folder: Path
    n: int
    settings: Mapping[str, Any]

    def __len__(self) -> int:
        """The number of shards."""
        return -(-self.n // self.settings["shard_size"])

    def numbers(self, shard: int) -> range:
        """The numbers of the pictures in a shard."""
        size = self.settings["shard_size"]
        return range(shard * size, min(self.n, (shard + 1) * size))

    def path(self, shard: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{shard:05d}{FORMATS[self.settings['format']].suffix}"

    def holds(self, shard: int) -> bool:
        """Say whether a shard is there with all its pictures; one that cannot be read is not."""
        path = self.path(shard)
        if not path.exists():
            return False
        try:
            return FORMATS[self.settings["format"]].count(path) == len(self.numbers(shard))
        except UNREADABLE:
            return False

    def missing(self) -> Iterator[int]:
        """The shards that are not there yet, in order."""
        return (shard for shard in range(len(self)) if not self.holds(shard))

    def open(self) -> None:
        """Make the folder ready: a new one gets its index; one that was begun must be for the same pictures.

        Each worker does so before its first shard. All write the same index, so it does not matter who is first.

        Raises:
            InvalidInputError: The folder holds something else, or pictures under other settings.
            DataError: It cannot be written to.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Looked at before the index: what another worker has written by now, it wrote after the index.
            found = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
        index = self.folder / INDEX_FILE
        if not index.exists():
            if found:
                raise InvalidInputError(
                    f"{self.folder} holds {found[0]}{' and more' if len(found) > 1 else ''} but no {INDEX_FILE}, so it "
                    "was not begun by this command; give a new or an empty folder"
                )
        elif self._n_so_far(index) == self.n:
            return
        with writing(index), replacing(index) as file:
            file.write((json.dumps(self._content(), indent=2) + "\n").encode())

    def write(self, shard: int, content: Content) -> None:
        """Write a shard; it appears under its name once it is complete.

        Raises:
            DataError: No space or no permission.
        """
        path = self.path(shard)
        with writing(path):
            if path.exists() and path.is_file() is (self.settings["format"] == "png"):
                raise InvalidInputError(f"{path} is in the way; move it, then start again")
            for left in self.folder.glob(
                f".*-{path.name}"
            ):  # by a killed worker that had this shard
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            FORMATS[self.settings["format"]].write(path, content)

    def _content(self) -> dict[str, Any]:
        return {"format": KIND, "version": VERSION, "n": self.n, "settings": dict(self.settings)}

    def _n_so_far(self, index: Path) -> int:
        """How many pictures the folder was for, which may grow."""
        try:
            before = load_json(index)
        except CheckpointError as error:
            raise InvalidInputError(
                f"{index} cannot be read ({error}); give a new or an empty folder"
            ) from error
        n, settings = before.get("n"), before.get("settings")
        if (before.get("format"), before.get("version")) != (KIND, VERSION) or not (
            isinstance(n, int) and isinstance(settings, dict)
        ):
            raise InvalidInputError(
                f"{index} is not an index of shards that this version can read; give a new or an empty folder"
            )
        if differing := list(_differences(json.loads(json.dumps(self.settings)), settings)):
            plainest = sorted(differing, key=lambda line: line.partition(":")[0].count("."))
            more = f"; and {len(plainest) - SHOWN} more" if len(plainest) > SHOWN else ""
            raise InvalidInputError(
                f"{self.folder} holds pictures under other settings ({'; '.join(plainest[:SHOWN])}{more}); give the "
                "same settings to go on, or another folder to start anew"
            )
        if n > self.n:
            raise InvalidInputError(
                f"n = {self.n}, but {self.folder} was begun for {n} pictures; give at least as many, or another folder"
            )
        return n


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a file that cannot be written into a `DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror or error}): free some disk space or check the permissions of the "
            "folder, then give the same command again; complete shards are kept"
        ) from error


def _differences(mine: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """A line for each setting that differs, by its path: own value, other value."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys([*mine, *theirs]):
            yield from _differences(mine.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))
    elif mine != theirs:
        yield f"{name}: {_short(mine)}, not {_short(theirs)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
