"""Images from a folder, an ``.npz`` file or a known name, made one size and one channel count."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from fewstep.data.archive import read_npz
from fewstep.data.fitting import refit
from fewstep.data.folder import read_folder
from fewstep.data.image_set import ImageSet
from fewstep.data.named import NAMES, load_named
from fewstep.errors import DataError, unknown_name


def load_images(
    source: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: int | None = None,
    split: str = "train",
) -> ImageSet:
    """Load images for training or measuring.

    A name (``mnist-1000``, ``mnist``, ``fashion-mnist``, ``cifar10``) wins over a folder of the
    same name; write ``./mnist`` (or give a ``Path``) for the folder.

    Args:
        source: A folder of images (sub-folders are classes), an ``.npz`` file, or a name.
        size: Edge of the square images in pixels; every image is cut to its central square and
            resized with antialiasing. None keeps the shape that all images share.
        channels: 1 (grey) or 3 (RGB). None: a folder gets 1 if every image is grey, else 3; other
            sources keep what they have.
        split: ``"train"`` or ``"test"``.

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
    if isinstance(source, str) and source in NAMES:
        return _refitted(load_named(source, split), size, channels)
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return read_folder(path, size, channels, split)
    except OSError as error:
        raise DataError(
            f"cannot read the folder {path}: {error.strerror or error}; check its permissions"
        ) from error
    if path.suffix.lower() == ".npz" and path.exists():
        return _refitted(read_npz(path, str(path), split), size, channels)
    raise _no_such_source(path)


def _check_request(size: int | None, channels: int | None, split: str) -> None:
    if size is not None and (not isinstance(size, int) or size < 1):
        raise DataError(f"size is {size!r}; it is the edge in pixels, a whole number from 1 up")
    if channels not in (None, 1, 3):
        raise DataError(f"channels is {channels!r}; allowed are 1 (grey) and 3 (RGB)")
    if split not in ("train", "test"):
        raise DataError(f"split is {split!r}; allowed are 'train' and 'test'")


def _refitted(image_set: ImageSet, size: int | None, channels: int | None) -> ImageSet:
    return dataclasses.replace(image_set, images=refit(image_set.images, size, channels))


def _no_such_source(path: Path) -> DataError:
    if path.exists():
        return DataError(
            f"{path} is neither a folder of images nor an .npz file; give the folder it lies in, "
            "or store its images with numpy.savez_compressed"
        )
    hint = "Or give an existing folder of images or .npz file"
    return DataError(str(unknown_name("image source", path, NAMES, hint)))
