"""What the network is shown in each step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.data import ImageSet
from fewstep.training.augmentation import augmented
from fewstep.training.config import TrainingConfig
from fewstep.training.objective import Objective, drop_labels
from fewstep.training.randomness import BatchOrder, generator


class Batch(NamedTuple):
    """What one step trains on.

    Args:
        x0: Images in [-1, 1], shape (B, C, H, W).
        noise: Standard normal, the shape of x0.
        t: Times in the process's unit, float64 on the CPU, shape (B,).
        labels: Classes with the null class among them, shape (B,), or None.
        augment: How the images were augmented, see `fewstep.training.augmentation`, or None.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor | None
    augment: Tensor | None = None

    def split(self, parts: int) -> list[Batch]:
        """Cut into at most so many parts of nearly equal size, in order."""
        count = min(parts, len(self.x0))
        columns = [
            [None] * count if column is None else column.tensor_split(count) for column in self
        ]
        return [Batch(*row) for row in zip(*columns, strict=True)]


class Batches:
    """The batch of every step, as a function of the step alone.

    Args:
        images: The data, held as bytes.
        objective: Says how times are drawn.
        config: The settings.
        device: Where the images and the noise go; times stay on the CPU.
        share: Which of so many nearly equal shares of each batch to return, as (number, count); all random numbers
            are drawn for the whole batch, so that the shares of all workers make up the batch of a single one.
        rows: The images to train on, by number; None: all.
    """

    def __init__(
        self,
        images: ImageSet,
        objective: Objective,
        config: TrainingConfig,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
        rows: Tensor | None = None,
    ) -> None:
        self.images, self.objective, self.config, self.device = images, objective, config, device
        self.share = share
        self._rows = torch.arange(len(images)) if rows is None else rows
        self._order = BatchOrder(len(self._rows), config.batch_size, config.seed)

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step."""
        config = self.config

        def random(purpose: str) -> torch.Generator:
            return generator(config.seed, purpose, step)

        x0, labels = self.images.batch(self._rows[self._order.batch(step)])
        if config.horizontal_flip:
            mirrored = torch.rand(len(x0), 1, 1, 1, generator=random("flips")) < 0.5
            x0 = torch.where(mirrored, x0.flip(-1), x0)
        augment = None
        if config.augment:
            x0, augment = augmented(x0, config.augment, random("augmentations"))
        if labels is not None:
            labels = drop_labels(
                labels, config.label_dropout, self.images.num_classes, random("label dropout")
            )
        noise = torch.randn(x0.shape, generator=random("noise"))
        t = self.objective.draw_times(len(x0), random("times"))
        number, count = self.share
        own = Batch(x0, noise, t, labels, augment).split(count)[number]
        order = torch.channels_last
        return own._replace(
            x0=own.x0.to(self.device, memory_format=order, non_blocking=True),
            noise=own.noise.to(self.device, memory_format=order, non_blocking=True),
            labels=None if own.labels is None else own.labels.to(self.device, non_blocking=True),
            augment=None
            if own.augment is None
            else own.augment.to(self.device, non_blocking=True),
        )
