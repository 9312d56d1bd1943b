"""The Fréchet distance between two sets of features, and the statistics it needs."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import DataError, InvalidInputError, NonFiniteError


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Count, mean and unbiased covariance of a set of feature vectors, in float64.

    Sets too large for memory are read in parts: ``statistics = statistics.update(features)``.
    Parts combine by the pairwise rule, which subtracts no large sums from each other::

        S = S_a + S_b + (mu_b - mu_a)(mu_b - mu_a)^T n_a n_b / n,    S = (n - 1) covariance

    Args:
        count: Number of vectors, 0 or more.
        mean: (D,), float64.
        covariance: (D, D), float64, divided by count - 1; zero where count is below 2.

    Raises:
        InvalidInputError: If the shapes do not belong together or the count is negative.
        NonFiniteError: If a value is NaN or infinite.

    Source: Chan, Golub, LeVeque 1979, Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances.

    >>> statistics = FeatureStatistics.of(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    >>> statistics.update(torch.tensor([[4.0, 1.0]])).mean.tolist()
    [2.0, 1.0]
    """

    count: int
    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        """Refuse statistics that no set of vectors can have."""
        dimensions = self.mean.numel()
        if (
            self.count < 0
            or self.mean.shape != (dimensions,)
            or self.covariance.shape != (dimensions, dimensions)
        ):
            raise InvalidInputError(
                f"statistics of {self.count} vectors with a mean of shape "
                f"{tuple(self.mean.shape)} and a covariance of shape "
                f"{tuple(self.covariance.shape)}; needed are a count from 0 up, (D,) and (D, D): "
                "make them with FeatureStatistics.of(features)"
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise NonFiniteError(
                f"the mean or covariance of {self.count} feature vectors is NaN or infinite; "
                "scale the features down, or look for the image that caused it"
            )

    @classmethod
    def empty(cls, dimensions: int) -> FeatureStatistics:
        """Return the statistics of no vectors, from which a streaming update starts."""
        return cls(0, _zeros(dimensions), _zeros(dimensions, dimensions))

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> FeatureStatistics:
        """Return the statistics of features (N, D), any float type, on any device.

        Raises:
            InvalidInputError: If the features are not a matrix.
            NonFiniteError: If a value is NaN or infinite; names the first such vector.
        """
        vectors = _as_vectors(features)
        count, dimensions = vectors.shape
        if count == 0:
            return cls.empty(dimensions)
        mean = vectors.mean(0)
        centred = vectors - mean
        return cls(count, mean, centred.T @ centred / max(count - 1, 1))

    def update(self, features: Tensor | np.ndarray) -> FeatureStatistics:
        """Return the statistics of these vectors and of features (N, D) together."""
        return self.merged(FeatureStatistics.of(features))

    def merged(self, other: FeatureStatistics) -> FeatureStatistics:
        """Return the statistics of both sets of vectors together.

        Raises:
            InvalidInputError: If the dimensions differ.
        """
        _check_same_space(self, other)
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        scatter = self._scatter() + other._scatter() + between
        return FeatureStatistics(count, mean, scatter / max(count - 1, 1))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file with the keys ``count``, ``mean`` and ``covariance``."""
        with Path(path).open("wb") as file:
            np.savez(
                file,
                count=self.count,
                mean=self.mean.numpy(),
                covariance=self.covariance.numpy(),
            )

    @classmethod
    def load(cls, file: str | os.PathLike[str] | IO[bytes]) -> FeatureStatistics:
        """Read what `save` wrote, bit for bit.

        Raises:
            DataError: If the file cannot be read or lacks a key.
        """
        try:
            with np.load(file, allow_pickle=False) as archive:
                return cls(
                    int(archive["count"]),
                    torch.from_numpy(archive["mean"].astype(np.float64)),
                    torch.from_numpy(archive["covariance"].astype(np.float64)),
                )
        except (
            OSError,
            EOFError,
            KeyError,
            TypeError,
            AttributeError,
            ValueError,
            zipfile.BadZipFile,
        ) as error:
            raise DataError(
                f"cannot read feature statistics from {file}: {error}; needed is an .npz file "
                "with count, mean (D,) and covariance (D, D), as FeatureStatistics.save writes it"
            ) from error

    def _scatter(self) -> Tensor:
        return self.covariance * max(self.count - 1, 0)


def frechet_distance(
    a: Tensor | np.ndarray | FeatureStatistics, b: Tensor | np.ndarray | FeatureStatistics
) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians fitted to two sets.

    d^2 = |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64. The trace of the root
    is the sum of the roots of the eigenvalues of the symmetric S_a^(1/2) S_b S_a^(1/2), so that
    covariances of any rank are fine and nothing complex appears.

    Few samples make the distance too large: compare sets of equal size, and give the number of
    images with every figure (Chong, Forsyth 2020, arXiv 1911.07023).

    Args:
        a: Features (N, D) in any unit, N at least 2, or their statistics.
        b: The same for the other set; N may differ, D may not.

    Returns:
        The distance, 0 or more, in the features' unit squared.

    Raises:
        DataError: If a set has fewer than 2 vectors, which leaves its covariance undefined.
        InvalidInputError: If features are not matrices or the dimensions differ.
        NonFiniteError: If a value is NaN or infinite.

    Source: Heusel et al. 2017, arXiv 1706.08500.

    >>> spread = torch.tensor([[-1.0], [1.0]])
    >>> round(frechet_distance(spread, spread + 3), 12)
    9.0
    """
    first, second = _as_statistics(a), _as_statistics(b)
    _check_same_space(first, second)
    shift = first.mean - second.mean
    # Those eigenvalues are the squared singular values of S_a^(1/2) S_b^(1/2); taking the latter
    # directly keeps the digits that squaring and a root would lose for small ones.
    overlap = torch.linalg.svdvals(_root(first.covariance) @ _root(second.covariance)).sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * overlap
    return max(float(shift @ shift + spread), 0.0)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    # What lies below the numerical rank is rounding, whose root would no longer be negligible.
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1:].abs()
    return (vectors * values.where(values > rounding, 0.0).sqrt()) @ vectors.T


def _as_statistics(features: Tensor | np.ndarray | FeatureStatistics) -> FeatureStatistics:
    statistics = features
    if not isinstance(statistics, FeatureStatistics):
        statistics = FeatureStatistics.of(statistics)
    if statistics.count < 2:
        raise DataError(
            f"a Fréchet distance from {statistics.count} feature vector(s); a covariance needs at "
            "least 2, and a steady figure at least some ten times the feature dimension "
            f"({len(statistics.mean)}): add images"
        )
    return statistics


def _as_vectors(features: Tensor | np.ndarray) -> Tensor:
    vectors = torch.as_tensor(features).detach().cpu().to(torch.float64)
    if vectors.ndim != 2:
        raise InvalidInputError(
            f"features of shape {tuple(vectors.shape)}; needed is (N, D), one row for each image: "
            "flatten or pool each image's features"
        )
    broken = ~vectors.isfinite().all(1)
    if broken.any():
        raise NonFiniteError(
            f"{int(broken.sum())} of {len(vectors)} feature vectors hold NaN or infinite values, "
            f"the first is number {int(broken.nonzero()[0])} counted from 0; look at its image, "
            "and compute features in float32"
        )
    return vectors


def _check_same_space(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if len(a.mean) != len(b.mean):
        raise InvalidInputError(
            f"feature sets of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared: "
            "compute both with one feature extractor"
        )


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)
