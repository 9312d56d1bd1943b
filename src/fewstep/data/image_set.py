"""The images a model is trained on: one uint8 tensor, its labels, and where they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fewstep.devices import moved
from fewstep.errors import DataError, InvalidInputError

CHUNK_BYTES = 2**24

Indices = Tensor | Sequence[int] | np.ndarray | range


def evenly(total: int, count: int) -> Tensor:
    """Return ``count`` positions spread evenly over ``total``, first and last included, int64.

    >>> evenly(101, 3).tolist()
    [0, 50, 100]
    """
    return torch.linspace(0, total - 1, count).round().long()


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images as bytes, in memory or mapped from a file, ready to be drawn in batches of floats in [-1, 1].

    The fields are kept as given; `check_images` says whether they suit training.

    Args:
        images: uint8 ``(N, C, H, W)``, 0..255.
        labels: int64 ``(N,)``, positions in ``class_names``, or None.
        class_names: What each label means; empty if there are no labels.
        source: Where the images came from, for records and messages.
        skipped: ``(path, reason)`` of every file that could not be read.
        captions: What each image shows in words, or None; empty if there are no captions at all.
        enlarged: How many images were smaller than the size asked for.
        smallest: Width and height in pixels of the smallest of these.
        known_digest: The `digest`, where it is on record; None: it is computed when asked for.

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
    captions: Sequence[str | None] = ()
    enlarged: int = 0
    smallest: tuple[int, int] | None = None
    known_digest: str | None = None

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

    @cached_property
    def digest(self) -> str:
        """A digest of all pixels and labels, which tells whether two sets are the same; computed in chunks."""
        if self.known_digest is not None:
            return self.known_digest
        digest = hashlib.blake2b(digest_size=16)
        for _, chunk in self.chunks():
            digest.update(np.ascontiguousarray(chunk.cpu().numpy()).data)
        if self.labels is not None:
            digest.update(self.labels.cpu().numpy().tobytes())
        return digest.hexdigest()

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """Yield the images in order, so many at once that each chunk fits well into memory.

        Args:
            chunk_bytes: About how large a chunk may be.

        Yields:
            The number of the chunk's first image, and its images, uint8 (B, C, H, W).
        """
        channels, height, width = self.shape
        count = max(1, chunk_bytes // max(1, channels * height * width))
        for start in range(0, len(self), count):
            yield start, self.images[start : start + count]

    def subset(self, indices: Indices) -> ImageSet:
        """Return some of the images, copied into memory.

        Args:
            indices: Which images, each in 0..N-1.
        """
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.images.device)
        captions = [self.captions[k] for k in rows.tolist()] if self.captions else ()
        return ImageSet(
            self.images[rows],
            None if self.labels is None else self.labels[rows],
            self.class_names,
            self.source,
            captions=captions,
        )

    def batch(
        self, indices: Indices, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw images as floats, ``x = bytes / 127.5 - 1``, with their labels.

        Args:
            indices: Which images, each in 0..N-1; any order, repeats allowed.
            device: Where the floats are wanted; the bytes go there. None: where they are.

        Returns:
            float32 ``(B, C, H, W)`` in [-1, 1], and int64 ``(B,)``, where the set has its own, or None if there are
            no labels.

        Raises:
            InvalidInputError: If an index lies outside 0..N-1.
        """
        chosen = torch.as_tensor(indices, dtype=torch.long)
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
            raise InvalidInputError(
                f"image indices run from {int(chosen.min())} to {int(chosen.max())}, but "
                f"{self.source} holds {len(self)} images: use 0..{len(self) - 1}"
            )
        images = self.images[moved(chosen, self.images.device)]
        if device is not None:
            images = moved(images, device)
        images = images.to(torch.float32).div_(127.5).sub_(1.0)
        labels = self.labels
        return images, None if labels is None else labels[moved(chosen, labels.device)]

    def near(self, device: torch.device) -> ImageSet:
        """Return the set with its images in the memory of an accelerator, if they need a quarter of what is free there.

        Drawing a batch then moves nothing. Anything larger, and anywhere else, it is the set itself.
        """
        if device.type != "cuda" or 4 * self.images.nbytes > torch.cuda.mem_get_info(device)[0]:
            return self
        return replace(self, images=self.images.to(device))
