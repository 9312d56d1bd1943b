from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fewstep.data import ImageSet
from fewstep.training import TrainingConfig

TINY = {
    "channels": [8, 8],
    "blocks": 1,
    "attention": [],
    "group_width": 4,
    "head_width": 8,
}


@pytest.fixture(scope="session")
def images() -> ImageSet:
    """Twenty 8x8 pictures of two classes: a bright left or a bright right half, plus grain."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 60, (20, 1, 8, 8), generator=generator)
    labels = torch.arange(20) % 2
    pictures[labels == 0, :, :, :4] += 180
    pictures[labels == 1, :, :, 4:] += 180
    return ImageSet(pictures.byte(), labels, ("left", "right"), source="halves")


@pytest.fixture
def make_config() -> Callable[..., TrainingConfig]:
    """Settings of a run that takes milliseconds a step."""

    def make(**changes: Any) -> TrainingConfig:
        options = {**TINY, **changes.pop("network_options", {})}
        settings: dict[str, Any] = {
            "data": "halves",
            "network_options": options,
            "steps": 7,
            "batch_size": 8,
            "warmup_steps": 2,
            "learning_rate": 1e-2,
            "precision": "float32",
            "checkpoint_every": 3,
            "sample_every": 0,
            "log_every": 1,
        }
        return TrainingConfig(**{**settings, **changes})

    return make
