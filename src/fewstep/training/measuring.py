"""How far samples are from data: a Fréchet distance in features that need no download, for comparison within a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data import ImageSet
from fewstep.metrics import FeatureStatistics, digit_features, frechet_distance, label_accuracy
from fewstep.models import Model, ModelConfig
from fewstep.networks.classifier import IMAGE_SIZE
from fewstep.sampling import sample

CALLS = 10
COMPONENTS = 64
BASIS_IMAGES, REFERENCE_IMAGES, READ_IMAGES, CHUNK = 1000, 10_000, 500, 100
READS = 0.9
"""Share of the labels that the digit classifier has to read right for its features to count."""

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Measurement:
    """A distance between samples and data.

    Args:
        distance: Fréchet distance of the samples to the reference, 0 or more.
        floor: The same of as many images of the data: what no model can be asked to fall below.
        features: Where the distance is measured, ``"digit classifier"`` or ``"pixel PCA"``.
        reference: What the samples are compared with.
        samples: Number of samples.
    """

    distance: float
    floor: float
    features: str
    reference: str
    samples: int

    def figures(self) -> dict[str, Any]:
        """Return what the log is told."""
        return {
            "distance": self.distance,
            "distance_floor": self.floor,
            "distance_in": self.features,
            "distance_to": f"{self.samples} samples to {self.reference}",
        }


class Ruler:
    """Measures how far a network's samples are from images.

    Grey 28x28 images whose labels the bundled digit classifier reads are compared in its features. All others are
    compared in their first 64 principal components, in units of the data's variance ("pixel PCA Fréchet"): it sees
    light, colour and layout, but hardly any detail, and means nothing outside the data set.

    Args:
        images: The reference.
        count: Samples to draw, 2 or more.
        reference: What to call the reference.

    Source: Heusel et al. 2017, arXiv:1706.08500, for the distance.
    """

    def __init__(self, images: ImageSet, count: int, reference: str) -> None:
        self.features: Features
        if _shows_digits(images):
            self.name, self.features = "digit classifier", digit_features
        else:
            self.name, self.features = "pixel PCA", pixel_components(images)
        shown = images.images[_spread(len(images), REFERENCE_IMAGES)]
        self._target = FeatureStatistics.of(self._read(shown))
        self._reference, self._count = f"{len(shown)} {reference}", count
        own = _spread(len(images), count)
        self._floor = self.distance(images.images[own])
        labels = images.labels
        self._labels = (
            None if labels is None else labels[torch.arange(count) * len(images) // count].tolist()
        )

    def measure(self, network: nn.Module, model: ModelConfig) -> Measurement:
        """Draw samples with seeds 0, 1, ... in few calls, the labels in the data's shares; compare them.

        Args:
            network: Is sampled from; it has to be in evaluation mode.
            model: Process, shape and classes.
        """
        samples = sample(
            Model(network, model),
            self._count,
            sampler="dpmpp_2m",
            scheduler="trailing",
            steps=CALLS,
            seed=0,
            labels=self._labels if model.class_names else None,
            batch_size=CHUNK,
        )
        distance = self.distance(samples.uint8())
        return Measurement(distance, self._floor, self.name, self._reference, self._count)

    def distance(self, images: Tensor) -> float:
        """Return the distance of byte images (N, C, H, W), N at least 2, to the reference."""
        return frechet_distance(self._read(images), self._target)

    def _read(self, images: Tensor) -> Tensor:
        return torch.cat([self.features(chunk) for chunk in images.split(CHUNK)])


def pixel_components(images: ImageSet) -> Features:
    """Return the map from byte images to their principal components, in units of the data's standard deviation.

    With the rows x_i of at most 1000 centred images, the eigenvectors v of their Gram matrix give the components
    ``X^T v / |X^T v|``; no matrix as large as pixels by pixels is needed. The images' variances, summed over the
    components kept, come to at most 1.

    Args:
        images: The data.

    Source: Turk, Pentland 1991, Eigenfaces for Recognition.
    """
    rows = _rows(images.images[_spread(len(images), BASIS_IMAGES)])
    mean = rows.mean(0)
    centred = rows - mean
    count = min(COMPONENTS, *centred.shape)
    vectors = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -count:]
    directions = centred.T @ vectors
    directions = directions / directions.norm(dim=0).clamp(min=1e-9)
    directions = directions / centred.square().sum(1).mean().sqrt()
    return lambda some: (_rows(some) - mean) @ directions


def _rows(images: Tensor) -> Tensor:
    return images.flatten(1).cpu().double() / 127.5 - 1


def _spread(count: int, most: int) -> Tensor:
    """Positions spread evenly over ``count``, at most so many."""
    kept = min(count, most)
    return torch.arange(kept) * count // kept


def _shows_digits(images: ImageSet) -> bool:
    """Whether the digit classifier knows what it sees."""
    if images.shape != (1, IMAGE_SIZE, IMAGE_SIZE) or images.num_classes != 10:
        return False
    assert images.labels is not None
    chosen = _spread(len(images), READ_IMAGES)
    return label_accuracy(images.images[chosen], images.labels[chosen]) >= READS
