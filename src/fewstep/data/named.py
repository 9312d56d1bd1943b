"""Data sets known by name: fetched once from their official mirrors, checked, kept in a cache."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import logging
import math
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from fewstep.data.archive import read_npz
from fewstep.data.files import cache_dir, replacing
from fewstep.data.image_set import ImageSet
from fewstep.errors import DataError

BUNDLED = "mnist-1000"
TIMEOUT = 30.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A file on the network and the MD5 checksum its authors publish."""

    name: str
    md5: str


@dataclass(frozen=True)
class NamedSet:
    """A data set known by name.

    Args:
        name: The name users give.
        mirrors: Addresses that end in ``/``, tried in this order.
        splits: For ``train`` and ``test``, the files to fetch.
        class_names: In the official order.
        parse: Turns the contents of the split's files into images and labels.
    """

    name: str
    mirrors: tuple[str, ...]
    splits: dict[str, tuple[RemoteFile, ...]]
    class_names: tuple[str, ...]
    parse: Callable[[str, list[bytes]], tuple[Tensor, Tensor]]

    def load(self, split: str) -> ImageSet:
        """Fetch, check and parse one split."""
        folder = cache_dir() / "data" / self.name
        contents = [self._contents(file, folder) for file in self.splits[split]]
        images, labels = self.parse(split, contents)
        return ImageSet(images, labels, self.class_names, self.name)

    def _contents(self, file: RemoteFile, folder: Path) -> bytes:
        path = folder / file.name
        if not path.exists():
            self._fetch(file, path)
        try:
            contents = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        found = _md5(contents)
        if found != file.md5:
            raise DataError(
                f"{path} has MD5 {found}, but the official file has {file.md5}: delete it and "
                f"load {self.name!r} again"
            )
        return contents

    def _fetch(self, file: RemoteFile, path: Path) -> None:
        failures = []
        for mirror in self.mirrors:
            try:
                log.info("downloading %s%s", mirror, file.name)
                _download(mirror + file.name, file.md5, path)
                return
            except (OSError, http.client.HTTPException, ValueError) as error:
                failures.append(f"{mirror}{file.name}: {error}")
        raise DataError(
            f"cannot get {file.name} for {self.name!r} ({'; '.join(failures)}). Save that file "
            f"(MD5 {file.md5}) as {path}, or give a local .npz file or a folder of images instead "
            f"of {self.name!r}; {BUNDLED!r} needs no network"
        )


def _download(url: str, md5: str, path: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "fewstep"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, replacing(path) as file:
        digest = _HashingWriter(file)
        shutil.copyfileobj(answer, digest)
        if digest.md5.hexdigest() != md5:
            raise ValueError(f"the download has MD5 {digest.md5.hexdigest()}, expected {md5}")


class _HashingWriter:
    """Passes bytes on and hashes them, so that a wrong download never gets its final name."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.md5 = hashlib.md5(usedforsecurity=False)

    def write(self, data: bytes) -> int:
        self.md5.update(data)
        return self.file.write(data)


def _md5(contents: bytes) -> str:
    return hashlib.md5(contents, usedforsecurity=False).hexdigest()


def parse_idx(contents: bytes) -> np.ndarray:
    """Parse the IDX format of MNIST: magic ``0 0 8 ndim``, big-endian sizes, then bytes.

    Args:
        contents: The file, gzip-compressed or not.

    Returns:
        uint8 array of the shape in the header.

    Raises:
        DataError: If the header is not that of unsigned bytes or the length does not match it.

    Source: Y. LeCun, C. Cortes, C. Burges, the MNIST database (1998).

    >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])).tolist()
    [7, 8, 9]
    """
    if contents[:2] == b"\x1f\x8b":
        try:
            contents = gzip.decompress(contents)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"not a whole gzip file: {error}; fetch it again") from error
    if len(contents) < 4 or contents[:3] != b"\x00\x00\x08":
        raise DataError(
            f"not an IDX file of unsigned bytes: it begins with {contents[:4].hex(' ')!r} instead "
            "of '00 00 08'; supply the original file"
        )
    start = 4 + 4 * contents[3]
    header = contents[4:start]
    shape = tuple(int.from_bytes(header[k : k + 4], "big") for k in range(0, len(header), 4))
    if len(contents) - start != math.prod(shape):
        raise DataError(
            f"the IDX header promises shape {shape}, but {len(contents) - start} bytes follow; "
            "the file is cut short or damaged: fetch it again"
        )
    return np.frombuffer(contents, dtype=np.uint8, offset=start).reshape(shape).copy()


def parse_cifar_binary(contents: bytes, members: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Parse the binary version of CIFAR-10: records of 1 label byte and 3 x 32 x 32 pixel bytes.

    Args:
        contents: The ``.tar.gz`` file.
        members: File names inside it, read in this order.

    Returns:
        uint8 images ``(N, 3, 32, 32)`` and uint8 labels ``(N,)``.

    Raises:
        DataError: If the archive is damaged, lacks a member or a member has a broken record.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
    """
    record = 1 + 3 * 32 * 32
    try:
        with tarfile.open(fileobj=io.BytesIO(contents), mode="r:gz") as archive:
            found = {Path(member.name).name: member for member in archive if member.isfile()}
            parts = []
            for name in members:
                file = archive.extractfile(found[name])
                parts.append(file.read() if file is not None else b"")
    except (tarfile.TarError, OSError, EOFError, KeyError, zlib.error) as error:
        raise DataError(
            f"not the binary version of CIFAR-10 ({error!r}): it must hold {', '.join(members)}; "
            "supply cifar-10-binary.tar.gz, not the Python or Matlab version"
        ) from error
    data = b"".join(parts)
    if not data or any(len(part) % record for part in parts):
        raise DataError(
            f"CIFAR-10 members of {[len(part) for part in parts]} bytes are not whole records of "
            f"{record} bytes: fetch cifar-10-binary.tar.gz again"
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, record)
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), records[:, 0].copy()


def _parse_idx_pair(split: str, contents: list[bytes]) -> tuple[Tensor, Tensor]:
    images, labels = (parse_idx(part) for part in contents)
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()


def _parse_cifar(split: str, contents: list[bytes]) -> tuple[Tensor, Tensor]:
    train = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
    members = train if split == "train" else ("test_batch.bin",)
    images, labels = parse_cifar_binary(contents[0], members)
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def _idx_splits(
    train: tuple[str, str], test: tuple[str, str]
) -> dict[str, tuple[RemoteFile, ...]]:
    """The four files of MNIST's layout, from the checksums of images and labels."""
    kinds = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
    return {
        split: tuple(
            RemoteFile(f"{stem}-{kind}", md5) for kind, md5 in zip(kinds, sums, strict=True)
        )
        for split, stem, sums in (("train", "train", train), ("test", "t10k", test))
    }


_CIFAR_FILE = RemoteFile("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")

NAMED_SETS: dict[str, NamedSet] = {
    named.name: named
    for named in (
        NamedSet(
            name="mnist",
            mirrors=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
            splits=_idx_splits(
                ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432"),
                ("9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
            ),
            class_names=tuple("0123456789"),
            parse=_parse_idx_pair,
        ),
        NamedSet(
            name="fashion-mnist",
            mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
            splits=_idx_splits(
                ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe"),
                ("bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
            ),
            class_names=(
                "T-shirt/top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ),
            parse=_parse_idx_pair,
        ),
        NamedSet(
            name="cifar10",
            mirrors=("https://www.cs.toronto.edu/~kriz/",),
            splits={"train": (_CIFAR_FILE,), "test": (_CIFAR_FILE,)},
            class_names=(
                "airplane",
                "automobile",
                "bird",
                "cat",
                "deer",
                "dog",
                "frog",
                "horse",
                "ship",
                "truck",
            ),
            parse=_parse_cifar,
        ),
    )
}

NAMES = (BUNDLED, *NAMED_SETS)


def load_named(name: str, split: str) -> ImageSet:
    """Load a data set by name.

    Args:
        name: One of `NAMES`.
        split: ``"train"`` or ``"test"``.

    Returns:
        The images with labels, at their own size.

    Raises:
        DataError: If a file can be had neither from the cache nor from the network.
    """
    if name != BUNDLED:
        return NAMED_SETS[name].load(split)
    if split != "train":
        raise DataError(
            f"{BUNDLED!r} is drawn from MNIST's training set and has no {split!r} split; use "
            "'mnist' with split='test'"
        )
    packaged = resources.files("fewstep.data").joinpath(f"{BUNDLED}.npz")
    with packaged.open("rb") as file:
        return read_npz(file, BUNDLED, split)
