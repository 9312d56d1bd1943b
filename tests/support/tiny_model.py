"""A class-conditional model so small that commands and tuning take it through in no time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import fewstep as fs
from fewstep.models import Model, ModelConfig
from fewstep.networks import UNetConfig

CONFIG = ModelConfig(
    network=UNetConfig(
        in_channels=1, channels=(8,), blocks=1, attention=(), num_classes=3, groups=4
    ),
    process=fs.process.vp_linear().to_dict(),
    shape=(1, 4, 4),
    class_names=("ant", "bee", "cat"),
    name="tiny",
)


def tiny_model(**changes: Any) -> Model:
    """Three classes of 4x4 pictures on `vp_linear`; its weights are random, but always the same ones."""
    config = replace(CONFIG, **changes)
    network = config.build_network()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return Model(network, config)
