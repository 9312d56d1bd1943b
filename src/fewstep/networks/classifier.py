"""A small classifier of 28x28 grey images; its penultimate layer serves as a feature space."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fewstep.errors import InvalidInputError

IMAGE_SIZE = 28
_POOLED_SIZE = 3  # 28 -> 14 -> 7 by the two strided convolutions, then -> 3 by the pooling


class Classifier(nn.Module):
    """Five 3x3 convolutions, a feature layer and a linear read-out; no normalisation layers.

    Without normalisation every image is read on its own, in training as in evaluation, and all
    weights survive float16. He initialisation keeps so shallow a network well-scaled by itself.

    Args:
        channels: Channels at 28x28, 14x14 and 7x7.
        feature_dim: Dimensions of the feature space.
        classes: Number of labels.

    Raises:
        InvalidInputError: A size below one, or not three channel counts.

    Sources: He et al. 2015, arXiv 1502.01852 (initialisation); Heusel et al. 2017,
    arXiv 1706.08500 (penultimate features as the space of a distance between image sets).

    >>> import torch
    >>> with torch.device("meta"):  # shapes alone, without computing
    ...     Classifier()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128),
        feature_dim: int = 64,
        classes: int = 10,
    ) -> None:
        super().__init__()
        if len(channels) != 3 or min(*channels, feature_dim, classes) < 1:
            raise InvalidInputError(
                f"a classifier of channels {tuple(channels)}, feature_dim {feature_dim} and "
                f"classes {classes} cannot be built: give three channel counts, all at least 1"
            )
        self.channels = tuple(channels)
        self.feature_dim = feature_dim
        self.classes = classes
        fine, middle, coarse = self.channels
        self.body = nn.Sequential(
            nn.Conv2d(1, fine, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(fine, middle, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(middle, coarse, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(coarse, coarse, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(coarse * _POOLED_SIZE**2, feature_dim),
        )
        self.read_out = nn.Sequential(nn.ReLU(), nn.Linear(feature_dim, classes))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate layer, before its activation: what distances are measured in.

        Args:
            images: Float in [-1, 1], (B, 1, 28, 28).

        Returns:
            (B, feature_dim), unbounded on both sides, so that a Gaussian can describe them.

        Raises:
            InvalidInputError: Images of another shape.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (1, IMAGE_SIZE, IMAGE_SIZE):
            raise InvalidInputError(
                f"the classifier reads images of shape (B, 1, {IMAGE_SIZE}, {IMAGE_SIZE}), got "
                f"{tuple(images.shape)}: turn them grey and resize them first"
            )
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, 1, 28, 28) in [-1, 1].

        Raises:
            InvalidInputError: Images of another shape.
        """
        return self.read_out(self.features(images))
