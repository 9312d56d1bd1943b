"""Many pictures decoded on several threads, straight into the place where they stay."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from fewstep.data.captions import CaptionList
from fewstep.data.fitting import to_pixels
from fewstep.data.sources import OnProgress, Picture, Source, order_classes
from fewstep.errors import DataError

TOGETHER = 32
"""Pictures that a thread takes at once; a task for each would cost more than a small picture does."""


class Store(Protocol):
    """Where decoded images go, one after the other."""

    def add(self, image: np.ndarray) -> None:
        """Append a uint8 image (C, H, W); all have one shape."""
        ...

    def widen(self) -> None:
        """Turn the grey images stored so far into RGB."""
        ...


class Memory:
    """Images in one array.

    Args:
        count: How many there are going to be at most; None: the array grows as need be.
    """

    def __init__(self, count: int | None) -> None:
        self._capacity = count or 1024
        self._array: np.ndarray | None = None
        self._count = 0

    def add(self, image: np.ndarray) -> None:
        """Append an image."""
        if self._array is None:
            self._array = np.empty((self._capacity, *image.shape), np.uint8)
        if self._count == len(self._array):
            # In place where the system can move memory without copying it.
            self._array.resize((self._count + self._count // 4, *image.shape), refcheck=False)
        self._array[self._count] = image
        self._count += 1

    def widen(self) -> None:
        """Repeat the grey channel three times."""
        if self._array is not None:
            grey = self._array
            self._array = np.empty((len(grey), 3, *grey.shape[2:]), np.uint8)
            self._array[: self._count] = grey[: self._count]

    def images(self) -> np.ndarray:
        """Return the images, (N, C, H, W)."""
        assert self._array is not None
        if self._count < len(self._array):
            self._array.resize((self._count, *self._array.shape[1:]), refcheck=False)
        return self._array


@dataclass
class Decoded:
    """What was found out while a source was gone through; the images themselves are in a `Store`.

    Args:
        labels: Class numbers, int64, shape (N,), or None.
        class_names: What they mean.
        captions: One for each image, or empty if there are none.
        skipped: Name and reason of every picture that could not be read.
        enlarged: How many were smaller than the size asked.
        smallest: Width and height of the smallest of these.
    """

    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    captions: Sequence[str | None] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    enlarged: int = 0
    smallest: tuple[int, int] | None = None


def decode(
    source: Source,
    store: Store,
    size: int | None,
    channels: int | None,
    on_progress: OnProgress | None = None,
) -> Decoded:
    """Decode all pictures of a source into a store; only a few are held outside it.

    Args:
        source: The pictures.
        store: Gets the images.
        size: Edge of the square images in pixels; None if all have one shape already.
        channels: 1, 3, or None: 1 if every image is grey, else 3.
        on_progress: Told how far it is.

    Raises:
        DataError: If nothing can be read, or shapes differ and no size is given.
    """
    total, notes = source.count(), _Notes()
    first: tuple[str, tuple[int, ...]] | None = None
    colour = channels == 3
    for done, (picture, result) in enumerate(_results(source.pictures(), size, channels), 1):
        if on_progress is not None and done % (8 * TOGETHER) == 0:
            on_progress("decoding", done, total)
        if isinstance(result, _Broken):
            notes.skip(picture, result.reason)
            continue
        pixels, original = result
        shape = pixels.shape[:2]
        if first is None:
            first = picture.name, shape
        elif shape != first[1]:
            raise _sizes_differ(*first, picture.name, shape)
        if pixels.ndim == 3 and not colour:
            store.widen()
            colour = True
        image = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        store.add(np.broadcast_to(image, (3 if colour else 1, *shape)))
        notes.keep(picture, original, size)
    if not notes.kept:
        raise _nothing_read(source.root, notes.skipped)
    return notes.decoded(source)


@dataclass
class _Notes:
    """Labels, captions and faults, gathered as the pictures pass by."""

    kept: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    captions: CaptionList = field(default_factory=CaptionList)
    seen: set[str] = field(default_factory=set)
    unlabelled: str | None = None
    enlarged: int = 0
    smallest: tuple[int, int] | None = None
    _same: dict[str, str] = field(default_factory=dict)

    def keep(self, picture: Picture, original: tuple[int, int], size: int | None) -> None:
        self._see(picture)
        label = picture.label  # each class name is held once
        self.labels.append(None if label is None else self._same.setdefault(label, label))
        self.captions.append(picture.caption)
        self.kept += 1
        if size is not None and min(original) < size:
            self.enlarged += 1
            if self.smallest is None or min(original) < min(self.smallest):
                self.smallest = original

    def skip(self, picture: Picture, reason: str) -> None:
        self._see(picture)
        self.skipped.append((picture.name, reason))

    def decoded(self, source: Source) -> Decoded:
        classes = source.class_of(sorted(self.seen))
        labels, names = None, ()
        if classes:
            if self.unlabelled is not None:
                raise DataError(
                    f"some images in {source.root} have a class and some have none, such as "
                    f"{self.unlabelled}; give each a class, or none"
                )
            names = order_classes(set(classes.values()), str(source.root))
            number = {name: k for k, name in enumerate(names)}
            # 07 and 7 are one class number.
            of = {c: number[c] if c in number else int(c) for c in set(classes.values())}
            labels = np.array([of[classes[label]] for label in self.labels if label is not None])
        return Decoded(
            labels=labels,
            class_names=names,
            captions=self.captions.captions(),
            skipped=tuple(self.skipped),
            enlarged=self.enlarged,
            smallest=self.smallest,
        )

    def _see(self, picture: Picture) -> None:
        if picture.label is not None:
            self.seen.add(picture.label)
        elif self.unlabelled is None:
            self.unlabelled = picture.name


@dataclass(frozen=True)
class _Broken:
    reason: str


Result = tuple[np.ndarray, tuple[int, int]] | _Broken


def _results(
    pictures: Iterator[Picture], size: int | None, channels: int | None
) -> Iterator[tuple[Picture, Result]]:
    """Decode pictures on all cores, in order, a bounded number ahead."""

    def work(some: list[Picture]) -> list[tuple[Picture, Result]]:
        return [(picture, _decode_one(picture, size, channels)) for picture in some]

    # Decoding releases the interpreter lock, so threads help.
    threads = min(16, os.cpu_count() or 1)
    waiting: deque[Future[list[tuple[Picture, Result]]]] = deque()
    pool = ThreadPoolExecutor(max_workers=threads)
    try:
        while some := list(islice(pictures, TOGETHER)):
            waiting.append(pool.submit(work, some))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_one(picture: Picture, size: int | None, channels: int | None) -> Result:
    try:
        with Image.open(picture.open()) as image:
            original = image.size
            return to_pixels(image, size, channels), original
    except MemoryError as error:
        edge = "its own size" if size is None else f"{size}x{size} pixels"
        raise DataError(
            f"there is not enough memory to decode {picture.name} at {edge}; give a smaller size (--size 64)"
        ) from error
    except Exception as error:  # decoders raise almost anything on malformed bytes
        return _Broken(f"{type(error).__name__}: {error}")


def _sizes_differ(
    name: str, shape: tuple[int, ...], other: str, others: tuple[int, ...]
) -> DataError:
    return DataError(
        f"the images differ in size: {name} is {shape[1]}x{shape[0]} and "
        f"{other} is {others[1]}x{others[0]} pixels. Give a size, such as "
        "size=64 (--size 64): every image is then cut to its central square and resized"
    )


def _nothing_read(root: Path, skipped: list[tuple[str, str]]) -> DataError:
    if not skipped:
        return DataError(
            f"no images in {root}; put files there that end in .png, .jpg, .webp and the like"
        )
    name, reason = skipped[0]
    return DataError(
        f"none of the {len(skipped)} images in {root} could be read; the first was {name}: "
        f"{reason}. Save them again as PNG or JPEG"
    )
