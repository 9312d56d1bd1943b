from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.data import ImageSet, load_images
from fewstep.errors import DataError, InvalidInputError
from fewstep.metrics import digit_features, frechet_distance, label_accuracy, load_classifier
from fewstep.metrics.classifier_card import disjoint_parts
from fewstep.metrics.classifier_training import Epoch, Recipe, augmented, train
from fewstep.metrics.frechet import FeatureStatistics
from fewstep.metrics.train_classifier import main

FEW = Recipe(epochs=1, batch_size=32)
STILL = Recipe(degrees=0.0, stretch=0.0, pixels=0.0)


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_images("mnist-1000")


def first(digits: ImageSet, count: int) -> ImageSet:
    assert digits.labels is not None
    return ImageSet(digits.images[:count], digits.labels[:count], digits.class_names)


def no_report(epoch: Epoch) -> None:
    pass


def weights(digits: ImageSet, recipe: Recipe) -> Tensor:
    classifier, _ = train(first(digits, 96), first(digits, 10), recipe, no_report)
    return torch.cat([weight.detach().flatten() for weight in classifier.parameters()])


def centre(images: Tensor) -> Tensor:
    """The centre of the ink in pixels, (B, 2)."""
    ink = (images[:, 0] + 1).double()
    along = torch.arange(28, dtype=torch.float64)
    total = ink.sum((1, 2))
    return torch.stack([(ink.sum(1) @ along) / total, (ink.sum(2) @ along) / total], 1)


def test_the_command_trains_measures_and_describes(
    digits: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert digits.labels is not None
    images, labels = digits.images[:, 0].numpy(), digits.labels.numpy().astype(np.uint8)
    np.savez(
        tmp_path / "tiny.npz",
        train_images=images[:900],
        train_labels=labels[:900],
        test_images=images[900:],
        test_labels=labels[900:],
    )
    out = tmp_path / "judge"
    command = ["--data", str(tmp_path / "tiny.npz"), "--out", str(out), "--epochs", "4"]
    assert main([*command, "--hardware", "an abacus"]) == 0
    assert "epoch 4: loss" in capsys.readouterr().out

    classifier = load_classifier(out)
    test_images, test_labels = digits.images[900:], digits.labels[900:]
    accuracy = label_accuracy(test_images, test_labels, classifier=classifier)
    assert accuracy > 0.3  # by chance: 0.1
    statistics = FeatureStatistics.load(out / "test-statistics.npz")
    assert statistics.count == 100
    test_features = digit_features(test_images, classifier=classifier)
    assert frechet_distance(test_features, statistics) < 1e-9

    card = (out / "README.md").read_text(encoding="utf-8")
    assert "--data tiny.npz --out judge --epochs 4 --seed 0\n" in card
    assert str(tmp_path) not in card
    assert "an abacus" in card
    assert f"| test images read correctly (100) | **{accuracy:.2%}** |" in card
    distance = frechet_distance(
        digit_features(digits.images[:900], classifier=classifier), statistics
    )
    assert f"| **{distance:.3f}** |" in card


def test_the_seed_decides(digits: ImageSet) -> None:
    once = weights(digits, FEW)
    assert torch.equal(once, weights(digits, FEW))
    assert not torch.equal(once, weights(digits, Recipe(epochs=1, batch_size=32, seed=1)))


def test_bfloat16_trains_too(digits: ImageSet) -> None:
    low = weights(digits, Recipe(epochs=1, batch_size=32, bf16=True))
    assert low.isfinite().all() and low.dtype == torch.float32
    assert not torch.equal(low, weights(digits, FEW))


def test_history_is_reported_epoch_by_epoch(digits: ImageSet) -> None:
    seen: list[Epoch] = []
    recipe = Recipe(epochs=2, batch_size=32)
    _, history = train(first(digits, 64), first(digits, 10), recipe, seen.append)
    assert seen == history
    assert [epoch.number for epoch in history] == [1, 2]
    assert all(epoch.loss > 0 and 0 <= epoch.test_accuracy <= 1 for epoch in history)


def test_augmentation_without_movement_is_the_image(digits: ImageSet) -> None:
    images, _ = digits.batch(range(20))
    unmoved = augmented(images, STILL, torch.Generator().manual_seed(0))
    torch.testing.assert_close(unmoved, images, atol=1e-4, rtol=0)


def test_augmentation_shifts_by_up_to_the_pixels_asked(digits: ImageSet) -> None:
    images, _ = digits.batch(range(200))
    images[:, :, :4] = images[:, :, -4:] = images[..., :4] = images[..., -4:] = -1
    recipe = Recipe(degrees=0.0, stretch=0.0, pixels=2.0)
    moved = augmented(images, recipe, torch.Generator().manual_seed(0))
    distance = (centre(moved) - centre(images)).abs()
    assert distance.max() <= 2.0 + 1e-3
    assert (distance.amax(0) > 1.9).all()


def test_augmentation_rotates_by_up_to_the_degrees_asked() -> None:
    # A dot 10 pixels right of the centre moves by 10 sin(angle).
    images = torch.full((200, 1, 28, 28), -1.0)
    images[..., 13:15, 23:25] = 1.0
    recipe = Recipe(degrees=20.0, stretch=0.0, pixels=0.0)
    moved = augmented(images, recipe, torch.Generator().manual_seed(0))
    height = (centre(moved) - 13.5)[:, 1].abs() / 10
    assert 0.95 * np.sin(np.radians(20)) < height.max() < 1.05 * np.sin(np.radians(20))


def test_augmentation_stays_in_range_and_black_stays_black(digits: ImageSet) -> None:
    images, _ = digits.batch(range(20))
    images[0] = -1.0
    moved = augmented(images, Recipe(), torch.Generator().manual_seed(0))
    assert torch.equal(moved[0], images[0])
    assert -1 <= moved.min() and moved.max() <= 1 + 1e-6
    assert not torch.allclose(moved[1:], images[1:], atol=0.1)


@pytest.mark.parametrize("numbers", [{"epochs": 0}, {"batch_size": 0}, {"seed": -1}])
def test_numbers_that_train_nothing(numbers: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="start at 1"):
        Recipe(**numbers)  # pyright: ignore[reportArgumentType]


def test_data_that_does_not_fit(digits: ImageSet) -> None:
    fine = first(digits, 64)
    colour = ImageSet(torch.zeros(64, 3, 32, 32, dtype=torch.uint8), fine.labels)
    letters = ImageSet(fine.images, torch.arange(64))
    for wrong, message in (
        (ImageSet(fine.images), "without labels"),
        (colour, r"\(3, 32, 32\)"),
        (letters, "run from 0 to 63"),
        (first(digits, 31), "at least 32"),
    ):
        with pytest.raises(DataError, match=message):
            train(wrong, fine, FEW, no_report)
    with pytest.raises(DataError, match="at least 1"):
        train(fine, first(digits, 0), FEW, no_report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "none.npz", "--out", "judge"], "none.npz"),
        (["--data", "mnist-1000", "--out", "judge", "--epochs", "0"], "epochs is 0"),
        (["--data", "pair.npz", "--out", "taken"], "cannot write to taken"),
    ],
)
def test_bad_requests_end_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.uint8)
    np.savez(
        "pair.npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
    )
    Path("taken").touch()
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_parts_are_disjoint_and_balanced() -> None:
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 2, 1, 1, 1, 2])  # 4 zeros, 6 ones
    parts = disjoint_parts(labels, size=7)
    assert [len(part) for part in parts] == [6, 6]
    assert len(torch.cat(parts).unique()) == 12
    for part in parts:
        assert labels[part].bincount().tolist() == [2, 2, 2]
    (whole,) = disjoint_parts(labels, size=100)
    assert labels[whole].bincount().tolist() == [4, 4, 4]
