"""What the network is shown in each step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.data import ImageSet
from fewstep.devices import moved
from fewstep.training.augmentation import apply_augmentations, draw_augmentations
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
        images: The data, held as bytes; an accelerator keeps all of them if they need little of its memory.
        objective: Says how times are drawn.
        config: The settings.
        device: Where the images go, as bytes, and the noise; times stay on the CPU.
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
        self.images = images.near(device)
        self.objective, self.config, self.device, self.share = objective, config, device, share
        self._rows = torch.arange(len(images)) if rows is None else rows
        self._order = BatchOrder(len(self._rows), config.batch_size, config.seed)

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step."""
        config = self.config

        def random(purpose: str) -> torch.Generator:
            return generator(config.seed, purpose, step)

        def own(whole: Tensor) -> Tensor:
            """This worker's share of what is drawn for the whole batch."""
            number, count = self.share
            return whole.tensor_split(count)[number]

        def there(tensor: Tensor) -> Tensor:
            return moved(tensor, self.device)

        rows = self._rows[self._order.batch(step)]
        count, shape = len(rows), self.images.shape
        x0, _ = self.images.batch(own(rows), self.device)
        if config.horizontal_flip:
            mirrored = torch.rand(count, 1, 1, 1, generator=random("flips")) < 0.5
            x0 = torch.where(there(own(mirrored)), x0.flip(-1), x0)
        augment = labels = None
        if config.augment:
            numbers = draw_augmentations(count, config.augment, random("augmentations"))
            augment = there(own(numbers))
            x0 = apply_augmentations(x0, augment)
        if self.images.labels is not None:
            classes, null = self.images.labels[rows], self.images.num_classes
            dropped = drop_labels(classes, config.label_dropout, null, random("label dropout"))
            labels = there(own(dropped))
        noise = there(own(torch.randn(count, *shape, generator=random("noise"))))
        t = own(self.objective.draw_times(count, random("times")))
        order = torch.channels_last
        return Batch(
            x0.contiguous(memory_format=order),
            noise.contiguous(memory_format=order),
            t,
            labels,
            augment,
        )
