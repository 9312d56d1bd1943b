"""Images from ``.npz`` files: plain arrays, never pickles."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fewstep.data.files import replacing
from fewstep.data.image_set import ImageSet
from fewstep.data.sources import LARGEST_CLASS_NUMBER
from fewstep.errors import DataError

LAYOUT = (
    "an .npz file holds images (uint8; NHW, NHWC or NCHW), optional labels and class_names, or "
    "train_images, train_labels, test_images, test_labels"
)


def read_npz(file: Path | IO[bytes], source: str, split: str) -> ImageSet:
    """Read one split of an ``.npz`` file.

    Keys: ``images``, optional ``labels``, ``captions`` (empty: none) and ``class_names``; or the
    same after ``train_`` and ``test_`` (``class_names`` has no prefix). Images are integers 0..255 of shape (N, H, W),
    (N, H, W, C) or (N, C, H, W) with C = 1 or 3; if the last dimension is 1 or 3 it is taken as
    C. Floats are refused, for [0, 1] and [-1, 1] cannot be told apart safely.

    Args:
        file: A path or an open binary file.
        source: The file's name in messages and records.
        split: ``"train"`` or ``"test"``; a file that only has ``images`` is all ``"train"``.

    Returns:
        The images, with labels if the file has them.

    Raises:
        DataError: If the file cannot be read, holds pickled objects, lacks the split or holds
            values that are not bytes.

    >>> import io
    >>> file = io.BytesIO()
    >>> np.savez(file, images=np.zeros((5, 8, 8), np.uint8), labels=[0, 1, 1, 0, 1])
    >>> _ = file.seek(0)
    >>> digits = read_npz(file, "digits.npz", "train")
    >>> digits.shape, digits.class_names
    ((1, 8, 8), ('0', '1'))
    """
    arrays = _read_arrays(file, source)
    prefix = _prefix(arrays, source, split)
    images = _images(arrays[f"{prefix}images"], source)
    labels = None
    class_names: tuple[str, ...] = ()
    if f"{prefix}labels" in arrays:
        labels = _labels(arrays[f"{prefix}labels"], len(images), source)
        class_names = _class_names(arrays.get("class_names"), labels)
    captions = _captions(arrays.get(f"{prefix}captions"), len(images), source)
    return ImageSet(images, labels, class_names, source, captions=captions)


def write_npz(path: Path, image_set: ImageSet) -> None:
    """Write a set so that `read_npz` gives it back.

    Raises:
        DataError: If the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {"images": image_set.images.cpu().numpy()}
    if image_set.labels is not None:
        arrays["labels"] = image_set.labels.cpu().numpy()
        arrays["class_names"] = np.array(image_set.class_names)
    if image_set.captions:
        arrays["captions"] = np.array([caption or "" for caption in image_set.captions])
    try:
        with replacing(path) as file:
            np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; choose another place"
        ) from error


def _read_arrays(file: Path | IO[bytes], source: str) -> dict[str, np.ndarray]:
    try:
        with (
            file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened,
            np.load(opened, allow_pickle=False) as archive,
        ):
            return {key: archive[key] for key in archive.files}
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(
            f"cannot read {source}: {error}. {LAYOUT[0].upper()}{LAYOUT[1:]}; write it with "
            "numpy.savez_compressed from plain arrays (objects would need pickle, which is never "
            "loaded)"
        ) from error


def _prefix(arrays: Mapping[str, np.ndarray], source: str, split: str) -> str:
    if f"{split}_images" in arrays:
        return f"{split}_"
    if split == "train" and "images" in arrays:
        return ""
    raise DataError(
        f"{source} has no {split!r} images: it holds {', '.join(sorted(arrays)) or 'nothing'}; "
        f"{LAYOUT}"
    )


def _images(array: np.ndarray, source: str) -> Tensor:
    stack = _byte_values(array, source)
    if stack.ndim == 3:
        stack = stack[:, None]
    elif stack.ndim == 4 and stack.shape[-1] in (1, 3):
        stack = stack.transpose(0, 3, 1, 2)
    elif stack.ndim != 4 or stack.shape[1] not in (1, 3):
        raise DataError(
            f"images in {source} have shape {array.shape}; allowed are (N, H, W), "
            "(N, H, W, C) and (N, C, H, W) with C = 1 or 3: reshape them, drop an alpha channel"
        )
    if 0 in stack.shape:
        raise DataError(f"images in {source} have shape {array.shape}: there is nothing to read")
    return torch.from_numpy(np.ascontiguousarray(stack))


def _byte_values(array: np.ndarray, source: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    extent = ""
    if array.size and array.dtype.kind in "iuf":
        low, high = float(array.min()), float(array.max())
        if array.dtype.kind != "f" and 0 <= low and high <= 255:
            return array.astype(np.uint8)
        extent = f" from {low:g} to {high:g}"
    raise DataError(
        f"images in {source} are {array.dtype}{extent}; store uint8, 0..255: "
        "(images * 255).round().astype('uint8') from [0, 1] or booleans, "
        "((images + 1) * 127.5).round().astype('uint8') from [-1, 1]"
    )


def _labels(array: np.ndarray, count: int, source: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise DataError(
            f"labels in {source} are {array.dtype} of shape {array.shape}; needed are integers of "
            f"shape ({count},), one for each image"
        )
    if array.max() > LARGEST_CLASS_NUMBER:
        raise DataError(
            f"labels in {source} go up to {int(array.max())}; class numbers go from 0 to {LARGEST_CLASS_NUMBER} "
            "at most: number the classes from 0"
        )
    return torch.from_numpy(array.astype(np.int64))


def _class_names(names: np.ndarray | None, labels: Tensor) -> tuple[str, ...]:
    if names is None:
        return tuple(str(label) for label in range(int(labels.max()) + 1))
    if names.dtype.kind == "S":
        names = np.char.decode(names, "utf-8")
    return tuple(str(name) for name in names.reshape(-1))


def _captions(array: np.ndarray | None, count: int, source: str) -> tuple[str | None, ...]:
    if array is None:
        return ()
    if array.dtype.kind not in "US" or array.shape != (count,):
        raise DataError(
            f"captions in {source} are {array.dtype} of shape {array.shape}; needed is text of shape "
            f"({count},), one for each image, empty where there is none"
        )
    texts = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
    return tuple(str(text) or None for text in texts)
