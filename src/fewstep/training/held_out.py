"""Images kept from training, and what a model does to them in comparison with those it saw."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.data import ImageSet, evenly
from fewstep.errors import InvalidInputError
from fewstep.metrics import loss_by_level
from fewstep.models import Model
from fewstep.training.randomness import generator

MEASURED_IMAGES = 256
LEVELS = 10


class HeldOut(NamedTuple):
    """Mean squared error in the noise per pixel, over ten levels.

    Args:
        seen: On images that the model is trained on.
        unseen: On images kept from training.
    """

    seen: float
    unseen: float

    def figures(self) -> dict[str, float]:
        """Return what the log is told."""
        return {"error_seen": self.seen, "error_unseen": self.unseen}


def split_rows(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the images to train on and of those kept away, both in rising order.

    Args:
        count: Number of images.
        share: Of images kept away, 0 to 0.5; where it is not 0, at least one is.
        seed: Decides which.

    Raises:
        InvalidInputError: Fewer than 2 images would be left to train on.

    >>> seen, unseen = split_rows(10, 0.2, seed=0)
    >>> len(seen), len(unseen)
    (8, 2)
    """
    kept_away = max(1, round(count * share)) if share else 0
    if share and count - kept_away < 2:
        raise InvalidInputError(
            f"held_out = {share:g} leaves {count - kept_away} of {count} images to train on; give fewer, or 0"
        )
    order = torch.randperm(count, generator=generator(seed, "held out", 0))
    return order[kept_away:].sort().values, order[:kept_away].sort().values


def held_out_error(
    model: Model, images: ImageSet, seen: Tensor, unseen: Tensor, seed: int
) -> HeldOut:
    """Measure a model on as many seen as unseen images, with the same noise and levels: a function of the seed.

    Args:
        model: The model.
        images: All images.
        seen: The numbers of those trained on.
        unseen: The numbers of those kept away.
        seed: Of the noise.
    """
    count = min(len(seen), len(unseen), MEASURED_IMAGES)

    def error(rows: Tensor) -> float:
        x0, labels = images.batch(rows[evenly(len(rows), count)])
        losses = loss_by_level(
            model, x0, labels if model.num_classes else None, levels=LEVELS, seed=seed
        )
        return sum(loss.noise_error for loss in losses) / len(losses)

    return HeldOut(error(seen), error(unseen))
