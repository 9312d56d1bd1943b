"""Augmentation that does not leak: images are moved and bent, and the network is told how.

A network that sees turned images learns to make turned images. Here it is also given the numbers that say how each
image was turned; with all of them zero, as in sampling, it makes images that are not.

Source: Karras, Aittala, Aila, Laine 2022, arXiv:2206.00364, appendix F.2 and table 6; the transforms come from
Karras et al. 2020, arXiv:2006.06676.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

WIDTH = 9
"""Numbers that describe an augmentation: see `draw_augmentations`."""

SCALE_STEP = 2**0.2
SHIFT_STEP = 1 / 8
BLUR_RADIUS = 4


def draw_augmentations(count: int, probability: float, generator: Generator) -> Tensor:
    """Draw the nine numbers of each image; a transform that is off has zeros.

    ====== ================================================================================================
    0, 1   mirrored left-right, mirrored top-bottom: 0 or 1
    2      scale ``2^(0.2 a)``, a standard normal
    3, 4   rotation by an angle r uniform in [-pi, pi), anticlockwise: ``cos r - 1, sin r``
    5, 6   stretched by ``2^(0.2 b)`` along a direction q, by ``2^(-0.2 b)`` across: ``b cos 2q, b sin 2q``
    7, 8   shifted to the right and down, standard normal, in eighths of the width and height
    ====== ================================================================================================

    Two differences to the source. There the stretch is told by ``b cos q, b sin q``, which is the same for a stretch
    and for the opposite one along the same line (b, q and -b, q + pi); with twice the angle, numbers and transforms
    are one to one. And there images are always mirrored left-right, here with the same probability as all else.

    Args:
        count: Number of images B.
        probability: Of each transform, in [0, 1].
        generator: A CPU generator.

    Returns:
        float32, shape (B, 9).
    """

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator)

    def normal() -> Tensor:
        return torch.randn(count, generator=generator)

    def on() -> Tensor:
        return (uniform() < probability).float()

    mirror_x, mirror_y = (on() * (uniform() < 0.5) for _ in range(2))
    scale = on() * normal()
    angle = on() * (2 * uniform() - 1) * math.pi
    stretch, direction = on() * normal(), (2 * uniform() - 1) * math.pi
    shifted = on()
    columns = [
        *(mirror_x, mirror_y, scale, angle.cos() - 1, angle.sin()),
        *(stretch * (2 * direction).cos(), stretch * (2 * direction).sin()),
        *(shifted * normal(), shifted * normal()),
    ]
    return torch.stack(columns, 1)


def apply_augmentations(images: Tensor, conditions: Tensor) -> Tensor:
    """Apply the transforms that the nine numbers describe; they alone decide what happens.

    In the order mirror, scale, rotate, stretch, shift, about the centre. Pixels are read off the mirrored image by
    bicubic interpolation, which leaves it as it is under whole shifts and quarter turns; beyond its edges the image
    goes on as its reflection. Where a transform shrinks the image it is first blurred by a Gaussian of the variance
    ``(s^2 - 1) / 4`` pixels^2, with s how many old pixels fall on a new one at most, so that nothing aliases. What
    the interpolation carries beyond [-1, 1] is cut.

    Args:
        images: Floats in [-1, 1], shape (B, C, H, W).
        conditions: Shape (B, 9).

    Returns:
        The images, in their type.
    """
    mirror_x, mirror_y = (conditions[:, k, None, None, None] > 0.5 for k in (0, 1))
    mirrored = torch.where(mirror_x, images.flip(-1), images)
    mirrored = torch.where(mirror_y, mirrored.flip(-2), mirrored)
    moved = (conditions[:, 2:] != 0).any(1)
    if not moved.any():
        return mirrored
    result = mirrored.clone()
    result[moved] = _warped(mirrored[moved], conditions[moved].to(images))
    return result


def _warped(images: Tensor, conditions: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    back = torch.linalg.inv(_linear(conditions))
    shift = conditions[:, 7:9] * SHIFT_STEP * conditions.new_tensor([width, height])
    offset = -(back @ shift.unsqueeze(2))
    # In grid_sample's units the image reaches from -1 to 1 in both directions.
    half = conditions.new_tensor([width / 2, height / 2])
    theta = torch.cat([back * half / half[:, None], offset / half[:, None]], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    shrinking = torch.linalg.matrix_norm(back, 2)
    sharp = F.grid_sample(
        _blurred(images, shrinking), grid, "bicubic", "reflection", align_corners=False
    )
    return sharp.clamp(-1, 1)


def _linear(conditions: Tensor) -> Tensor:
    """The linear part of each transform, in pixels, x to the right and y down, shape (B, 2, 2)."""
    scale, cosine, sine = conditions[:, 2], conditions[:, 3] + 1, conditions[:, 4]
    stretch = torch.hypot(conditions[:, 5], conditions[:, 6])
    direction = torch.atan2(conditions[:, 6], conditions[:, 5]) / 2
    size, longer = (SCALE_STEP**power for power in (scale, stretch))
    # y points down, so that an anticlockwise turn has this sign.
    turned = size[:, None, None] * _matrix(cosine, sine, -sine, cosine)
    c, s = direction.cos(), direction.sin()
    axes = _matrix(c, -s, s, c)
    stretched = axes @ _matrix(longer, 0 * c, 0 * c, 1 / longer) @ axes.mT
    return stretched @ turned


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack([a, b, c, d], 1).reshape(-1, 2, 2)


def _blurred(images: Tensor, shrinking: Tensor) -> Tensor:
    """Blur each image as much as its shrinking demands, by two passes of a Gaussian; reflecting the edges."""
    variance = (shrinking.square() - 1).clamp(min=0) / 4
    blurring = variance > 1e-4
    radius = min(BLUR_RADIUS, *(edge - 1 for edge in images.shape[-2:]))
    if not blurring.any() or radius < 1:
        return images
    some = images[blurring]
    batch, channels, height, width = some.shape
    place = torch.arange(-radius, radius + 1).to(images)
    kernel = torch.exp(-place.square() / (2 * variance[blurring, None]))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = some.reshape(1, batch * channels, height, width)
    groups = batch * channels
    flat = F.pad(flat, (radius, radius, radius, radius), "reflect")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=groups)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=groups)
    result = images.clone()
    result[blurring] = flat.reshape(some.shape)
    return result
