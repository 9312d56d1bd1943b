"""The images a model is trained on: one uint8 tensor, its labels, and where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import DataError, InvalidInputError

Indices = Tensor | Sequence[int] | np.ndarray | range


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory as bytes, ready to be drawn in batches of floats in [-1, 1].

    The fields are kept as given; `check_images` says whether they suit training.

    Args:
        images: uint8 ``(N, C, H, W)``, 0..255.
        labels: int64 ``(N,)``, positions in ``class_names``, or None.
        class_names: What each label means; empty if there are no labels.
        source: Where the images came from, for records and messages.
        skipped: ``(path, reason)`` of every file that could not be read.

    Raises:
        DataError: If ``images`` is not a uint8 tensor with four dimensions.

    >>> two = ImageSet(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    >>> len(two), two.shape, two.num_classes
    (2, (1, 1, 1), 0)
    >>> images, labels = two.batch([1, 0])
    >>> images.flatten().tolist(), labels
    ([1.0, -1.0], None)
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    source: str = "memory"
    skipped: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse anything that is not a stack of byte images."""
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                f"images are {self.images.dtype} of shape {tuple(self.images.shape)}; an ImageSet "
                "holds torch.uint8 of shape (N, C, H, W), 0..255: convert floats in [-1, 1] with "
                "fewstep.data.to_uint8"
            )

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 if there are no labels."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor | None]:
        """Draw images as floats, ``x = bytes / 127.5 - 1``, with their labels.

        Args:
            indices: Which images, each in 0..N-1; any order, repeats allowed.

        Returns:
            float32 ``(B, C, H, W)`` in [-1, 1], and int64 ``(B,)`` or None if there are no labels.

        Raises:
            InvalidInputError: If an index lies outside 0..N-1.
        """
        chosen = torch.as_tensor(indices, dtype=torch.long, device=self.images.device)
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
            raise InvalidInputError(
                f"image indices run from {int(chosen.min())} to {int(chosen.max())}, but "
                f"{self.source} holds {len(self)} images: use 0..{len(self) - 1}"
            )
        images = self.images[chosen].to(torch.float32).div_(127.5).sub_(1.0)
        return images, None if self.labels is None else self.labels[chosen]
