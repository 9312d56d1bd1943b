"""What is wrong with a picture: losses that tuning can lower.

A loss gives, for results and converged results of shape (B, ...) each, a tensor of shape (B, anything), and the mean of
its squares is lowered. So the difference of the pixels stands for the mean square error.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fewstep.errors import InvalidInputError

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of results and converged results, (B, ...) each; gives (B, anything)."""


def pixels(x: Tensor, target: Tensor) -> Tensor:
    """The difference of the pixels, `x - target`: its mean square is the mean square error."""
    return x - target


def pseudo_huber(width: float) -> Loss:
    """The difference of the pixels, with less weight on pictures that are far off.

    `mean square = 2 width^2 (sqrt(1 + m / width^2) - 1)` of a picture whose pixels have the mean square difference m:
    m where that is small, and growing like its root where it is large. Pictures that go another way altogether then do
    not decide the plan alone.

    Args:
        width: The root mean square difference at which the one passes into the other, > 0.

    Raises:
        InvalidInputError: If width is not a finite number above 0.

    Source: Charbonnier et al. 1997; as a loss of few-step models, Song, Dhariwal 2023, arXiv 2310.14189.

    >>> import torch
    >>> x, target = torch.tensor([[0.01], [1.0]]), torch.zeros(2, 1)
    >>> wrong = pseudo_huber(0.1)(x, target).square().flatten()
    >>> [round(value, 4) for value in wrong.tolist()]
    [0.0001, 0.181]
    """
    if not (0 < width < math.inf):
        raise InvalidInputError(f"width={width!r} must be a finite number above 0")

    return lambda x, target: softened(x - target, width)


def softened(wrong: Tensor, width: float) -> Tensor:
    """The values of a loss, shape (B, anything), scaled to give the pseudo-Huber form of a picture's mean square."""
    flat = wrong.flatten(1)
    share = flat.square().mean(1, keepdim=True) / width**2
    return flat * (2 / ((1 + share).sqrt() + 1)).sqrt()


def features(extract: Callable[[Tensor], Tensor]) -> Loss:
    """The difference of features of the pictures, such as a classifier's.

    Args:
        extract: From pictures, shape (B, ...), to their features, shape (B, anything).

    >>> import torch
    >>> features(lambda x: x.mean(1, keepdim=True))(torch.ones(1, 4), torch.zeros(1, 4))
    tensor([[1.]])
    """
    return lambda x, target: extract(x) - extract(target)
