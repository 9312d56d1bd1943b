"""Whether samples are copies: the nearest training images of each, and how near they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from fewstep.data import ImageSet, evenly, labelled_sheet
from fewstep.errors import DataError

COPY_RATIO = 1 / 2
PROBES = 500
CANDIDATES = 4
SHEET_COLUMNS = 12
CHUNK_BYTES = 2**22


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The training images nearest to each sample, by Euclidean distance in pixels.

    Args:
        samples: Floats in [-1, 1], shape (N, C, H, W).
        indices: Numbers of the nearest training images, nearest first, shape (N, K).
        distances: Their distances, root mean square per pixel in [-1, 1], shape (N, K).
        typical: Median distance of a training image to its own nearest neighbour.
    """

    samples: Tensor
    indices: Tensor
    distances: Tensor
    typical: float

    @property
    def ratios(self) -> Tensor:
        """Distance to the nearest training image over the typical one, (N,): near 1 for new images, 0 for copies."""
        if self.typical == 0:  # more than half of the training images occur twice
            return torch.where(self.distances[:, 0] == 0, 0.0, float("inf"))
        return self.distances[:, 0] / self.typical

    @property
    def copies(self) -> float:
        """Share of samples with a ratio below `COPY_RATIO`, 0..1."""
        return (self.ratios < COPY_RATIO).double().mean().item()

    def sheet(self, images: ImageSet) -> Image.Image:
        """Draw the samples that are nearest to training images, each above its nearest two; the ratio on top.

        Args:
            images: The training images.
        """
        order = self.ratios.argsort()[:SHEET_COLUMNS]
        rows = [("sample", self.samples[order])]
        titles = ("nearest in\ntraining", "second\nnearest")
        for title, column in zip(titles, self.indices[order].T, strict=False):
            rows.append((title, images.images[column]))
        return labelled_sheet(rows, [f"{ratio:.2f}" for ratio in self.ratios[order].tolist()])


def nearest_images(samples: Tensor, images: ImageSet, rows: Tensor | None = None) -> Neighbours:
    """Find the training images nearest to samples; the set is gone through in chunks, once.

    Args:
        samples: Floats in [-1, 1], shape (N, C, H, W), N at least 1.
        images: Images of the same shape.
        rows: The numbers of the training images among them, 2 or more; None: all.

    Raises:
        DataError: If the shapes differ or there is nothing to compare.

    >>> images = ImageSet(torch.tensor([0, 100, 255], dtype=torch.uint8).reshape(3, 1, 1, 1))
    >>> found = nearest_images(torch.tensor([-0.99, 0.9]).reshape(2, 1, 1, 1), images)
    >>> found.indices[:, 0].tolist()
    [0, 2]
    """
    rows = torch.arange(len(images)) if rows is None else rows
    if not len(samples) or len(rows) < 2 or tuple(samples.shape[1:]) != images.shape:
        raise DataError(
            f"{len(samples)} samples of shape {tuple(samples.shape[1:])} and {len(rows)} training images of shape "
            f"{images.shape}; needed are samples, two training images, and one shape"
        )
    probes = rows[evenly(len(rows), min(PROBES, len(rows)))]
    probed, _ = images.batch(probes)
    queries = torch.cat([samples.float().cpu(), probed]).flatten(1)
    excluded = torch.cat([torch.full((len(samples),), -1), probes])
    indices, distances = _search(queries, images, rows, excluded)
    typical = distances[len(samples) :, 0].median().item()
    return Neighbours(samples, indices[: len(samples)], distances[: len(samples)], typical)


def _search(
    queries: Tensor, images: ImageSet, rows: Tensor, excluded: Tensor
) -> tuple[Tensor, Tensor]:
    """The nearest two of some images to each query, but for the one excluded, and their distances."""
    kept = min(CANDIDATES, len(rows) - 1)
    best = torch.full((len(queries), kept), float("inf"))
    where = torch.zeros((len(queries), kept), dtype=torch.long)
    for numbers in rows.split(max(1, CHUNK_BYTES // math.prod(images.shape))):
        x = images.images[numbers].flatten(1).float() / 127.5 - 1
        # |q|^2 is the same for all images and is left out.
        squares = x.square().sum(1) - 2 * queries @ x.T
        squares[numbers == excluded[:, None]] = float("inf")
        best, order = torch.cat([best, squares], 1).topk(kept, largest=False)
        where = torch.cat([where, numbers.expand(len(queries), -1)], 1).gather(1, order)
    # The differences of large sums are inexact; those of the few candidates are taken pixel by pixel.
    exact = torch.stack(
        [
            (images.batch(column)[0].flatten(1) - queries).double().square().mean(1).sqrt()
            for column in where.T
        ],
        1,
    )
    exact, order = exact.sort(1)
    return where.gather(1, order)[:, :2], exact[:, :2]
