"""The configurations of networks that are worth a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.errors import unknown_name
from fewstep.networks.base import Config, NetworkConfig
from fewstep.networks.dit_config import DiTConfig
from fewstep.networks.unet_config import UNetConfig


@dataclass(frozen=True)
class Preset:
    """A configuration worth a name.

    Args:
        name: How `from_preset` and ``--network`` know it.
        title: A few words, for lists.
        description: One sentence: what it is for.
        size: Height and width in pixels of the images that it is made for.
        config: The configuration.
    """

    name: str
    title: str
    description: str
    size: int
    config: NetworkConfig


def _dit(letter: str, patch: int, width: int, depth: int, heads: int, millions: str) -> Preset:
    return Preset(
        name=f"dit-{letter.lower()}/{patch}",
        title=f"DiT-{letter}/{patch}, {depth} blocks of width {width}, for 32x32 RGB",
        description=(
            f"The transformer of Peebles and Xie 2023 (arXiv:2212.09748), {millions} parameters, "
            f"on patches of {patch}x{patch} pixels."
        ),
        size=32,
        config=DiTConfig(patch=patch, width=width, depth=depth, heads=heads),
    )


_PRESETS = (
    Preset(
        name="tutorial",
        title="64-128-256 channels, for 32x32 RGB",
        description=(
            "The U-Net of many a first course: three resolutions, attention at 16x16 and 8x8."
        ),
        size=32,
        config=UNetConfig(
            channels=(64, 128, 256), attention=(1, 2), head_width=64, group_width=16
        ),
    ),
    Preset(
        name="ddpm-cifar10",
        title="DDPM's network for CIFAR-10, 35.7M parameters",
        description=(
            "The network of Ho et al. 2020 (arXiv:2006.11239): four resolutions from 32x32 RGB, "
            "attention at 16x16, dropout 0.1."
        ),
        size=32,
        config=UNetConfig(channels=(128, 256, 256, 256), attention=(1,), dropout=0.1),
    ),
    Preset(
        name="small",
        title="32-64-128 channels, for 28x28 grey",
        description=(
            "Made for processors: three million parameters, attention at 14x14 and 7x7, "
            "widths and groups that the vector units like."
        ),
        size=28,
        config=UNetConfig(
            in_channels=1,
            channels=(32, 64, 128),
            blocks=(2, 2, 1),
            attention=(1, 2),
            head_width=64,
            group_width=16,
        ),
    ),
    Preset(
        name="dit-tiny/4",
        title="DiT, 6 blocks of width 192 on patches of 4x4, for 28x28 grey",
        description="A transformer for processors: 49 tokens an image, four million parameters.",
        size=28,
        config=DiTConfig(in_channels=1, patch=4, width=192, depth=6, heads=3),
    ),
    Preset(
        name="dit-tiny/2",
        title="DiT, 6 blocks of width 192 on patches of 2x2, for 28x28 grey",
        description=(
            "The same on 196 tokens an image: finer pictures for four times the work of dit-tiny/4."
        ),
        size=28,
        config=DiTConfig(in_channels=1, patch=2, width=192, depth=6, heads=3),
    ),
    _dit("S", 2, 384, 12, 6, "33 million"),
    _dit("B", 2, 768, 12, 12, "130 million"),
    _dit("L", 2, 1024, 24, 16, "458 million"),
    _dit("XL", 2, 1152, 28, 16, "675 million"),
)


def presets() -> dict[str, Preset]:
    """Return the named configurations, U-Nets first.

    >>> list(presets())[:3]
    ['tutorial', 'ddpm-cifar10', 'small']
    """
    return {preset.name: preset for preset in _PRESETS}


def preset_config(name: str, kind: type[Config], **overrides: Any) -> Config:
    """Return the configuration of a preset of one kind of network, with some fields replaced.

    Raises:
        InvalidInputError: An unknown name or field, or a value out of range.
    """
    known = {p.name: p.config for p in _PRESETS if isinstance(p.config, kind)}
    if name not in known:
        raise unknown_name(f"{kind.kind} preset", name, known)
    return known[name].replace(**overrides)
