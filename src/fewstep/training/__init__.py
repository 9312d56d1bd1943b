"""Training: from images to a model folder, resumable at every checkpoint, bit for bit."""

from __future__ import annotations

from fewstep.training.averages import AverageChoice, choose_average, held_out_loss
from fewstep.training.bound import VariationalBound, variational_bound
from fewstep.training.config import TrainingConfig
from fewstep.training.loss_weights import WEIGHTS
from fewstep.training.objective import Objective, pixelwise_loss, prediction_loss
from fewstep.training.times import TIMES
from fewstep.training.trainer import Step, Trainer, run

__all__ = [
    "TIMES",
    "WEIGHTS",
    "AverageChoice",
    "Objective",
    "Step",
    "Trainer",
    "TrainingConfig",
    "VariationalBound",
    "choose_average",
    "held_out_loss",
    "pixelwise_loss",
    "prediction_loss",
    "run",
    "variational_bound",
]
