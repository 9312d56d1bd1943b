"""Decoded images kept on disk, and read from there through a memory map."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from fewstep.data.captions import Captions
from fewstep.data.decoding import Decoded, decode
from fewstep.data.files import cache_dir
from fewstep.data.image_set import ImageSet
from fewstep.data.sources import OnProgress, Source
from fewstep.errors import DataError

DECODING_VERSION = 1
"""Raise it when pictures come out differently: older caches are then made anew."""

LARGE_FILES = 50_000
LARGE_BYTES = 2**28
COMPRESSION = 8
"""About how many times more bytes pictures have once they are decoded."""

PIXELS, LABELS, FACTS = "pixels.npy", "labels.npy", "set.json"
CAPTIONS, CAPTION_ENDS = "captions.npy", "caption_ends.npy"
ABANDONED_SECONDS = 3600.0
WAITING_SECONDS = 0.5
"""Between two looks at whether another process has made the cache."""


def cached(
    source: Source,
    request: Mapping[str, Any],
    folder: Path,
    on_progress: OnProgress | None = None,
) -> ImageSet:
    """Return the decoded images of a source from a cache, which is made if it is missing or out of date.

    A cache is a folder that appears as a whole once it is complete. The images of the set are a
    read-only view of its file: what is not used takes no memory. Of several processes that need the
    same cache one makes it, and the others wait.

    Args:
        source: The pictures.
        request: What was asked for: size, channels, split.
        folder: Where caches are kept; each source and request has a folder of its own in it.
        on_progress: Told how far the decoding is.

    Raises:
        DataError: If the folder cannot be written to, or the source cannot be used.
    """
    asked = {"source": str(source.root.resolve()), **request}
    key = {**asked, "files": source.fingerprint(on_progress), "decoding": DECODING_VERSION}
    name = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=8).hexdigest()
    place = folder / name
    found = _read(place, key, str(source.root))
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_maker(folder / f".{name}.lock", on_progress) as is_sure:
            found = _read(place, key, str(source.root))
            if found is not None:
                return found
            _clear_abandoned(folder, name if is_sure else None)
            _require_space(folder, source, key)
            _make(place, source, key, on_progress)
    except OSError as error:
        raise DataError(
            f"cannot write the cache of decoded images in {folder}: {error.strerror or error}; give "
            "another folder (--cache FOLDER), or cache='off' (--cache off) to hold the images in memory"
        ) from error
    made = _read(place, key, str(source.root))
    if made is None:
        raise DataError(
            f"the cache of decoded images in {place} cannot be read back; does another program clear "
            "it away? Try again, or give another folder (--cache FOLDER)"
        )
    return made


def default_cache() -> Path:
    """The folder of caches that `load_images` makes by itself."""
    return cache_dir() / "images"


def is_large(source: Source, size: int | None) -> bool:
    """Whether a source is worth a cache: tens of thousands of files, or hundreds of megabytes of pixels."""
    count = source.count()
    if count is None:
        return source.content_bytes() * COMPRESSION > LARGE_BYTES
    pixels = COMPRESSION * source.content_bytes() if size is None else count * 3 * size * size
    return count > LARGE_FILES or pixels > LARGE_BYTES


class _File:
    """Images in a .npy file that grows; the header, which tells their number, is written last.

    Attributes:
        digest: Of all bytes of the images so far.
    """

    HEADER = 128

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shape: tuple[int, ...] = ()
        self._count = 0
        self._open()

    def add(self, image: np.ndarray) -> None:
        self._shape = image.shape
        self._write(image.tobytes())
        self._count += 1

    def widen(self) -> None:
        if not self._count:
            return
        self._file.close()
        grey = self._path.with_suffix(".grey")
        self._path.rename(grey)
        _, height, width = self._shape
        self._open()
        with grey.open("rb") as file:
            file.seek(self.HEADER)
            for _ in range(self._count):
                self._write(3 * file.read(height * width))
        grey.unlink()

    def close(self) -> None:
        shape = (self._count, *self._shape)
        text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode("latin1")
        magic = b"\x93NUMPY\x01\x00" + (self.HEADER - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(magic + text.ljust(self.HEADER - 11) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _open(self) -> None:
        self.digest = hashlib.blake2b(digest_size=16)
        self._file: BinaryIO = self._path.open("xb")
        self._file.write(bytes(self.HEADER))

    def _write(self, content: bytes) -> None:
        self.digest.update(content)
        self._file.write(content)


def _make(
    place: Path, source: Source, key: Mapping[str, Any], on_progress: OnProgress | None
) -> None:
    """Make a cache beside its place and put it there once it is complete; remove what was not completed."""
    temporary = place.with_name(f".{place.name}-{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        _build(temporary, source, key, on_progress)
        _rename_over(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build(
    folder: Path, source: Source, key: Mapping[str, Any], on_progress: OnProgress | None
) -> None:
    store = _File(folder / PIXELS)
    try:
        decoded = decode(source, store, key["size"], key["channels"], on_progress)
    finally:
        store.close()
    if decoded.labels is not None:
        np.save(folder / LABELS, decoded.labels)
        store.digest.update(decoded.labels.tobytes())
    if isinstance(decoded.captions, Captions):
        np.save(folder / CAPTIONS, decoded.captions.text)
        np.save(folder / CAPTION_ENDS, decoded.captions.ends)
    facts = {
        "key": dict(key),
        "has_labels": decoded.labels is not None,
        "has_captions": isinstance(decoded.captions, Captions),
        "class_names": decoded.class_names,
        "skipped": decoded.skipped,
        "enlarged": decoded.enlarged,
        "smallest": decoded.smallest,
        "digest": store.digest.hexdigest(),
    }
    with (folder / FACTS).open("x", encoding="utf-8") as file:
        json.dump(facts, file)
        file.flush()
        os.fsync(file.fileno())


def _read(place: Path, key: Mapping[str, Any], source: str) -> ImageSet | None:
    """Return a cache that is there and up to date."""
    try:
        facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
        if facts["key"] != dict(key):
            return None
        return image_set(
            _map(place / PIXELS),
            Decoded(
                labels=np.load(place / LABELS) if facts["has_labels"] else None,
                class_names=tuple(facts["class_names"]),
                captions=_captions(place) if facts["has_captions"] else (),
                skipped=tuple((name, reason) for name, reason in facts["skipped"]),
                enlarged=facts["enlarged"],
                smallest=None if facts["smallest"] is None else tuple(facts["smallest"]),
            ),
            source,
            facts["digest"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def image_set(
    images: Tensor, decoded: Decoded, source: str, digest: str | None = None
) -> ImageSet:
    """Put decoded images and what was found out about them together."""
    return ImageSet(
        images,
        None if decoded.labels is None else torch.from_numpy(decoded.labels),
        decoded.class_names,
        source,
        decoded.skipped,
        decoded.captions,
        decoded.enlarged,
        decoded.smallest,
        digest,
    )


def _captions(place: Path) -> Captions:
    return Captions(
        np.load(place / CAPTIONS, mmap_mode="r"), np.load(place / CAPTION_ENDS, mmap_mode="r")
    )


def _map(path: Path) -> Tensor:
    array = np.load(path, mmap_mode="r")
    with warnings.catch_warnings():
        # The map is read-only, for a cache must not change; nothing writes to the images of a set.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


@contextmanager
def _only_maker(lock: Path, on_progress: OnProgress | None) -> Iterator[bool]:
    """Wait until no other process makes a cache, and let none do so within the block.

    The system lets go of the lock of a process that is killed.

    Yields:
        Whether that is sure; False where the system or the folder knows no locks.
    """
    if fcntl is None:
        yield False
        return
    start = time.monotonic()
    while True:
        with lock.open("a") as file:
            held = _hold(file.fileno(), lock)
            if held is not False:
                try:
                    yield held is True
                finally:
                    lock.unlink(missing_ok=True)
                return
        if on_progress is not None:
            seconds = int(time.monotonic() - start)
            on_progress(
                "waiting for the process that decodes these images, seconds", seconds, None
            )
        time.sleep(WAITING_SECONDS)


def _hold(file: int, path: Path) -> bool | None:
    """Try to lock a file; None: its folder knows no locks. Who held it last has removed it, so look if it is there."""
    assert fcntl is not None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _require_space(folder: Path, source: Source, key: Mapping[str, Any]) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        DataError: The message tells how much is needed.
    """
    count, size = source.count(), key["size"]
    if count is None or size is None:
        return
    needed, free = count * (key["channels"] or 1) * size**2, shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the cache of {count} decoded images needs {needed / 2**30:.1f} GiB, and the disk of {folder} has "
            f"{free / 2**30:.1f} GiB left; make room, give a folder on another disk (--cache FOLDER), or a smaller size"
        )


def _clear_abandoned(folder: Path, name: str | None) -> None:
    """Remove what killed makers of caches left; a living one has written within the hour.

    Args:
        folder: Where caches are kept.
        name: The cache that certainly no other process makes, if any: of this one everything goes at once.
    """
    for left in folder.glob(".*.tmp"):
        try:
            changed = max(path.stat().st_mtime for path in (left, *left.iterdir()))
        except OSError:
            continue
        dead = name is not None and left.name.startswith(f".{name}-")
        if dead or time.time() - changed > ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _rename_over(temporary: Path, place: Path) -> None:
    """Put a complete cache in its place; one that is out of date, or another builder's, makes way."""
    if place.exists():
        old = place.with_name(f".{place.name}-{uuid.uuid4().hex}.tmp")
        place.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    temporary.rename(place)
