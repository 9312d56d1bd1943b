"""Loss by level against closed forms; nearest training images against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.data import ImageSet
from fewstep.errors import DataError, InvalidInputError
from fewstep.metrics import loss_by_level, nearest_images


@pytest.mark.parametrize(
    "process", [fs.process.vp_linear(), fs.process.flow(), fs.process.edm()], ids=repr
)
def test_loss_of_the_best_estimate_of_gaussian_data(process):
    """x_0 ~ N(0, v): the best estimate errs by v sigma^2 / (alpha^2 v + sigma^2)."""
    v = 0.3
    x0 = v**0.5 * torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def best(x, t):
        level = process.level(float(t[0]))
        return level.alpha * v / (level.alpha**2 * v + level.sigma**2) * x

    found = loss_by_level(fs.Denoiser(best, process, "data"), x0.double(), levels=4)
    for loss in found:
        level = process.level(loss.t)
        expected = v * level.sigma**2 / (level.alpha**2 * v + level.sigma**2)
        assert loss.data_error == pytest.approx(expected, rel=0.05)
        factor = (level.alpha / level.sigma) ** 2
        assert loss.noise_error == pytest.approx(factor * loss.data_error, rel=1e-6)
        spread = (2 / 64) ** 0.5 * expected / 20  # of a mean of 64 squares, over 400 images
        assert loss.uncertainty == pytest.approx(factor * spread, rel=0.2)
    log_snrs = [loss.log_snr for loss in found]
    assert log_snrs == sorted(log_snrs, reverse=True)


def test_noise_belongs_to_the_image_and_not_to_the_batch():
    model = fs.Denoiser(lambda x, t: torch.tanh(x), fs.process.vp_linear(), "noise")
    x0 = torch.linspace(-1, 1, 7 * 16).reshape(7, 1, 4, 4)
    one, two, other = (
        loss_by_level(model, x0, levels=3, batch_size=size, seed=seed)
        for size, seed in ((7, 0), (2, 0), (7, 1))
    )
    for a, b, c in zip(one, two, other, strict=True):
        assert a.data_error == pytest.approx(b.data_error, rel=1e-6) != c.data_error
    with pytest.raises(InvalidInputError, match="0 images"):
        loss_by_level(model, x0[:0])


def test_labels_go_with_their_images():
    def network(x, t, labels):
        return torch.zeros_like(x) + labels.reshape(-1, 1, 1, 1) / 4

    model = fs.Denoiser(network, fs.process.vp_linear(), "data")
    x0 = (torch.arange(5) / 4).reshape(5, 1, 1, 1).repeat(1, 1, 2, 2)
    right = loss_by_level(model, x0, torch.arange(5), batch_size=2)
    wrong = loss_by_level(model, x0, torch.arange(5).flip(0), batch_size=2)
    assert max(loss.data_error for loss in right) == 0 < min(loss.data_error for loss in wrong)


def image_set(count: int = 300) -> ImageSet:
    pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels.byte())


@pytest.mark.parametrize("kept", [range(300), range(5, 300, 3)])
def test_neighbours_are_those_of_brute_force(monkeypatch, kept):
    images = image_set()
    # Small chunks, so that the best have to be carried along.
    monkeypatch.setattr("fewstep.metrics.neighbours.CHUNK_BYTES", 48 * 7)
    samples = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rows = None if len(kept) == 300 else torch.tensor(kept)
    found = nearest_images(samples, images, rows)
    x = images.batch(kept)[0].flatten(1).double().numpy()
    q = samples.flatten(1).double().numpy()
    distances = np.sqrt(((q[:, None] - x[None]) ** 2).mean(-1))
    order = distances.argsort(1)[:, :2]
    np.testing.assert_array_equal(found.indices, np.array(kept)[order])
    np.testing.assert_allclose(found.distances, np.take_along_axis(distances, order, 1), rtol=1e-6)
    own = np.sqrt(((x[:, None] - x[None]) ** 2).mean(-1))
    np.fill_diagonal(own, math.inf)
    assert found.typical == pytest.approx(torch.tensor(own.min(1)).median().item(), rel=1e-6)


def test_copies_are_counted():
    images = image_set()
    copies, _ = images.batch([3, 250, 7])
    noisy = (copies + 0.02).clamp(-1, 1)
    fresh = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    found = nearest_images(torch.cat([copies, noisy, fresh]), images)
    assert found.indices[:6, 0].tolist() == [3, 250, 7] * 2
    assert found.distances[:3, 0].max() == 0 and found.copies == pytest.approx(6 / 9)
    assert (found.ratios[6:] > 0.6).all()
    assert found.sheet(images).width > 300


def test_a_set_of_doubles_has_copies_only_where_they_are_exact():
    images = ImageSet(image_set(10).images.repeat(2, 1, 1, 1))
    samples = torch.cat([images.batch([4])[0], torch.zeros(1, 3, 4, 4)])
    assert nearest_images(samples, images).copies == 0.5


def test_neighbours_refuse_what_does_not_fit():
    with pytest.raises(DataError, match="one shape"):
        nearest_images(torch.zeros(1, 1, 4, 4), image_set())
    with pytest.raises(DataError, match="two training images"):
        nearest_images(torch.zeros(1, 3, 4, 4), image_set(1))
