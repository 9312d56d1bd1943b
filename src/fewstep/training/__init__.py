"""Training: from images to a model folder, resumable at every checkpoint, bit for bit."""

from __future__ import annotations

from fewstep.training.config import TrainingConfig
from fewstep.training.objective import pixelwise_loss, prediction_loss
from fewstep.training.trainer import Step, Trainer, run

__all__ = ["Step", "Trainer", "TrainingConfig", "pixelwise_loss", "prediction_loss", "run"]
