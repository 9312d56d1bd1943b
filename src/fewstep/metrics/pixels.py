"""Fréchet distance in the principal components of pixels, for images that no classifier here can read."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.data import ImageSet
from fewstep.metrics.frechet import frechet_distance

COMPONENTS = 32
LARGEST_SET = 10_000
LARGEST_WIDTH = 3072


def pixel_distance(images: Tensor, reference: ImageSet) -> float:
    """Return the Fréchet distance of images to a reference set in its leading principal components.

    It compares brightness, colours and coarse shapes, not what the images show; it is no substitute for distances in
    the features of a classifier, and has no meaning beyond one reference set. Compare it with the same figure of real
    images, as many of them.

    Args:
        images: Floats in [-1, 1], shape (N, C, H, W), N at least 2.
        reference: Real images, 2 or more; of more than 10,000, as many spread evenly over the set.

    Returns:
        The distance, 0 or more, in root-mean-square pixel units squared.

    Raises:
        DataError: If a set is too small.
    """
    rows = torch.linspace(0, len(reference) - 1, min(len(reference), LARGEST_SET)).round().long()
    real = _vectors(reference.batch(rows)[0])
    mean = real.mean(0)
    count = min(COMPONENTS, len(real) - 1, real.shape[1])
    _, vectors = torch.linalg.eigh((real - mean).T @ (real - mean) / len(real))
    components = vectors[:, -count:]
    return frechet_distance((_vectors(images) - mean) @ components, (real - mean) @ components)


def _vectors(images: Tensor) -> Tensor:
    """Pixels in float64, per root of their number; large images are averaged down to `LARGEST_WIDTH` values."""
    x = images.cpu().double()
    while x[0].numel() > LARGEST_WIDTH:
        x = torch.nn.functional.avg_pool2d(x, 2)
    return x.flatten(1) / x[0].numel() ** 0.5
