"""What settings are compared on: a denoiser, noise to start from, and how its pictures are judged."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fewstep as fs
from classifiers import colour_classifier, grey_classifier
from fewstep.denoisers.base import BaseDenoiser
from fewstep.metrics import digit_features, digit_statistics, load_classifier
from fewstep.metrics.frechet import FeatureStatistics

SEEDS = 1 << 41
"""The first seed of the noise: tuning fits on seeds from 0 and compares on seeds from 2^40."""

WIDTH = 0.25
"""Smoothing of the 8x8 digits."""


@dataclass(frozen=True)
class Problem:
    """A model and how its pictures are judged.

    Attributes:
        name: What it is called.
        about: What it is, and what its features are, in a sentence.
        model: The denoiser.
        shape: Shape of one picture.
        classes: Number of classes, which pictures show in turn; 0 if there are none.
        features: From pictures (B, ...) to features (B, D).
        reference: Statistics of the features of real pictures.
        is_network: Whether it takes time, and may compute in bfloat16.
        tuning: Arguments of `fewstep.tune`.
    """

    name: str
    about: str
    model: BaseDenoiser
    shape: tuple[int, ...]
    classes: int
    features: Callable[[Tensor], Tensor]
    reference: FeatureStatistics
    is_network: bool
    tuning: Mapping[str, Any] = field(default_factory=dict)

    def denoiser(self, rows: range) -> BaseDenoiser:
        """The denoiser of these pictures, which know their class."""
        if not self.classes:
            return self.model
        return self.model.with_conditions(labels=torch.tensor(list(rows)) % self.classes)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def exact() -> Problem:
    """The exact denoiser of scikit-learn's 8x8 digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    judge, accuracy = grey_classifier(images, torch.tensor(digits.target), WIDTH)
    # The model's own data are the smoothed digits.
    generator = torch.Generator().manual_seed(0)
    smoothed = images.repeat(5, 1, 1, 1)
    smoothed = smoothed + WIDTH * torch.randn(smoothed.shape, generator=generator)
    return Problem(
        "exact",
        f"The exact denoiser of scikit-learn's {len(images)} digits of 8x8, smoothed by {WIDTH}. Features: "
        f"{judge.width} of a small classifier of them (right on {accuracy:.1%} of what it was not trained on).",
        fs.exact.Dataset(images, WIDTH, process=fs.process.vp_linear(), chunk=len(images)),
        (1, 8, 8),
        0,
        judge.features,
        FeatureStatistics.of(judge.features(smoothed)),
        False,
        {"images": 1024, "held_out": 512, "batch_size": 256},
    )


def digits() -> Problem:
    """The bundled model of handwritten digits."""
    model = fs.load("digits")
    return Problem(
        "digits",
        "The bundled model of MNIST, labels 0 to 9 in turn. Features: those of the bundled classifier.",
        model,
        model.shape,
        model.num_classes,
        functools.partial(digit_features, classifier=load_classifier()),
        digit_statistics(),
        True,
        {"images": 64, "held_out": 48},
    )


def cifar(cache: Path, run: Path, data: Path) -> Problem:
    """A model of colour pictures of 32x32, and a classifier of the data it was trained on.

    Args:
        cache: Folder where the classifier is kept.
        run: Folder of a `fewstep train` run, or of a model.
        data: An `.npz` file with images (N, 32, 32, 3) in bytes and labels (N,).
    """
    model = fs.load(run)
    with np.load(data) as stored:
        images = torch.from_numpy(stored["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        labels = torch.from_numpy(stored["labels"].astype(np.int64))
    digest = hashlib.sha256(data.read_bytes()).hexdigest()[:12]
    judge, accuracy = colour_classifier(images, labels, cache / f"judge-{digest}.pt")
    facts = model.config.training
    trained = f", trained on {facts['images_seen']} pictures" if "images_seen" in facts else ""
    return Problem(
        "cifar",
        f"A model of CIFAR-10 without classes{trained}. Features: {judge.width} of a small classifier of {len(images)} "
        f"of its images (right on {accuracy:.1%} of what it was not trained on).",
        model,
        model.shape,
        0,
        judge.features,
        FeatureStatistics.of(judge.features(images)),
        True,
        {"images": 64, "held_out": 48},
    )
