"""Clipping and dynamic thresholding against their formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.denoisers import BaseDenoiser

VP = fs.process.vp_linear()
LEVEL = VP.level(500.0)


def constant(value):
    """A denoiser that always gives these images."""
    return fs.Denoiser(lambda x, t: value.to(x.dtype), VP, "data")


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(3)
    sizes = torch.tensor([0.2, 1.0, 3.0, 8.0]).view(4, 1, 1, 1)
    return sizes * torch.randn(4, 3, 9, 7, generator=g)


def test_clipped(images):
    result = fs.Clipped(constant(images))(images, LEVEL)
    np.testing.assert_array_equal(result.numpy(), np.clip(images.numpy(), -1, 1))
    result = fs.Clipped(constant(images), -0.5, 0.25)(images, LEVEL)
    assert (result.min().item(), result.max().item()) == (-0.5, 0.25)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("ceiling", [1.0, 2.5, float("inf")])
def test_dynamic_threshold(images, quantile, ceiling):
    result = fs.DynamicThreshold(constant(images), quantile, ceiling)(images, LEVEL).numpy()
    for image, got in zip(images.double().numpy(), result, strict=True):
        s = min(max(np.quantile(np.abs(image), quantile), 1), ceiling)
        np.testing.assert_allclose(got, np.clip(image, -s, s) / s, rtol=0, atol=3e-6)


def test_dynamic_threshold_leaves_quiet_images_alone_and_looks_at_each_by_itself(images):
    result = fs.DynamicThreshold(constant(images), 0.995)(images, LEVEL)
    assert torch.equal(result[0], images[0])
    alone = fs.DynamicThreshold(constant(images[3:]), 0.995)(images[3:], LEVEL)
    assert torch.equal(result[3:], alone)
    assert result.abs().max() == 1


def test_a_ceiling_of_1_is_clipping(images):
    result = fs.DynamicThreshold(constant(images), 0.9, ceiling=1.0)(images, LEVEL)
    assert torch.equal(result, images.clamp(-1, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: fs.Clipped(d, 1.0, 1.0), "low must be below high"),
        (lambda d: fs.Clipped(d, 1.0, float("nan")), "low must be below high"),
        (lambda d: fs.DynamicThreshold(d, 0.0), r"quantile=0.0 must be in \(0, 1\]"),
        (lambda d: fs.DynamicThreshold(d, 99.5), "0.995 is usual"),
        (lambda d: fs.DynamicThreshold(d, 0.9, 0.5), "ceiling=0.5 must be at least 1"),
    ],
)
def test_bad_numbers(make, message):
    with pytest.raises(fs.errors.InvalidInputError, match=message):
        make(constant(torch.zeros(1, 1)))


WRAPPERS = {
    "clip": fs.Clipped,
    "threshold": fs.DynamicThreshold,
    "guide": lambda d: fs.ClassifierFree(
        d, 3.0, {"labels": 0}, projection=fs.Projection(momentum=-0.5)
    ),
}


@pytest.mark.parametrize("order", list(itertools.permutations(WRAPPERS)), ids="-".join)
def test_wrappers_nest_in_any_order_and_stay_denoisers(order):
    sizes = []

    def network(x, t, labels):
        sizes.append(len(x))
        return x + labels.view(-1, 1) * torch.tensor([0.2, -0.1])

    denoiser = fs.Denoiser(network, VP, "data", {"labels": torch.tensor([1, 2])})
    for name in order:
        denoiser = WRAPPERS[name](denoiser)
    assert isinstance(denoiser, BaseDenoiser)
    assert denoiser.passes == 2
    x = torch.tensor([[0.3, -0.4], [0.1, 0.7]])
    first = denoiser(x, LEVEL)
    assert sizes == [4]  # guidance takes both halves in one call, wherever it stands

    other = denoiser.with_conditions(labels=torch.tensor([2, 2]))
    assert type(other) is type(denoiser)
    assert not torch.equal(other(x, LEVEL)[0], first[0])
    assert torch.equal(other(x, LEVEL)[1], first[1])
    assert torch.equal(denoiser(x, LEVEL), first)

    run = denoiser.for_run()
    assert run is not denoiser  # momentum asks for a copy through every wrapper
    assert torch.equal(run(x, LEVEL), first)
    assert not torch.equal(run(x, LEVEL), first)  # remembers
    assert torch.equal(denoiser(x, LEVEL), first)  # does not
