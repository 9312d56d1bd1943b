"""What a run tells of itself while it goes on."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.training.config import TrainingConfig
from fewstep.training.held_out import HeldOut
from fewstep.training.measuring import Measurement


@dataclass(frozen=True)
class Step:
    """What is true after an update of the weights and of their average.

    Args:
        step: Updates done so far.
        loss: Mean loss over the steps since the last `Step` that were not skipped; NaN if all were.
        learning_rate: Learning rate of this update.
        gradient_norm: Mean norm of the gradients, before clipping, since the last `Step`.
        images_per_second: Images trained on per second since the last `Step`.
        skipped: Steps since the last `Step` that changed nothing, their loss or gradient not being finite.
        measurement: How far samples are from data, if that was measured after this update.
        checkpoint: The checkpoint that was written after this update, if any.
        preview: The sheet of samples that was written after this update, if any.
        held_out: Error on images kept from training, and on others, if it was measured after this update.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    images_per_second: float
    skipped: int = 0
    measurement: Measurement | None = None
    checkpoint: Path | None = None
    preview: Path | None = None
    held_out: HeldOut | None = None

    def figures(self) -> dict[str, Any]:
        """Return what the log and TensorBoard are told, beside the step."""
        measured = {} if self.measurement is None else self.measurement.figures()
        return {
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "images_per_second": round(self.images_per_second, 1),
            "skipped": self.skipped,
            **measured,
            **({} if self.held_out is None else self.held_out.figures()),
        }


class Window:
    """Losses and gradient norms since the last `Step`, left on the device until they are asked for."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.seconds = 0.0
        self._start = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Note the loss and the gradient norm of a step, each of shape ()."""
        self.losses.append(loss)
        self.norms.append(norm)

    def fact(self, step: int, config: TrainingConfig, learning_rate: float) -> Step:
        """Sum the window up after its last step, which had this learning rate."""
        pairs = torch.stack([torch.stack(self.losses), torch.stack(self.norms)], 1).tolist()
        self.seconds = time.perf_counter() - self._start
        finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
        loss, norm = (
            (sum(c) / len(c) for c in zip(*finite, strict=True)) if finite else (math.nan,) * 2
        )
        return Step(
            step=step,
            loss=loss,
            learning_rate=learning_rate,
            gradient_norm=norm,
            images_per_second=len(pairs) * config.batch_size / self.seconds,
            skipped=len(pairs) - len(finite),
        )
