"""What a run tells of itself while it goes on."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import NonFiniteError
from fewstep.training.config import TrainingConfig
from fewstep.training.held_out import HeldOut
from fewstep.training.rates import learning_rate


@dataclass(frozen=True)
class Step:
    """What is true after an update of the weights and of their average.

    Args:
        step: Updates done so far.
        loss: Mean loss over the steps since the last `Step`.
        learning_rate: Learning rate of this update.
        gradient_norm: Mean norm of the gradients, before clipping, since the last `Step`.
        images_per_second: Images trained on per second since the last `Step`.
        checkpoint: The checkpoint that was written after this update, if any.
        preview: The sheet of samples that was written after this update, if any.
        held_out: Error on images kept from training, and on others, if it was measured after this update.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    images_per_second: float
    checkpoint: Path | None = None
    preview: Path | None = None
    held_out: HeldOut | None = None


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

    def fact(self, step: int, config: TrainingConfig) -> Step:
        """Sum the window up after its last step.

        Raises:
            NonFiniteError: A loss or a gradient is NaN or infinite; the message says in which step.
        """
        losses, norms = torch.stack([torch.stack(self.losses), torch.stack(self.norms)]).tolist()
        self.seconds = time.perf_counter() - self._start
        for k, pair in enumerate(zip(losses, norms, strict=True)):
            if not all(map(math.isfinite, pair)):
                raise NonFiniteError(
                    f"the loss of step {step - len(losses) + k + 1} is {pair[0]}, the norm of its gradient "
                    f"{pair[1]}; the last checkpoint is from before. Try a lower learning rate (now "
                    f"{config.learning_rate:g}), more warm-up steps (now {config.warmup_steps}), or precision "
                    "float32, in a new folder"
                )
        return Step(
            step=step,
            loss=sum(losses) / len(losses),
            learning_rate=learning_rate(config, step - 1),
            gradient_norm=sum(norms) / len(norms),
            images_per_second=len(losses) * config.batch_size / self.seconds,
        )
