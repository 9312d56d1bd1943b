"""Numbers of images, one for each, beside the images."""

from __future__ import annotations

from torch import Tensor

from fewstep.devices import moved


def column(values: Tensor, images: Tensor) -> Tensor:
    """Return numbers in their own type on the device of the images, shaped to be multiplied with them.

    Args:
        values: One for each image, shape (B,).
        images: Shape (B, ...).

    Returns:
        Shape (B, 1, ...), with as many dimensions as the images.

    >>> import torch
    >>> column(torch.ones(2), torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 1, 1, 1])
    """
    return moved(values.reshape((-1,) + (1,) * (images.ndim - 1)), images.device)
