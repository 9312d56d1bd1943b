from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.errors import DataError, InvalidInputError, NonFiniteError
from fewstep.metrics import FeatureStatistics, frechet_distance


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gaussian(mean: list[float], covariance: list[list[float]] | Tensor) -> FeatureStatistics:
    return FeatureStatistics(
        1000,
        torch.tensor(mean, dtype=torch.float64),
        torch.as_tensor(covariance, dtype=torch.float64),
    )


def skewed_features(count: int, dimensions: int, seed: int) -> Tensor:
    """Correlated features; sets of different seeds have covariances that do not commute."""
    mixing = normal(dimensions, dimensions, seed=seed + 100)
    return normal(count, dimensions, seed=seed) @ mixing + seed


def test_gaussians_with_diagonal_covariance() -> None:
    a = gaussian([1.0, 2.0, -1.0], torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    b = gaussian([1.0, 0.0, 2.0], torch.diag(torch.tensor([4.0, 4.0, 1.0])))
    # |mu|^2 = 0 + 4 + 9 and sum (sd_a - sd_b)^2 = 1 + 0 + 4.
    assert frechet_distance(a, b) == pytest.approx(18.0, rel=1e-13)


@settings(max_examples=25)
@given(
    mean=st.floats(-5, 5), one=st.floats(0, 10), other=st.floats(0, 10), count=st.integers(2, 20)
)
def test_one_dimension_is_difference_of_means_and_deviations(
    mean: float, one: float, other: float, count: int
) -> None:
    base = normal(count, 1, seed=count)
    base = (base - base.mean()) / base.std()
    distance = frechet_distance(one * base, other * base + mean)
    assert distance == pytest.approx(mean**2 + (one - other) ** 2, abs=1e-11)


def test_matches_the_complex_matrix_root_of_scipy() -> None:
    a, b = skewed_features(200, 12, seed=1), skewed_features(150, 12, seed=2)
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    assert not np.allclose(cov_a @ cov_b, cov_b @ cov_a)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    shift = a.numpy().mean(0) - b.numpy().mean(0)
    expected = shift @ shift + np.trace(cov_a + cov_b - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(5, 7), (3, 40), (2, 2)])
def test_fewer_vectors_than_dimensions(n: int, m: int) -> None:
    # Tr (S_a S_b)^(1/2) is the nuclear norm of X Y^T / sqrt((n - 1)(m - 1)), X and Y centred:
    # the same number without a covariance or a root of one.
    a, b = skewed_features(n, 16, seed=3), skewed_features(m, 16, seed=4)
    x, y = (a - a.mean(0)) / (n - 1) ** 0.5, (b - b.mean(0)) / (m - 1) ** 0.5
    overlap = torch.linalg.matrix_norm(x @ y.T, ord="nuc")
    expected = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected - 2 * overlap), rel=1e-9)


def test_covariances_without_common_direction() -> None:
    a = gaussian([0.0, 0.0], [[3.0, 0.0], [0.0, 0.0]])
    b = gaussian([0.0, 0.0], [[0.0, 0.0], [0.0, 5.0]])
    assert frechet_distance(a, b) == pytest.approx(8.0, rel=1e-12)


def test_a_point_to_a_cloud_is_shift_and_variance() -> None:
    cloud = skewed_features(50, 4, seed=5)
    point = torch.full((3, 4), 2.0, dtype=torch.float64)
    expected = (cloud.mean(0) - 2).square().sum() + cloud.var(0).sum()
    assert frechet_distance(point, cloud) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("count", [4, 400])
def test_same_set_is_zero_and_order_does_not_matter(count: int) -> None:
    a, b = skewed_features(count, 20, seed=6), skewed_features(count, 20, seed=7)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) > 1.0


def test_rotating_both_sets_changes_nothing() -> None:
    a, b = skewed_features(60, 8, seed=8), skewed_features(60, 8, seed=9)
    rotation = torch.linalg.qr(normal(8, 8, seed=10)).Q
    rotated = frechet_distance(a @ rotation, b @ rotation)
    assert rotated == pytest.approx(frechet_distance(a, b), rel=1e-11)


def test_scaling_one_set() -> None:
    a = skewed_features(60, 8, seed=11)
    expected = 4 * (a.mean(0).square().sum() + a.var(0).sum())
    assert frechet_distance(a, 3 * a) == pytest.approx(float(expected), rel=1e-11)


def test_half_precision_features_are_measured_in_double() -> None:
    a, b = skewed_features(60, 8, seed=12).half(), skewed_features(60, 8, seed=13).half()
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double().numpy())


def test_statistics_are_numpys() -> None:
    features = skewed_features(30, 5, seed=14)
    statistics = FeatureStatistics.of(features)
    assert statistics.count == 30
    np.testing.assert_allclose(statistics.mean, features.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(
        statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-12
    )


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_streaming_equals_batch(sizes: list[int]) -> None:
    # Far from the origin, where a sum of squares would lose every digit of the variance.
    features = skewed_features(sum(sizes), 6, seed=15) + 1e6
    statistics = FeatureStatistics.empty(6)
    for part in features.split(sizes):
        statistics = statistics.update(part)
    whole = FeatureStatistics.of(features)
    assert statistics.count == whole.count == sum(sizes)
    torch.testing.assert_close(statistics.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(statistics.covariance, whole.covariance, rtol=1e-8, atol=1e-8)


def test_merging_in_any_order_gives_the_same() -> None:
    parts = [FeatureStatistics.of(skewed_features(n, 3, seed=n)) for n in (1, 4, 9)]
    forwards = parts[0].merged(parts[1]).merged(parts[2])
    backwards = parts[2].merged(parts[1].merged(parts[0]))
    torch.testing.assert_close(forwards.mean, backwards.mean)
    torch.testing.assert_close(forwards.covariance, backwards.covariance)


def test_saved_statistics_come_back_bit_for_bit(tmp_path: Path) -> None:
    statistics = FeatureStatistics.of(skewed_features(30, 5, seed=16))
    path = tmp_path / "statistics.npz"
    statistics.save(path)
    for source in (path, io.BytesIO(path.read_bytes())):
        loaded = FeatureStatistics.load(source)
        assert loaded.count == 30
        assert torch.equal(loaded.mean, statistics.mean)
        assert torch.equal(loaded.covariance, statistics.covariance)
    assert frechet_distance(FeatureStatistics.load(path), statistics) < 1e-10


def test_unreadable_statistics(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    with pytest.raises(DataError, match="cannot read feature statistics"):
        FeatureStatistics.load(path)
    path.write_bytes(b"PK not really")
    with pytest.raises(DataError, match="statistics.npz"):
        FeatureStatistics.load(path)
    np.savez(path, mean=np.zeros(2), covariance=np.eye(2))
    with pytest.raises(DataError, match="count"):
        FeatureStatistics.load(path)
    np.savez(path, count=np.array({}), mean=np.zeros(2), covariance=np.eye(2))
    with pytest.raises(DataError, match="needed is an .npz file with count, mean"):
        FeatureStatistics.load(path)
    np.savez(path, count=3, mean=np.zeros(2), covariance=np.eye(3))
    with pytest.raises(InvalidInputError, match=r"\(3, 3\)"):
        FeatureStatistics.load(path)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_vectors(count: int) -> None:
    with pytest.raises(DataError, match=rf"{count} feature vector.*at least 2.*add images"):
        frechet_distance(normal(count, 3), normal(10, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_features(value: float) -> None:
    features = normal(10, 3)
    features[4, 1] = features[7, 0] = value
    with pytest.raises(NonFiniteError, match="2 of 10 feature vectors .* number 4"):
        frechet_distance(normal(10, 3), features)
    with pytest.raises(NonFiniteError, match="number 4"):
        FeatureStatistics.empty(3).update(features.numpy())


def test_overflowing_features() -> None:
    with pytest.raises(NonFiniteError, match="scale the features down"):
        FeatureStatistics.of(normal(10, 3) * 1e200)


def test_unequal_dimensions() -> None:
    with pytest.raises(InvalidInputError, match="3 and 4 dimensions"):
        frechet_distance(normal(10, 3), normal(10, 4))
    with pytest.raises(InvalidInputError, match="4 and 3 dimensions"):
        FeatureStatistics.empty(4).update(normal(10, 3))


def test_features_that_are_not_a_matrix() -> None:
    with pytest.raises(InvalidInputError, match=r"\(2, 3, 4\).*\(N, D\)"):
        frechet_distance(normal(2, 3, 4), normal(2, 3))


def test_statistics_that_do_not_belong_together() -> None:
    with pytest.raises(InvalidInputError, match="FeatureStatistics.of"):
        FeatureStatistics(3, torch.zeros(2), torch.zeros(2, 3))
    with pytest.raises(InvalidInputError, match="-1 vectors"):
        FeatureStatistics(-1, torch.zeros(2), torch.zeros(2, 2))
