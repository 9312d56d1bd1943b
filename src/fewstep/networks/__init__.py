"""The networks that Fewstep trains and samples: torch modules that know nothing of diffusion."""

from __future__ import annotations

from fewstep.networks.base import Network, NetworkConfig
from fewstep.networks.blocks import sinusoidal_embedding
from fewstep.networks.dit import DiT
from fewstep.networks.dit_config import DiTConfig
from fewstep.networks.presets import Preset, presets
from fewstep.networks.registry import (
    NETWORKS,
    build,
    class_of,
    config_from_dict,
    config_to_dict,
)
from fewstep.networks.unet import UNet
from fewstep.networks.unet_config import UNetConfig

__all__ = [
    "NETWORKS",
    "DiT",
    "DiTConfig",
    "Network",
    "NetworkConfig",
    "Preset",
    "UNet",
    "UNetConfig",
    "build",
    "class_of",
    "config_from_dict",
    "config_to_dict",
    "presets",
    "sinusoidal_embedding",
]
