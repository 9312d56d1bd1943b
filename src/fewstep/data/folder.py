"""Folders of pictures of any size and kind; class sub-folders become labels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fewstep.data.fitting import stack, to_pixels
from fewstep.data.image_set import ImageSet
from fewstep.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLIT_FOLDERS = {"train", "test", "val", "valid", "validation"}


def read_folder(folder: Path, size: int | None, channels: int | None, split: str) -> ImageSet:
    """Read every picture below ``folder``.

    Sub-folders are classes in the order of their names; what lies deeper belongs to the
    sub-folder. Where the only sub-folders are splits (``train/``, ``test/``), the asked one is
    read. Hidden files and files that are no pictures are passed over; unreadable pictures are
    listed in ``skipped``.

    Args:
        folder: An existing folder.
        size: Edge of the square images in pixels; None if all have one shape already.
        channels: 1, 3, or None: 1 if every image is grey, else 3.
        split: ``"train"`` or ``"test"``.

    Returns:
        The images, with labels if there are class sub-folders.

    Raises:
        DataError: If nothing can be read, shapes differ and no size is given, or pictures lie
            beside class sub-folders.
    """
    root = _split_folder(folder, split)
    files = list(_pictures(root))
    if not files:
        raise DataError(
            f"no images in {root}; put files there that end in {', '.join(SUFFIXES)}, "
            "directly or in one sub-folder for each class"
        )
    class_names = _class_names(root, files)
    pixels, kept, skipped = _decode(files, size, channels)
    if not kept:
        path, reason = skipped[0]
        raise DataError(
            f"none of the {len(files)} images in {root} could be read; the first was {path}: "
            f"{reason}. Save them again as PNG or JPEG"
        )
    labels = [class_names.index(file.relative_to(root).parts[0]) for file in kept if class_names]
    return ImageSet(
        images=stack(pixels),
        labels=torch.tensor(labels) if class_names else None,
        class_names=class_names,
        source=str(root),
        skipped=tuple(skipped),
    )


def _split_folder(folder: Path, split: str) -> Path:
    names = {path.name for path in folder.iterdir() if path.is_dir() and not _hidden(path)}
    if split in names and names <= SPLIT_FOLDERS:
        return folder / split
    if split != "train":
        raise DataError(
            f"{folder} has no {split!r} split: put those images in {folder / split} beside "
            f"{folder / 'train'}, or give the folder of the {split} images with split='train'"
        )
    return folder


def _pictures(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All pictures below a folder in the order of their names; circular links end the descent."""
    resolved = folder.resolve()
    if resolved in above:
        return
    for path in sorted(folder.iterdir()):
        if _hidden(path):
            continue
        if path.is_dir():
            yield from _pictures(path, (*above, resolved))
        elif path.suffix.lower() in SUFFIXES:
            yield path


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"


def _class_names(root: Path, files: list[Path]) -> tuple[str, ...]:
    parts = [file.relative_to(root).parts for file in files]
    names = sorted({part[0] for part in parts if len(part) > 1})
    beside = [part[0] for part in parts if len(part) == 1]
    if names and beside:
        raise DataError(
            f"{root} mixes class sub-folders ({', '.join(names[:3])}) with {len(beside)} images "
            f"that have no class, such as {beside[0]}: move these into a sub-folder, or all "
            "images into one folder for a model without classes"
        )
    return tuple(names)


@dataclass(frozen=True)
class _Broken:
    reason: str


def _decode(
    files: list[Path], size: int | None, channels: int | None
) -> tuple[list[np.ndarray], list[Path], list[tuple[str, str]]]:
    """Pixels and paths of what could be read, and the rest with reasons."""
    pixels: list[np.ndarray] = []
    kept: list[Path] = []
    skipped: list[tuple[str, str]] = []
    # Decoding releases the interpreter lock, so threads help.
    pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
    try:
        for file, result in zip(
            files, pool.map(lambda path: _decode_one(path, size, channels), files), strict=True
        ):
            if isinstance(result, _Broken):
                skipped.append((str(file), result.reason))
                continue
            if pixels and result.shape[:2] != pixels[0].shape[:2]:
                raise _sizes_differ(kept[0], pixels[0], file, result)
            pixels.append(result)
            kept.append(file)
    finally:
        pool.shutdown(cancel_futures=True)
    return pixels, kept, skipped


def _decode_one(path: Path, size: int | None, channels: int | None) -> np.ndarray | _Broken:
    try:
        with Image.open(path) as image:
            return to_pixels(image, size, channels)
    except Exception as error:  # decoders raise almost anything on malformed bytes
        return _Broken(f"{type(error).__name__}: {error}")


def _sizes_differ(path: Path, pixels: np.ndarray, other: Path, others: np.ndarray) -> DataError:
    return DataError(
        f"the images differ in size: {path.name} is {pixels.shape[1]}x{pixels.shape[0]} and "
        f"{other.name} is {others.shape[1]}x{others.shape[0]} pixels. Give a size, such as "
        "size=64 (--size 64): every image is then cut to its central square and resized"
    )
