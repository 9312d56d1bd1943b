"""Arrays from .npz files: every layout, and everything that must be refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.data import load_images
from fewstep.errors import DataError

COLOUR = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)


def saved(folder: Path, **arrays: object) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    "stored",
    [COLOUR, COLOUR.transpose(0, 3, 1, 2), COLOUR.astype(np.int64)],
    ids=["NHWC", "NCHW", "int64"],
)
def test_colour_layouts_agree(tmp_path: Path, stored: np.ndarray) -> None:
    images = load_images(saved(tmp_path, images=stored))
    np.testing.assert_array_equal(images.images, COLOUR.transpose(0, 3, 1, 2))
    assert images.labels is None


@pytest.mark.parametrize("shape", [(7, 5, 6), (7, 5, 6, 1), (7, 1, 5, 6)])
def test_grey_layouts_agree(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = load_images(saved(tmp_path, images=COLOUR[..., 0].reshape(shape)))
    np.testing.assert_array_equal(images.images[:, 0], COLOUR[..., 0])


def test_labels_and_names(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 0, 1, 2, 0], np.uint8)
    images = load_images(
        saved(tmp_path, images=COLOUR, labels=labels, class_names=["cat", "dog", "owl"])
    )
    assert images.class_names == ("cat", "dog", "owl")
    assert images.labels is not None and images.labels.dtype == torch.int64
    assert images.labels.tolist() == labels.tolist()
    assert load_images(saved(tmp_path, images=COLOUR, labels=labels)).class_names == (
        "0",
        "1",
        "2",
    )
    names = np.array([b"cat", b"dog", b"owl"])
    path = saved(tmp_path, images=COLOUR, labels=labels, class_names=names)
    assert load_images(path).class_names == ("cat", "dog", "owl")


def test_splits(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        train_images=COLOUR[:4],
        train_labels=[0, 1, 0, 1],
        test_images=COLOUR[4:],
        test_labels=[1, 0, 1],
        class_names=["cat", "dog"],
    )
    assert len(load_images(path)) == 4
    test = load_images(path, split="test")
    np.testing.assert_array_equal(test.images, COLOUR[4:].transpose(0, 3, 1, 2))
    assert test.labels is not None and test.labels.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="has no 'test' images: it holds images"):
        load_images(saved(tmp_path, images=COLOUR), split="test")


def test_size_and_channels(tmp_path: Path) -> None:
    path = saved(tmp_path, images=COLOUR)
    assert load_images(path, size=4).images.shape == (7, 3, 4, 4)
    assert load_images(path, size=4, channels=1).images.shape == (7, 1, 4, 4)
    grey = load_images(saved(tmp_path, images=COLOUR[..., 0]), channels=3)
    for channel in range(3):
        np.testing.assert_array_equal(grey.images[:, channel], COLOUR[..., 0])


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("a pickle was executed",)

    bombs = np.array([Bomb(), Bomb()], dtype=object)
    for arrays in ({"images": bombs}, {"images": COLOUR, "class_names": bombs}):
        with pytest.raises(DataError, match="pickle, which is never loaded"):
            load_images(saved(tmp_path, **arrays))
    path = tmp_path / "renamed.npz"
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(DataError, match="cannot read"):
        load_images(path)


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.95])
def test_truncated_archive(tmp_path: Path, keep: float) -> None:
    path = saved(tmp_path, images=COLOUR)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    with pytest.raises(DataError, match="cannot read"):
        load_images(path)


def test_corrupted_archive(tmp_path: Path) -> None:
    path = saved(tmp_path, images=COLOUR)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot read"):
        load_images(path)


def test_single_array_under_the_wrong_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", COLOUR)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(DataError, match="cannot read"):
        load_images(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (COLOUR / 255.0, r"float64 from 0 to 1; .*\* 255"),
        (COLOUR / np.float32(127.5) - 1, r"float32 from -1 to 1; .*\+ 1\) \* 127\.5"),
        (COLOUR > 99, r"bool; .*\* 255"),
        (COLOUR.astype(np.int32) - 1, "from -1 to 254"),
        (COLOUR.astype(np.uint16) * 257, "from 0 to 65535"),
        (COLOUR[0, 0], r"shape \(6, 3\)"),
        (COLOUR[..., :2], r"shape \(7, 5, 6, 2\)"),
        (COLOUR[:0], r"shape \(0, 5, 6, 3\)"),
    ],
)
def test_unusable_images(tmp_path: Path, images: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_images(saved(tmp_path, images=images))


@pytest.mark.parametrize("labels", [[0, 1], [0.5] * 7, [[0]] * 7], ids=str)
def test_unusable_labels(tmp_path: Path, labels: list[object]) -> None:
    with pytest.raises(DataError, match=r"labels .* shape \(7,\)"):
        load_images(saved(tmp_path, images=COLOUR, labels=labels))


def test_class_numbers_that_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"go up to 1000000000; class numbers go from 0 to 99999"):
        load_images(saved(tmp_path, images=COLOUR, labels=np.arange(len(COLOUR)) + 10**9 - 6))
