"""The files of a shard: the same bytes for the same pictures, whenever and by whomever they are written.

Archives keep a time, an owner and an order of their entries; all of them are fixed here.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from fewstep.checkpoints import write_folder
from fewstep.data import save_image

UNFINISHED = ".tmp-"
NO_TIME = (1980, 1, 1, 0, 0, 0)
"""The first moment that a zip archive can name."""


@dataclass(frozen=True)
class Content:
    """The pictures of a shard.

    Args:
        numbers: Their numbers in the whole.
        images: uint8, shape (N, C, H, W).
        seeds: One for each.
        labels: One for each, or None.
        class_names: What the labels mean.
        records: How each was made.
    """

    numbers: range
    images: Tensor
    seeds: list[int]
    labels: list[int] | None
    class_names: tuple[str, ...]
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """How a shard lies on the disk.

    Args:
        suffix: What its name ends in; empty for a folder.
        write: Writes a shard; what lies under the name is complete or not there.
        count: Number of pictures in a shard.
    """

    suffix: str
    write: Callable[[Path, Content], None]
    count: Callable[[Path], int]


def _write_npz(path: Path, content: Content) -> None:
    """Keys ``images``, uint8 (N, H, W, C), ``seeds``, and ``labels`` and ``class_names`` if there are labels."""
    arrays: dict[str, np.ndarray] = {
        "images": np.ascontiguousarray(content.images.permute(0, 2, 3, 1).numpy()),
        "seeds": np.array(content.seeds, np.int64),
    }
    if content.labels is not None:
        arrays["labels"] = np.array(content.labels, np.int64)
        if content.class_names:
            arrays["class_names"] = np.array(content.class_names)

    def fill(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                entry = zipfile.ZipInfo(f"{name}.npy", NO_TIME)
                entry.external_attr, entry.create_system = 0o644 << 16, 3
                with archive.open(entry, "w", force_zip64=True) as target:
                    np.lib.format.write_array(target, array, allow_pickle=False)

    _replace(path, fill)


def _count_npz(path: Path) -> int:
    # Opened here, for NumPy leaves a file open that it cannot read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return len(archive["seeds"])


def _write_tar(path: Path, content: Content) -> None:
    """The layout of WebDataset: ``000012.png``, ``000012.cls`` with its label if there is one, ``000012.json``."""

    def fill(file: IO[bytes]) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for k, number in enumerate(content.numbers):
                facts: dict[str, Any] = {"number": number, "seed": content.seeds[k]}
                entries = {"png": _png(content.images[k])}
                if content.labels is not None:
                    facts["label"] = content.labels[k]
                    entries["cls"] = str(content.labels[k]).encode()
                entries["json"] = json.dumps(facts).encode()
                for suffix, data in entries.items():
                    entry = tarfile.TarInfo(f"{number:06d}.{suffix}")  # time 0, owner 0
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))

    _replace(path, fill)


def _count_tar(path: Path) -> int:
    with tarfile.open(path, "r:") as archive:
        return sum(name.endswith(".png") for name in archive.getnames())


def _write_png(path: Path, content: Content) -> None:
    """A sub-folder with a file for each picture, which carries its record."""

    def fill(folder: Path) -> None:
        for number, image, record in zip(
            content.numbers, content.images, content.records, strict=True
        ):
            save_image(folder / f"{number:06d}.png", image, record)

    write_folder(path, fill)


def _count_png(path: Path) -> int:
    return sum(file.suffix == ".png" for file in path.iterdir())


FORMATS: Mapping[str, Format] = {
    "npz": Format(".npz", _write_npz, _count_npz),
    "png": Format("", _write_png, _count_png),
    "tar": Format(".tar", _write_tar, _count_tar),
}


def _png(image: Tensor) -> bytes:
    from fewstep.data.fitting import as_picture

    file = io.BytesIO()
    as_picture(image).save(file, format="PNG")
    return file.getvalue()


def _replace(path: Path, fill: Callable[[IO[bytes]], None]) -> None:
    """Write a file under a name that is always the same, so that the next attempt sweeps away what a kill left."""
    temporary = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
