"""The image set in memory and the check before training."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.data import ImageSet, check_images
from fewstep.errors import DataError, InvalidInputError


def noise(count: int, channels: int = 1, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def labelled(labels: Tensor, names: int = 3, count: int = 600) -> ImageSet:
    return ImageSet(noise(count), labels, tuple("abcdefgh"[:names]))


def test_batch_is_the_documented_formula() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    images, labels = ImageSet(every_byte).batch(range(256))
    assert images.dtype == torch.float32 and labels is None
    expected = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    torch.testing.assert_close(images.flatten().double(), expected, atol=1e-7, rtol=0)
    assert images.min() == -1 and images.max() == 1


@pytest.mark.parametrize(
    "indices", [[4, 0, 4], np.array([4, 0, 4]), torch.tensor([4, 0, 4]), range(2)], ids=repr
)
def test_batch_takes_any_order(indices: list[int]) -> None:
    labels = torch.tensor([5, 6, 7, 8, 9])
    images = ImageSet(noise(5), labels, tuple("0123456789"))
    floats, chosen = images.batch(indices)
    assert chosen is not None and chosen.tolist() == [int(labels[i]) for i in indices]
    for image, i in zip(floats, indices, strict=True):
        assert torch.equal(image, images.batch([int(i)])[0][0])
    assert torch.equal(images.images, noise(5))


@pytest.mark.parametrize("indices", [[5], [-1], [0, 9]])
def test_batch_refuses_other_indices(indices: list[int]) -> None:
    with pytest.raises(InvalidInputError, match=r"use 0\.\.4"):
        ImageSet(noise(5)).batch(indices)


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 8, 8), noise(2)[0]])
def test_only_bytes_are_held(images: Tensor) -> None:
    with pytest.raises(DataError, match="to_uint8"):
        ImageSet(images)


def test_good_data_has_no_findings() -> None:
    assert check_images(ImageSet(noise(600))) == []
    assert check_images(labelled(torch.arange(600) % 3)) == []
    assert check_images(ImageSet(noise(600, channels=3))) == []


def with_copies() -> Tensor:
    images = noise(600)
    images[10:13] = images[5]
    return images


def with_constant() -> Tensor:
    images = noise(600)
    images[7], images[9] = 3, 200
    return images


@pytest.mark.parametrize(
    ("images", "severity", "message"),
    [
        (ImageSet(noise(0)), "error", "0 images"),
        (ImageSet(noise(1)), "error", "1 images"),
        (ImageSet(noise(499)), "warning", "499 images"),
        (ImageSet(noise(600, channels=4)), "error", "4 channels"),
        (ImageSet(noise(600, size=7)), "warning", "7x7"),
        (ImageSet(noise(600) // 128), "error", r"0 to 1 instead of 0\.\.255"),
        (ImageSet(noise(600) // 16), "warning", "0 to 15"),
        (ImageSet(with_constant()), "warning", "2 of 600 images are constant.*number 7"),
        (ImageSet(noise(600)[:, :, :1, :1].repeat(1, 1, 8, 8)), "error", "all 600 .*constant"),
        (ImageSet(with_copies()), "warning", "3 of 600 .*copies.* 4 times"),
        (ImageSet(noise(1).repeat(600, 1, 1, 1)), "error", "all 600 images are identical"),
        (labelled(torch.zeros(600).long()), "warning", "2 of 3 classes have no image: b, c"),
        (labelled(torch.arange(600) % 4), "error", r"150 labels lie outside 0\.\.2, such as 3"),
        (labelled(torch.arange(600) % 3 - 1), "error", r"200 labels lie outside 0\.\.2"),
        (labelled(torch.arange(599) % 3), "error", r"shape \(599,\) for 600 images"),
        (labelled((torch.arange(600) % 3).int()), "error", "torch.int64"),
        (ImageSet(noise(600), None, ("a",)), "error", "1 class names but no labels"),
        (ImageSet(noise(600), skipped=(("x.png", "cut"),)), "warning", r"1 files .*x\.png \(cut"),
    ],
)
def test_each_fault_is_found(images: ImageSet, severity: str, message: str) -> None:
    findings = check_images(images)
    with_message = [f for f in findings if re.search(message, f.message)]
    assert [f.severity for f in with_message] == [severity], findings


def test_errors_come_first() -> None:
    images = ImageSet(noise(10) // 128, torch.zeros(10).long(), ("a", "b"))
    severities = [finding.severity for finding in check_images(images)]
    assert severities == sorted(severities) and set(severities) == {"error", "warning"}
