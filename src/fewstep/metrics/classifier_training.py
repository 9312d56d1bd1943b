"""How the digit classifier is trained and saved."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.data import ImageSet
from fewstep.errors import DataError, InvalidInputError
from fewstep.metrics.digits import CONFIG_FILE, WEIGHTS_FILE, label_accuracy
from fewstep.networks.classifier import IMAGE_SIZE, Classifier


@dataclass(frozen=True)
class Recipe:
    """AdamW, one cycle of the learning rate, and images moved a little at random.

    Args:
        epochs: Passes over the training images, 1 or more.
        seed: Decides initial weights, order and movements; with it and one number of threads the
            result is always the same. From 0 up.
        bf16: Compute in bfloat16 where that is safe; fast on processors that have it.
        batch_size: Images in a step, 1 or more.
        learning_rate: The largest one of the cycle.
        weight_decay: AdamW's.
        degrees: Largest rotation, either way.
        stretch: Largest relative change of size, either way.
        pixels: Largest shift along each axis, either way.

    Raises:
        InvalidInputError: If a number is below its range.

    Sources: Loshchilov, Hutter 2019, arXiv 1711.05101 (AdamW); Smith, Topin 2018,
    arXiv 1708.07120 (one cycle).
    """

    epochs: int = 6
    seed: int = 0
    bf16: bool = False
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    degrees: float = 10.0
    stretch: float = 0.1
    pixels: float = 2.0

    def __post_init__(self) -> None:
        """Refuse numbers that train nothing."""
        if self.epochs < 1 or self.batch_size < 1 or not 0 <= self.seed < 2**63:
            raise InvalidInputError(
                f"epochs is {self.epochs}, batch size {self.batch_size} and seed {self.seed}; "
                "epochs and batch size start at 1, seeds at 0 and end below 2**63"
            )


@dataclass(frozen=True)
class Epoch:
    """One finished pass over the training images."""

    number: int
    loss: float
    test_accuracy: float
    seconds: float


def train(
    train_set: ImageSet, test_set: ImageSet, recipe: Recipe, report: Callable[[Epoch], None]
) -> tuple[Classifier, list[Epoch]]:
    """Train a classifier and return it with the history of its epochs.

    Args:
        train_set: (N, 1, 28, 28) with labels 0..9, N at least the batch size.
        test_set: The same, N at least 1; only looked at for the history.
        recipe: How to train.
        report: Called after each epoch.

    Raises:
        DataError: If the images or labels do not suit the classifier.
    """
    labels, test_labels = _labels(train_set, recipe.batch_size), _labels(test_set, 1)
    generator = torch.Generator().manual_seed(recipe.seed)
    classifier = _initial_classifier(recipe.seed)
    optimiser = torch.optim.AdamW(
        classifier.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        recipe.learning_rate,
        epochs=recipe.epochs,
        steps_per_epoch=len(train_set) // recipe.batch_size,
        pct_start=0.1,
    )
    history = []
    for number in range(1, recipe.epochs + 1):
        start, losses = time.perf_counter(), []
        for chosen in _batches(len(train_set), recipe.batch_size, generator):
            images = augmented(train_set.batch(chosen)[0], recipe, generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                logits = classifier(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            cycle.step()
            losses.append(loss.detach())
        accuracy = label_accuracy(test_set.images, test_labels, classifier=classifier)
        seconds = time.perf_counter() - start
        history.append(Epoch(number, float(torch.stack(losses).mean()), accuracy, seconds))
        report(history[-1])
    return classifier.eval(), history


def augmented(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Rotate, stretch and shift each image at random about its centre; new pixels are black.

    Args:
        images: (B, 1, H, W) in [-1, 1], where -1 is black.
        recipe: The largest angle, stretch and shift.
        generator: Source of the random numbers.
    """

    def symmetric(largest: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * largest

    height, width = images.shape[-2:]
    angle, zoom = symmetric(math.radians(recipe.degrees)), 1 + symmetric(recipe.stretch)
    # affine_grid measures in half image edges.
    right, down = symmetric(2 * recipe.pixels / width), symmetric(2 * recipe.pixels / height)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    matrices = torch.stack([cosine, -sine, right, sine, cosine, down], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    # Sampling fills with 0, so black is moved there for a moment.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write ``config.json`` and the weights as float16 ``model.safetensors``."""
    from safetensors.torch import save

    config = {
        "architecture": "Classifier",
        "arguments": {
            "channels": list(classifier.channels),
            "feature_dim": classifier.feature_dim,
            "classes": classifier.classes,
        },
        "input": {"shape": [1, IMAGE_SIZE, IMAGE_SIZE], "range": [-1, 1]},
    }
    weights = {
        name: weight.half().contiguous() for name, weight in classifier.state_dict().items()
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / WEIGHTS_FILE).write_bytes(save(weights))


def _initial_classifier(seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier()


def _batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    whole = count // batch_size * batch_size
    yield from torch.randperm(count, generator=generator)[:whole].split(batch_size)


def _labels(data: ImageSet, least: int) -> Tensor:
    shape = (1, IMAGE_SIZE, IMAGE_SIZE)
    if data.labels is None or data.shape != shape or len(data) < least:
        raise DataError(
            f"{data.source} holds {len(data)} images of shape {data.shape}, "
            f"{'without' if data.labels is None else 'with'} labels; needed are at least {least} "
            f"of shape {shape} with labels, such as mnist"
        )
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high > 9:
        raise DataError(
            f"labels in {data.source} run from {low} to {high}; the classifier knows 0..9: drop "
            "the other classes"
        )
    return data.labels
