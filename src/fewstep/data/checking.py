"""What to know about the images before hours of training go into them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fewstep.data.image_set import ImageSet
from fewstep.data.sources import OnProgress

FEW_IMAGES = 500
SMALLEST_EDGE = 8
NARROW_SPAN = 64


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (``"error"``: do not train) or odd (``"warning"``) with the data."""

    severity: Literal["error", "warning"]
    message: str


def check_images(image_set: ImageSet, on_progress: OnProgress | None = None) -> list[Finding]:
    """Check images and labels before training.

    Args:
        image_set: What is about to be trained on.
        on_progress: Called now and then as ``on_progress(what, done, total)``.

    Returns:
        The findings, errors first; an empty list if there is nothing to say.

    >>> [finding.severity for finding in check_images(ImageSet(torch.zeros(3, 1, 8, 8).byte()))]
    ['error', 'warning']
    """
    findings = [
        *_check_count(image_set),
        *_check_shape(image_set),
        *_check_values(image_set, on_progress),
        *_check_labels(image_set),
        *_check_captions(image_set),
        *_check_enlarged(image_set),
        *_check_skipped(image_set),
    ]
    return sorted(findings, key=lambda finding: finding.severity != "error")


def _check_count(image_set: ImageSet) -> Iterator[Finding]:
    count = len(image_set)
    if count < 2:
        yield Finding("error", f"{count} images in {image_set.source}; training needs 2 or more")
    elif count < FEW_IMAGES:
        yield Finding(
            "warning",
            f"{count} images in {image_set.source} are few: below {FEW_IMAGES} a model tends to "
            "memorise them; add images, or expect copies",
        )


def _check_shape(image_set: ImageSet) -> Iterator[Finding]:
    channels, height, width = image_set.shape
    if channels not in (1, 3):
        yield Finding(
            "error",
            f"images have {channels} channels; allowed are 1 (grey) and 3 (RGB): load them with "
            "channels=1 or channels=3",
        )
    if min(height, width) < SMALLEST_EDGE:
        yield Finding(
            "warning",
            f"images are {width}x{height} pixels; below {SMALLEST_EDGE} a U-Net has nothing left "
            "to halve: load them with a larger size",
        )


@dataclass(frozen=True)
class _Values:
    """What one pass over all images tells: a digest of each (8 bytes), and its lowest and highest value."""

    digests: np.ndarray
    lows: np.ndarray
    highs: np.ndarray

    @classmethod
    def of(cls, image_set: ImageSet, on_progress: OnProgress | None) -> _Values:
        count = len(image_set)
        values = cls(
            np.empty(count, np.uint64), np.empty(count, np.uint8), np.empty(count, np.uint8)
        )
        for start, chunk in image_set.chunks():
            pixels = chunk.cpu().reshape(len(chunk), -1).numpy()
            rows = slice(start, start + len(chunk))
            if on_progress is not None:
                on_progress("checking images", start, count)
            values.lows[rows], values.highs[rows] = pixels.min(1), pixels.max(1)
            values.digests[rows] = np.frombuffer(
                b"".join(
                    hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=8).digest()
                    for row in pixels
                ),
                np.uint64,
            )
        return values


def _check_values(image_set: ImageSet, on_progress: OnProgress | None) -> Iterator[Finding]:
    if image_set.images.numel() == 0:
        return
    values = _Values.of(image_set, on_progress)
    _, frequencies = np.unique(values.digests, return_counts=True)
    total, different = len(image_set), len(frequencies)
    if total > 1 and different == 1:
        yield Finding("error", f"all {total} images are identical; check how they were made")
        return
    copies = total - different
    if copies:
        yield Finding(
            "warning",
            f"{copies} of {total} images are exact copies of others, the most frequent "
            f"occurs {frequencies.max()} times; remove the copies, for the model will prefer "
            "these images",
        )
    yield from _check_range(values.lows, values.highs)


def _check_range(lows: np.ndarray, highs: np.ndarray) -> Iterator[Finding]:
    low, high = int(lows.min()), int(highs.max())
    constant = int((lows == highs).sum())
    if high <= 1:
        yield Finding(
            "error",
            f"pixel values run from {low} to {high} instead of 0..255: floats in [0, 1] were "
            "stored as integers; multiply by 255 before rounding to uint8",
        )
        return
    if high - low < NARROW_SPAN:
        yield Finding(
            "warning",
            f"pixel values run from {low} to {high} only, of 0..255; if they were meant to fill "
            "the range, rescale them before storing uint8",
        )
    if constant == len(lows):
        yield Finding("error", f"all {constant} images are constant: one flat value each")
    elif constant:
        yield Finding(
            "warning",
            f"{constant} of {len(lows)} images are constant, the first is number "
            f"{int((lows == highs).argmax())} counted from 0; remove them",
        )


def _check_labels(image_set: ImageSet) -> Iterator[Finding]:
    labels, names = image_set.labels, image_set.class_names
    if labels is None:
        if names:
            yield Finding(
                "error",
                f"{len(names)} class names but no labels; give one label for each image, or no "
                "class names",
            )
        return
    if labels.shape != (len(image_set),):
        yield Finding(
            "error",
            f"labels have shape {tuple(labels.shape)} for {len(image_set)} images; give exactly "
            "one label for each image",
        )
        return
    if labels.dtype != torch.int64:
        yield Finding("error", f"labels are {labels.dtype}; convert them to torch.int64")
        return
    outside = labels[(labels < 0) | (labels >= len(names))]
    if outside.numel():
        yield Finding(
            "error",
            f"{outside.numel()} labels lie outside 0..{len(names) - 1}, such as "
            f"{int(outside[0])}; there are {len(names)} class names: correct the labels or add "
            "names",
        )
        return
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if empty:
        yield Finding(
            "warning",
            f"{len(empty)} of {len(names)} classes have no image: {', '.join(empty[:5])}; the "
            "model cannot learn them: add images or drop the classes",
        )


def _check_captions(image_set: ImageSet) -> Iterator[Finding]:
    captions = image_set.captions
    if captions and len(captions) != len(image_set):
        yield Finding(
            "error",
            f"{len(captions)} captions for {len(image_set)} images; give one, or None, for each image",
        )
    elif captions and None in captions:
        missing = sum(caption is None for caption in captions)
        yield Finding("warning", f"{missing} of {len(image_set)} images have no caption")


def _check_enlarged(image_set: ImageSet) -> Iterator[Finding]:
    if image_set.enlarged and image_set.smallest is not None:
        width, height = image_set.smallest
        yield Finding(
            "warning",
            f"{image_set.enlarged} of {len(image_set)} images are smaller than the size asked, "
            f"{image_set.shape[2]}, and were enlarged, the smallest from {width}x{height}: the model "
            "will learn their blur; choose a smaller size, or leave them out",
        )


def _check_skipped(image_set: ImageSet) -> Iterator[Finding]:
    if image_set.skipped:
        path, reason = image_set.skipped[0]
        yield Finding(
            "warning",
            f"{len(image_set.skipped)} files could not be read and were left out, the first is "
            f"{path} ({reason}); repair or delete them",
        )
