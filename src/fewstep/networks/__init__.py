"""The networks that Fewstep trains and samples: torch modules that know nothing of diffusion."""

from __future__ import annotations

from fewstep.networks.blocks import sinusoidal_embedding
from fewstep.networks.unet import UNet
from fewstep.networks.unet_config import Preset, UNetConfig, presets

__all__ = ["Preset", "UNet", "UNetConfig", "presets", "sinusoidal_embedding"]
