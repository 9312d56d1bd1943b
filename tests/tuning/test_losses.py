"""Losses of tuning against their formulas."""

from __future__ import annotations

import pytest
import torch

from fewstep.errors import InvalidInputError
from fewstep.tuning.losses import features, pixels, pseudo_huber

X = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = torch.zeros_like(X)


def test_the_square_of_pixels_is_the_mean_square_error():
    assert pixels(X, TARGET).square().mean() == (X - TARGET).square().mean()


@pytest.mark.parametrize("width", [0.01, 0.3, 50.0])
def test_pseudo_huber_is_its_formula(width):
    m = (X - TARGET).square().flatten(1).mean(1)
    formula = 2 * width**2 * ((1 + m / width**2).sqrt() - 1)
    assert torch.allclose(pseudo_huber(width)(X, TARGET).square().mean(1), formula, rtol=1e-10)


def test_features_are_compared_and_not_pixels():
    flipped = X.flip(-1)
    assert float(pixels(X, flipped).abs().max()) > 1
    assert float(features(lambda x: x.mean((-1, -2)))(X, flipped).abs().max()) < 1e-12


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf")])
def test_a_width_that_is_no_width_is_refused(width):
    with pytest.raises(InvalidInputError, match="must be a finite number above 0"):
        pseudo_huber(width)
