"""How good generated images are: distances between sets of features, and how digits are read."""

from __future__ import annotations

from fewstep.metrics.digits import (
    digit_distance,
    digit_features,
    digit_statistics,
    label_accuracy,
    load_classifier,
)
from fewstep.metrics.frechet import FeatureStatistics, frechet_distance
from fewstep.metrics.levels import LevelLoss, loss_by_level
from fewstep.metrics.neighbours import COPY_RATIO, Neighbours, nearest_images

__all__ = [
    "COPY_RATIO",
    "FeatureStatistics",
    "LevelLoss",
    "Neighbours",
    "digit_distance",
    "digit_features",
    "digit_statistics",
    "frechet_distance",
    "label_accuracy",
    "load_classifier",
    "loss_by_level",
    "nearest_images",
]
