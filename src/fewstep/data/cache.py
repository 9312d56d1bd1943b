"""Decoded images kept on disk, and read from there through a memory map."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

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

PIXELS, FACTS = "pixels.npy", "set.json"
ABANDONED_SECONDS = 3600.0


def cached(
    source: Source,
    request: Mapping[str, Any],
    folder: Path,
    on_progress: OnProgress | None = None,
) -> ImageSet:
    """Return the decoded images of a source from a cache, which is made if it is missing or out of date.

    A cache is a folder with ``pixels.npy`` and ``set.json``, which appears as a whole once it is complete. The
    images of the set are a read-only view of the file: what is not used takes no memory.

    Args:
        source: The pictures.
        request: What was asked for: size, channels, split.
        folder: Where caches are kept; each source and request has a folder of its own in it.
        on_progress: Told how far the decoding is.

    Raises:
        DataError: If the folder cannot be written to, or the source cannot be used.
    """
    asked = {"source": str(source.root.resolve()), **request}
    key = {**asked, "files": source.fingerprint(), "decoding": DECODING_VERSION}
    name = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=8).hexdigest()
    place = folder / name
    found = _read(place, key, str(source.root))
    if found is not None:
        return found
    temporary = folder / f".{name}-{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
        try:
            _clear_abandoned(folder, name)
            _build(temporary, source, key, on_progress)
            _rename_over(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
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
    """Images in a .npy file that grows; the header, which tells their number, is written last."""

    HEADER = 128

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shape: tuple[int, ...] = ()
        self._count = 0
        self._file: BinaryIO = path.open("xb")
        self._file.write(bytes(self.HEADER))

    def add(self, image: np.ndarray) -> None:
        self._shape = image.shape
        self._file.write(image.tobytes())
        self._count += 1

    def widen(self) -> None:
        if not self._count:
            return
        self._file.close()
        grey = self._path.with_suffix(".grey")
        self._path.rename(grey)
        _, height, width = self._shape
        self._file = self._path.open("xb")
        self._file.write(bytes(self.HEADER))
        with grey.open("rb") as file:
            file.seek(self.HEADER)
            for _ in range(self._count):
                self._file.write(3 * file.read(height * width))
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


def _build(
    folder: Path, source: Source, key: Mapping[str, Any], on_progress: OnProgress | None
) -> None:
    store = _File(folder / PIXELS)
    try:
        decoded = decode(source, store, key["size"], key["channels"], on_progress)
    finally:
        store.close()
    images = _map(folder / PIXELS)
    labels = None if decoded.labels is None else torch.from_numpy(decoded.labels)
    facts = {
        "key": dict(key),
        "labels": None if decoded.labels is None else decoded.labels.tolist(),
        "class_names": decoded.class_names,
        "captions": decoded.captions,
        "skipped": decoded.skipped,
        "enlarged": decoded.enlarged,
        "smallest": decoded.smallest,
        "digest": ImageSet(images, labels).digest,
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
        labels = facts["labels"]
        return image_set(
            _map(place / PIXELS),
            Decoded(
                labels=None if labels is None else np.array(labels, np.int64),
                class_names=tuple(facts["class_names"]),
                captions=tuple(facts["captions"]),
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


def _map(path: Path) -> Tensor:
    array = np.load(path, mmap_mode="r")
    with warnings.catch_warnings():
        # The map is read-only, for a cache must not change; nothing writes to the images of a set.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _clear_abandoned(folder: Path, name: str) -> None:
    """Remove what killed builders of this cache left; a living one has written within the hour."""
    for left in folder.glob(f".{name}-*.tmp"):
        try:
            changed = max(path.stat().st_mtime for path in (left, *left.iterdir()))
        except OSError:
            continue
        if time.time() - changed > ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _rename_over(temporary: Path, place: Path) -> None:
    """Put a complete cache in its place; one that is out of date, or another builder's, makes way."""
    if place.exists():
        old = place.with_name(f".{place.name}-{uuid.uuid4().hex}.tmp")
        place.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    temporary.rename(place)
