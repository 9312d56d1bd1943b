"""Exact denoisers against numerical integration, Tweedie's formula and brute force in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fewstep as fs
from fewstep.process import Level

DOUBLE = torch.float64
PROCESSES = {
    "vp": fs.process.vp_linear(),
    "ve": fs.process.ve(),
    "flow": fs.process.flow(),
}


def mixture(process, chunk=1024, widths=(0.3, 0.7, 0.2, 0.5)):
    means = torch.tensor([[-1.0, 0.5], [0.3, 1.5], [2.0, -0.4], [0.1, 0.2]], dtype=DOUBLE)
    shares = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=DOUBLE)
    return fs.exact.GaussianMixture(
        means, torch.tensor(widths, dtype=DOUBLE), shares, process=process, chunk=chunk
    )


def levels_of(process):
    return [process.level(process.time(ratio=r)) for r in (0.02, 0.3, 1.0, 4.0, 40.0)]


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_against_numerical_integration(process):
    means, widths, shares = [-1.0, 0.4, 2.0], [0.3, 0.6, 0.25], [0.2, 1.1, 0.7]
    denoiser = fs.exact.GaussianMixture(
        torch.tensor(means, dtype=DOUBLE)[:, None],
        torch.tensor(widths, dtype=DOUBLE),
        torch.tensor(shares, dtype=DOUBLE),
        process=process,
    )
    x0 = np.linspace(-8, 9, 200_001)
    density = sum(
        p / w * np.exp(-((x0 - m) ** 2) / (2 * w * w))
        for m, w, p in zip(means, widths, shares, strict=True)
    )
    for level in levels_of(process):
        points = level.alpha * np.array([-2.0, -0.3, 0.9, 3.0]) + level.sigma * 0.7
        for x, got in zip(points, denoiser(torch.from_numpy(points)[:, None], level), strict=True):
            exponent = -((x - level.alpha * x0) ** 2) / (2 * level.sigma**2)
            posterior = density * np.exp(exponent - exponent.max())
            assert got.item() == pytest.approx((posterior @ x0) / posterior.sum(), rel=1e-9)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_against_tweedies_formula(process):
    denoiser = mixture(process)
    g = torch.Generator().manual_seed(0)
    for level in levels_of(process):
        x = level.alpha * denoiser.sample(6, g)
        x = x + level.sigma * torch.randn(6, 2, generator=g, dtype=DOUBLE)
        x.requires_grad_(True)
        std = ((level.alpha * denoiser.widths) ** 2 + level.sigma**2).sqrt()
        centres = torch.distributions.Normal(level.alpha * denoiser.means, std[:, None])
        parts = centres.log_prob(x[:, None]).sum(2) + denoiser.weights.log()
        (score,) = torch.autograd.grad(parts.logsumexp(1).sum(), x)
        expected = (x + level.sigma**2 * score) / level.alpha
        torch.testing.assert_close(denoiser(x, level), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_chunks_do_not_matter(chunk):
    process = fs.process.vp_linear()
    x = torch.randn(7, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for level in levels_of(process):
        torch.testing.assert_close(
            mixture(process, chunk)(x, level), mixture(process)(x, level), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_chunks_of_images_do_not_matter(chunk):
    process = fs.process.edm()
    g = torch.Generator().manual_seed(0)
    images = torch.rand(300, 1, 5, 5, generator=g) * 2 - 1
    x = images[:3] + 0.5 * torch.randn(3, 1, 5, 5, generator=g)
    got = fs.exact.Dataset(images, 0.1, process=process, chunk=chunk)(x, process.level(0.5))
    expected = brute_force(images, 0.1, x, process.level(0.5))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-7)


def brute_force(images, width, x, level):
    """The posterior mean in float64 from differences, never from squares that cancel."""
    images, x = images.double(), x.double()
    variance = (level.alpha * width) ** 2 + level.sigma**2
    results = []
    for point in x:
        distance = (point - level.alpha * images).square().flatten(1).sum(1)
        share = (-distance / (2 * variance)).softmax(0).view(-1, *(1,) * point.ndim)
        mean = (share * images).sum(0)
        results.append((level.sigma**2 * mean + level.alpha * width**2 * point) / variance)
    return torch.stack(results)


def test_a_single_gaussian_is_a_linear_filter():
    process = fs.process.vp_linear()
    denoiser = fs.exact.GaussianMixture(torch.full((1, 3), 0.5), 2.0, process=process)
    level = process.level(400.0)
    x = torch.tensor([[1.0, -2.0, 0.3]])
    gain = level.alpha * 4 / (level.alpha**2 * 4 + level.sigma**2)
    torch.testing.assert_close(denoiser(x, level), 0.5 + gain * (x - level.alpha * 0.5))


def test_pure_noise_gives_the_mean_of_the_data():
    denoiser = mixture(fs.process.flow())
    x = torch.randn(5, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    shares = denoiser.weights / denoiser.weights.sum()
    expected = (shares[:, None] * denoiser.means).sum(0).expand(5, 2)
    result = denoiser(x, fs.process.flow().noisiest)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("width", [0.0, 0.3])
def test_a_clean_point_is_its_own_estimate(width):
    x = torch.tensor([[-1.0, 0.5], [7.0, 7.0]])
    denoiser = fs.exact.Dataset(x, width, process=fs.process.vp_linear())
    assert torch.equal(denoiser(x + 0.25, denoiser.process.clean), x + 0.25)


def test_data_without_width_are_found_again():
    process = fs.process.edm()
    images = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    denoiser = fs.exact.Dataset(images, 0.0, process=process)
    plan = fs.plan("ddim", fs.schedulers.karras(process, steps=30))
    result = plan.run(denoiser, 80 * fs.Noise([0, 1, 2], (1, 4, 4)).initial())
    nearest = (result[:, None] - images).abs().flatten(2).amax(2).min(1).values
    assert nearest.max() < 1e-6


def test_close_images_at_low_noise_in_float32():
    """The posterior hangs on distances of about 1e-4 between images whose squares are about 800."""
    process = fs.process.edm()
    g = torch.Generator().manual_seed(0)
    base = torch.randn(30, 1, 28, 28, generator=g)
    images = torch.cat([base, base + 0.0005 * torch.randn(30, 1, 28, 28, generator=g)])
    x = (images[:30] + images[30:]) / 2 + 0.01 * torch.randn(30, 1, 28, 28, generator=g)
    level = process.level(0.01)
    expected = brute_force(images, 0.001, x, level)
    # Undecided between each image and its near copy, so that an error in the distances shows.
    distances = (x[:, None].double() - images.double()).square().flatten(2).sum(2)
    odds = (distances[:, 30:] - distances[:, :30]).diagonal() / (2 * 0.01**2)
    assert odds.abs().median() < 3
    result = fs.exact.Dataset(images, 0.001, process=process)(x, level)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation makes, views of the data apart."""

    def __init__(self, data):
        super().__init__()
        self.data, self.numel = data.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for output in tree_leaves(result):
            if isinstance(output, torch.Tensor):
                is_data = output.untyped_storage().data_ptr() == self.data
                self.numel = max(self.numel, 0 if is_data else output.numel())
        return result


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_ten_thousand_images(sigma):
    process = fs.process.edm()
    g = torch.Generator().manual_seed(0)
    images = torch.randn(10_000, 1, 28, 28, generator=g).cumsum(3).tanh()
    x = images[:4] + sigma * torch.randn(4, 1, 28, 28, generator=g)
    denoiser = fs.exact.Dataset(images, 0.02, process=process)
    with Largest(images) as largest:
        result = denoiser(x, process.level(sigma))
    assert largest.numel <= 1024 * 784  # one chunk of images, never all of them
    assert result.dtype == torch.float32
    expected = brute_force(images, 0.02, x, process.level(sigma))
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-7)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own
def test_gradients_and_forward_derivatives_pass_through():
    process = fs.process.vp_linear()
    denoiser, level = mixture(process), process.level(300.0)
    x = torch.tensor([[0.3, -0.2]], dtype=DOUBLE)
    direction = torch.tensor([[0.6, -0.8]], dtype=DOUBLE)
    step = 1e-5
    expected = denoiser(x + step * direction, level) - denoiser(x - step * direction, level)
    _, forward = torch.func.jvp(lambda p: denoiser(p, level), (x,), (direction,))
    torch.testing.assert_close(forward, expected / (2 * step), rtol=1e-7, atol=1e-9)
    backward = torch.autograd.functional.jacobian(lambda p: denoiser(p, level), x).view(2, 2)
    torch.testing.assert_close(backward @ direction[0], forward[0], rtol=1e-12, atol=1e-12)


def test_samples_have_the_moments_of_the_mixture():
    denoiser = mixture(fs.process.edm())
    n = 40_000
    points = denoiser.sample(n, torch.Generator().manual_seed(0))
    again = denoiser.sample(n, torch.Generator().manual_seed(0))
    assert points.shape == (n, 2) and points.dtype == DOUBLE and torch.equal(points, again)
    shares = (denoiser.weights / denoiser.weights.sum())[:, None]
    mean = (shares * denoiser.means).sum(0)
    within = (shares * denoiser.widths[:, None] ** 2).sum()
    offset = denoiser.means - mean
    covariance = (shares * offset).T @ offset + within * torch.eye(2, dtype=DOUBLE)
    error = 5 * covariance.diagonal().max().sqrt() / math.sqrt(n)
    torch.testing.assert_close(points.mean(0), mean, rtol=0, atol=float(error))
    torch.testing.assert_close(points.T.cov(), covariance, rtol=0.05, atol=0.03)


def test_samples_of_images_keep_their_shape():
    images = torch.stack([torch.full((1, 4, 6), -9.0), torch.full((1, 4, 6), 9.0)])
    points = fs.exact.Dataset(images, 0.5, process=fs.process.edm()).sample(
        2000, torch.Generator().manual_seed(1)
    )
    assert points.shape == (2000, 1, 4, 6)
    signs = points.sign().flatten(1)
    assert bool((signs == signs[:, :1]).all()) and 880 < int((signs[:, 0] > 0).sum()) < 1120
    assert (points.abs() - 9).std().item() == pytest.approx(0.5, rel=0.015)


def test_it_knows_its_shape_and_takes_no_conditions():
    images = torch.zeros(3, 1, 4, 4)
    denoiser = fs.exact.Dataset(images, 0.1, process=fs.process.edm())
    assert denoiser.shape == (1, 4, 4) and denoiser.name == "Dataset"
    assert denoiser.parameterisation is None and denoiser.device is None
    assert not hasattr(denoiser, "network")
    with pytest.raises(fs.errors.InvalidInputError, match="takes no conditions, got labels"):
        denoiser.with_conditions(labels=torch.tensor([1]))
    with pytest.raises(fs.errors.InvalidInputError, match=r"\(2, 3, 4, 4\).*give \(B, 1, 4, 4\)"):
        denoiser(torch.zeros(2, 3, 4, 4), Level(1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("means", "options", "message"),
    [
        (torch.zeros(3), {}, r"shape \(3,\).*\(K, \.\.\.\)"),
        (torch.zeros(0, 2), {}, r"shape \(0, 2\)"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), {}, r"uint8.*scaled to \[-1, 1\]"),
        (torch.zeros(3, 2), {"widths": torch.ones(2)}, r"widths of shape \(2,\).*shape \(3,\)"),
        (torch.zeros(3, 2), {"weights": torch.ones(3, 1)}, r"weights of shape \(3, 1\)"),
        (torch.zeros(3, 2), {"weights": torch.tensor([1.0, 0.0, 1.0])}, "weights > 0"),
        (torch.zeros(3, 2), {"widths": -1.0}, "widths >= 0"),
        (torch.zeros(3, 2), {"widths": math.nan}, "widths >= 0"),
        (torch.zeros(3, 2), {"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_bad_mixtures(means, options, message):
    options = {"widths": 1.0, "process": fs.process.edm(), **options}
    with pytest.raises(fs.errors.InvalidInputError, match=message):
        fs.exact.GaussianMixture(means, **options)
