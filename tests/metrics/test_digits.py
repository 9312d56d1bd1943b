from __future__ import annotations

import json
import re
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data import ImageSet, load_images
from fewstep.errors import CheckpointError, DataError, InvalidInputError, NonFiniteError
from fewstep.metrics import (
    digit_distance,
    digit_features,
    digit_statistics,
    frechet_distance,
    label_accuracy,
    load_classifier,
)
from fewstep.metrics.digits import BATCH_SIZE

BUNDLED = Path(str(resources.files("fewstep"))) / "bundled" / "mnist-classifier"


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_images("mnist-1000")


@pytest.fixture(scope="module")
def labels(digits: ImageSet) -> Tensor:
    assert digits.labels is not None
    return digits.labels


def test_real_digits_are_read(digits: ImageSet, labels: Tensor) -> None:
    assert label_accuracy(digits.images, labels) >= 0.99


def test_accuracy_counts_matches_with_the_labels(digits: ImageSet, labels: Tensor) -> None:
    read = load_classifier()(digits.batch(range(40))[0]).argmax(1)
    assert label_accuracy(digits.images[:40], read) == 1.0
    assert label_accuracy(digits.images[:40], ((read + 1) % 10).tolist()) == 0.0
    read[:10] = (read[:10] + 3) % 10
    assert label_accuracy(digits.images[:40], read.numpy()) == 0.75


def test_features_are_the_classifiers_for_each_image_alone(digits: ImageSet) -> None:
    features = digit_features(digits.images[: BATCH_SIZE + 3])
    assert features.shape == (BATCH_SIZE + 3, 64) and features.dtype == torch.float32
    for k in (0, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 2):
        alone = load_classifier().features(digits.batch([k])[0]).detach()[0]
        torch.testing.assert_close(features[k], alone, rtol=1e-4, atol=1e-4)


def test_floats_and_bytes_are_the_same_images(digits: ImageSet) -> None:
    floats, _ = digits.batch(range(50))
    assert torch.equal(digit_features(floats), digit_features(digits.images[:50]))
    assert torch.equal(digit_features(floats * 1.5), digit_features((floats * 1.5).clamp(-1, 1)))
    assert torch.equal(digit_features(floats.double()), digit_features(floats))


def test_distance_orders_sets_by_likeness(digits: ImageSet) -> None:
    generator = torch.Generator().manual_seed(0)
    floats, _ = digits.batch(range(len(digits)))
    blurred = floats + 0.5 * torch.randn(floats.shape, generator=generator)
    noise = torch.randn(floats.shape, generator=generator)
    real, rough, worst = (digit_distance(images) for images in (floats, blurred, noise))
    # If the statistics belonged to other weights, real digits would lie as far away as the rest.
    variance = float(digit_statistics().covariance.trace())
    assert real < 0.05 * variance
    assert 3 * real < rough < worst


def test_distance_sees_a_missing_class(digits: ImageSet, labels: Tensor) -> None:
    assert digit_distance(digits.images[labels != 3]) > 2 * digit_distance(digits.images)


def test_distance_is_to_the_test_statistics(digits: ImageSet) -> None:
    statistics = digit_statistics()
    assert statistics.count == 10_000 and statistics.mean.shape == (64,)
    expected = frechet_distance(digit_features(digits.images), statistics)
    assert digit_distance(digits.images) == expected


def test_bundled_files_are_small_and_described() -> None:
    assert (BUNDLED / "model.safetensors").stat().st_size <= 1_000_000
    assert (BUNDLED / "test-statistics.npz").stat().st_size < 200_000
    weights = load_file(BUNDLED / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    match = re.search(r"test images read correctly \(10,000\) \| \*\*([\d.]+)%\*\*", card)
    assert match and float(match[1]) >= 99.3


def test_each_call_loads_a_classifier_of_its_own() -> None:
    first, second = load_classifier(), load_classifier()
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert next(second.parameters()).abs().sum() > 0
    assert not second.training
    assert all(weight.dtype == torch.float32 for weight in second.parameters())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 28, 28), r"\(2, 3, 28, 28\).*grey"),
        (torch.zeros(2, 1, 32, 32), "resize"),
        (torch.zeros(28, 28), r"\(28, 28\)"),
        (torch.zeros(0, 1, 28, 28), "one or more"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.int64), r"torch.int64.*torch.uint8"),
        (torch.full((2, 1, 28, 28), 255.0), "divide 0..255 by 127.5"),
    ],
)
def test_images_that_do_not_fit(images: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        digit_features(images)


def test_non_finite_images() -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        digit_distance(torch.full((2, 1, 28, 28), float("nan")))


def test_one_image_has_no_distance(digits: ImageSet) -> None:
    with pytest.raises(DataError, match="at least 2.*add images"):
        digit_distance(digits.images[:1])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2], r"shape \(3,\)"),
        (torch.zeros(3), "integers"),
        (torch.zeros(3, dtype=torch.bool), "integers"),
        ([0, 1, 10], "run from 0 to 10.*0..9"),
        ([-1, 1, 9], "run from -1"),
    ],
)
def test_labels_that_do_not_fit(labels: list[int] | Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_accuracy(torch.zeros(3, 1, 28, 28), labels)


def test_damaged_classifiers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train_classifier"):
        load_classifier(tmp_path)
    shutil.copytree(BUNDLED, tmp_path, dirs_exist_ok=True)
    assert isinstance(load_classifier(tmp_path), torch.nn.Module)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for broken in (
        "{",
        "[]",
        json.dumps(config | {"arguments": {"width": 3}}),
        json.dumps(config | {"arguments": config["arguments"] | {"feature_dim": 32}}),
    ):
        (tmp_path / "config.json").write_text(broken, encoding="utf-8")
        with pytest.raises(CheckpointError, match="cannot load a digit classifier"):
            load_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="cannot load a digit classifier"):
        load_classifier(tmp_path)


def test_a_given_classifier_is_the_judge(digits: ImageSet) -> None:
    judge = load_classifier()
    with torch.no_grad():
        for weight in judge.parameters():
            weight.zero_()
    assert not digit_features(digits.images[:2], classifier=judge).any()
    with pytest.raises(InvalidInputError):
        judge(torch.zeros(1, 1, 8, 8))
