"""What to know about the images before hours of training go into them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.data.image_set import ImageSet

FEW_IMAGES = 500
SMALLEST_EDGE = 8
NARROW_SPAN = 64


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (``"error"``: do not train) or odd (``"warning"``) with the data."""

    severity: Literal["error", "warning"]
    message: str


def check_images(image_set: ImageSet) -> list[Finding]:
    """Check images and labels before training.

    Args:
        image_set: What is about to be trained on.

    Returns:
        The findings, errors first; an empty list if there is nothing to say.

    >>> [finding.severity for finding in check_images(ImageSet(torch.zeros(3, 1, 8, 8).byte()))]
    ['error', 'warning']
    """
    findings = [
        *_check_count(image_set),
        *_check_shape(image_set),
        *_check_values(image_set.images),
        *_check_labels(image_set),
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


def _check_values(images: Tensor) -> Iterator[Finding]:
    if images.numel() == 0:
        return
    digests = Counter(hashlib.blake2b(image.numpy().tobytes()).digest() for image in images.cpu())
    if len(images) > 1 and len(digests) == 1:
        yield Finding("error", f"all {len(images)} images are identical; check how they were made")
        return
    copies = len(images) - len(digests)
    if copies:
        yield Finding(
            "warning",
            f"{copies} of {len(images)} images are exact copies of others, the most frequent "
            f"occurs {max(digests.values())} times; remove the copies, for the model will prefer "
            "these images",
        )
    yield from _check_range(images)


def _check_range(images: Tensor) -> Iterator[Finding]:
    lows, highs = images.flatten(1).amin(1), images.flatten(1).amax(1)
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
    if constant == len(images):
        yield Finding("error", f"all {constant} images are constant: one flat value each")
    elif constant:
        yield Finding(
            "warning",
            f"{constant} of {len(images)} images are constant, the first is number "
            f"{int((lows == highs).nonzero()[0])} counted from 0; remove them",
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


def _check_skipped(image_set: ImageSet) -> Iterator[Finding]:
    if image_set.skipped:
        path, reason = image_set.skipped[0]
        yield Finding(
            "warning",
            f"{len(image_set.skipped)} files could not be read and were left out, the first is "
            f"{path} ({reason}); repair or delete them",
        )
