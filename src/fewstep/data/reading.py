"""Images from a folder, tar shards, an ``.npz`` file or a known name, made one size and one channel count."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from fewstep.data.archive import read_npz
from fewstep.data.cache import cached, default_cache, image_set, is_large
from fewstep.data.decoding import Memory, decode
from fewstep.data.fitting import refit
from fewstep.data.folder import Folder, NoPicturesError, split_folder
from fewstep.data.image_set import ImageSet
from fewstep.data.named import NAMES, load_named
from fewstep.data.shards import Shards, archives_in, is_archive, is_pattern, matching
from fewstep.data.sources import OnProgress, Source
from fewstep.errors import DataError, unknown_name


def load_images(
    source: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    split: str = "train",
    labels: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] = "auto",
    on_progress: OnProgress | None = None,
) -> ImageSet:
    """Load images for training or measuring.

    A name (``mnist-1000``, ``mnist``, ``fashion-mnist``, ``cifar10``) wins over a folder of the
    same name; write ``./mnist`` (or give a ``Path``) for the folder.

    Args:
        source: A folder of images (sub-folders are classes); a tar archive, a folder of them, or a
            pattern such as ``shards/train-{000..012}.tar``; an ``.npz`` file; or a name.
        size: Edge of the square images in pixels; every image is cut to its central square and
            resized with antialiasing. None keeps the shape that all images share.
        channels: 1 (grey) or 3 (RGB). None: files get 1 if every image is grey, else 3; other
            sources keep what they have.
        split: ``"train"`` or ``"test"``.
        labels: A CSV file with the columns file_name and label or caption, for folders and tar
            archives; None: ``labels.csv`` or ``metadata.csv`` in the folder, if there is one.
        cache: Whether decoded images of folders and archives are kept on disk and read from there
            as they are needed: ``"auto"`` if they are many, ``"off"``, or the folder to keep them in.
        on_progress: Called now and then as ``on_progress(what, done, total)``; total may be None.

    Returns:
        The images as one uint8 tensor, with labels where the source has classes; files that could
        not be read are listed in its ``skipped``.

    Raises:
        DataError: If the source does not exist or cannot be used; the message says what to do.

    >>> digits = load_images("mnist-1000")
    >>> len(digits), digits.shape, digits.num_classes
    (1000, (1, 28, 28), 10)
    """
    _check_request(size, channels, split)
    table = None if labels is None else Path(labels).expanduser()
    if table is not None and not table.is_file():
        raise DataError(f"there is no label file {table}; give a CSV file with file_name,label")
    if isinstance(source, str) and source in NAMES:
        _require_no_table(table, source)
        return _refitted(load_named(source, split), size, channels)
    path = Path(source).expanduser()
    if path.suffix.lower() == ".npz" and path.exists():
        _require_no_table(table, source)
        return _refitted(read_npz(path, str(path), split), size, channels)
    try:
        files = _files(path, split, table, on_progress)
        request = {
            "size": size,
            "channels": channels,
            "split": split,
            "labels": None if table is None else str(table.resolve()),
        }
        return _decoded(files, request, cache, on_progress)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; check its permissions"
        ) from error


def _files(path: Path, split: str, table: Path | None, on_progress: OnProgress | None) -> Source:
    """The folder or the archives that a path stands for."""
    if path.is_dir():
        archives = archives_in(path)
        if archives and split == "test":
            return Shards(path, archives, split, table, on_progress)
        root = path if archives else split_folder(path, split)
        try:
            return Folder(root, table, on_progress)
        except NoPicturesError:
            archives = archives or archives_in(root)
            if not archives:
                raise
            return Shards(root, archives, "train" if root != path else split, table, on_progress)
    if path.is_file() and is_archive(path):
        return Shards(path, [path], split, table, on_progress)
    if not path.exists() and is_pattern(str(path)):
        return Shards(path, matching(str(path)), split, table, on_progress)
    raise _no_such_source(path)


def _decoded(
    source: Source,
    request: dict[str, object],
    cache: str | os.PathLike[str],
    on_progress: OnProgress | None,
) -> ImageSet:
    size, channels = request["size"], request["channels"]
    assert size is None or isinstance(size, int)
    assert channels is None or isinstance(channels, int)
    automatic = cache == "auto"
    if cache != "off" and not (automatic and not is_large(source, size)):
        folder = default_cache() if automatic else Path(cache).expanduser()
        return cached(source, request, folder, on_progress)
    store = Memory(source.count())
    found = decode(source, store, size, channels, on_progress)
    return image_set(torch.from_numpy(store.images()), found, str(source.root))


def _require_no_table(table: Path | None, source: object) -> None:
    if table is not None:
        raise DataError(
            f"labels from {table} go with a folder or an archive of images; {source} brings its own"
        )


def _check_request(size: int | None, channels: int | None, split: str) -> None:
    if size is not None and (not isinstance(size, int) or size < 1):
        raise DataError(f"size is {size!r}; it is the edge in pixels, a whole number from 1 up")
    if channels not in (None, 1, 3):
        raise DataError(f"channels is {channels!r}; allowed are 1 (grey) and 3 (RGB)")
    if split not in ("train", "test"):
        raise DataError(f"split is {split!r}; allowed are 'train' and 'test'")


def _refitted(images: ImageSet, size: int | None, channels: int | None) -> ImageSet:
    _, height, width = images.shape
    if size is None or min(height, width) >= size:
        return dataclasses.replace(images, images=refit(images.images, size, channels))
    return dataclasses.replace(
        images,
        images=refit(images.images, size, channels),
        enlarged=len(images),
        smallest=(width, height),
    )


def _no_such_source(path: Path) -> DataError:
    if path.exists():
        return DataError(
            f"{path} is neither a folder of images nor a .tar or .npz file; give the folder it lies in, "
            "or store its images with numpy.savez_compressed"
        )
    hint = "Or give an existing folder of images, tar archive or .npz file"
    return DataError(str(unknown_name("image source", path, NAMES, hint)))
