"""The U-Net of denoising diffusion: residual blocks and attention on a ladder of resolutions.

Source: Ho, Jain and Abbeel 2020, arXiv:2006.11239; class conditioning and narrower heads from
Dhariwal and Nichol 2021, arXiv:2105.05233; the null class from Ho and Salimans 2022,
arXiv:2207.12598; cross-attention from Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.networks.base import Network, augment_map
from fewstep.networks.blocks import (
    Attention,
    Downsample,
    NormSiLU,
    ResidualBlock,
    Stage,
    TimeEmbedding,
    Upsample,
    zero_,
)
from fewstep.networks.presets import preset_config
from fewstep.networks.unet_config import UNetConfig


class UNet(Network[UNetConfig]):
    """A network from a noisy image and its time to an image of the same size.

    On the way down every stage and every halving leaves a skip; on the way up each resolution has
    one stage more than on the way down, and each of them takes one skip::

        x -> conv -> (stage x blocks -> halve) per level
          -> middle: stage with attention, stage without
          -> ((join skip -> stage) x (blocks + 1) -> double) per level
          -> norm, SiLU, conv -> y

    The last convolution starts at zero, as does the end of every residual branch: a new network
    returns 0 everywhere.

    Args:
        config: The shape of the network.

    Source: Ho et al. 2020, arXiv:2006.11239, appendix B.

    >>> with torch.random.fork_rng():  # the first weights come from torch's global generator
    ...     net = UNet(UNetConfig(in_channels=1, channels=(8, 16), groups=4, num_classes=10))
    >>> net(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999]), labels=torch.tensor([3, 10])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, embedding_width = config.channels[0], 4 * config.channels[0]
        self.time = TimeEmbedding(
            width, embedding_width, config.time_scale, config.frequency_shift
        )
        self.classes = (
            nn.Embedding(config.num_classes + 1, embedding_width) if config.num_classes else None
        )
        self.augment = augment_map(config, embedding_width)
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        skips = [width]
        self.down = nn.ModuleList(self._down_path(skips))
        width = config.channels[-1]
        self.middle = nn.ModuleList(
            [
                self._stage(width, width, attends=config.middle_attention),
                self._stage(width, width, attends=False),
            ]
        )
        self.up = nn.ModuleList(self._up_path(skips))
        self.norm_out = NormSiLU(
            config.groups_at(config.channels[0]), config.channels[0], config.norm_epsilon
        )
        self.conv_out = nn.Conv2d(
            config.channels[0], config.out_channels or config.in_channels, 3, padding=1
        )
        self._initialise()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> UNet:
        """Build a named network, with some fields of its configuration replaced.

        Args:
            name: One of `presets`.
            **overrides: Fields of `UNetConfig`.

        Raises:
            InvalidInputError: An unknown name or field, or a value out of range.

        >>> with torch.device("meta"):  # the shape alone, without weights
        ...     net = UNet.from_preset("small", num_classes=10)
        >>> net.config.num_classes
        10
        """
        return cls(preset_config(name, UNetConfig, **overrides))

    def _residual(
        self, width: int, out_width: int, resample: nn.Module | None = None
    ) -> ResidualBlock:
        c = self.config
        return ResidualBlock(
            width,
            out_width,
            4 * c.channels[0],
            (c.groups_at(width), c.groups_at(out_width)),
            c.dropout,
            epsilon=c.norm_epsilon,
            adaptive=c.condition == "scale-shift",
            resample=resample,
            scale=c.residual_scale,
        )

    def _attention(self, width: int, context_width: int = 0) -> Attention:
        c = self.config
        return Attention(
            width,
            c.heads_at(width),
            c.groups_at(width),
            context_width,
            epsilon=c.norm_epsilon,
            scale=c.residual_scale,
        )

    def _stage(self, width: int, out_width: int, attends: bool) -> Stage:
        context_width = self.config.context_width
        residual = self._residual(width, out_width)
        attention = self._attention(out_width) if attends else None
        crosses = attends and context_width > 0
        cross = self._attention(out_width, context_width) if crosses else None
        return Stage(residual, attention, cross)

    def _halving(self, width: int) -> nn.Module:
        match self.config.resample:
            case "conv":
                return Downsample(width, self.config.pad_after)
            case "residual":
                return self._residual(width, width, resample=nn.AvgPool2d(2))
            case _:
                return nn.AvgPool2d(2)

    def _doubling(self, width: int) -> nn.Module:
        match self.config.resample:
            case "conv":
                return Upsample(width)
            case "residual":
                return self._residual(width, width, resample=nn.Upsample(scale_factor=2.0))
            case _:
                return nn.Upsample(scale_factor=2.0)

    def _down_path(self, skips: list[int]) -> Iterator[nn.Module]:
        """Yield the stages and halvings; append to ``skips`` the width that each leaves behind."""
        c = self.config
        for level, width in enumerate(c.channels):
            for _ in range(c.blocks_at(level)):
                yield self._stage(skips[-1], width, level in c.attention)
                skips.append(width)
            if level + 1 < len(c.channels):
                yield self._halving(width)
                skips.append(width)

    def _up_path(self, skips: list[int]) -> Iterator[nn.Module]:
        """Yield the stages, each taking the last width off ``skips``, and the doublings."""
        c = self.config
        below = c.channels[-1]
        for level, width in reversed(list(enumerate(c.channels))):
            for _ in range(c.blocks_at(level) + 1):
                yield self._stage(below + skips.pop(), width, level in c.attention)
                below = width
            if level:
                yield self._doubling(width)

    def _initialise(self) -> None:
        """Draw Glorot's weights, zero the biases and the end of every residual branch.

        Source: Glorot and Bengio 2010; Ho et al. 2020, arXiv:2006.11239.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                zero_(module.conv2)
            elif isinstance(module, Attention):
                zero_(module.out)
        zero_(self.conv_out)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        context: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: Noisy images, shape (B, in_channels, H, W), with H and W multiples of
                ``config.size_multiple``.
            t: Times, shape (B,) or (), in the process's own unit; fractions are allowed.
            labels: Classes, shape (B,), integers in 0..num_classes; ``num_classes`` is the null
                class, and None stands for it.
            context: Sequences to attend to, shape (B, L, context_width), where the network takes
                them.
            augment: How the images were augmented, shape (B, augment_width), zeros for not at
                all; None stands for zeros.

        Returns:
            Shape (B, out_channels, H, W), in the floating type of ``x``.

        Raises:
            InvalidInputError: A shape, type or label that the network cannot take.
        """
        self.check_inputs(x, t, labels, context, augment)
        weight = self.conv_in.weight
        embedding = self._embed(t.to(x.device).expand(x.shape[0]), labels, augment)
        if context is not None:
            context = context.to(weight.dtype)
        h = self.conv_in(x.to(weight.dtype))
        skips = [h]
        for layer in self.down:
            h = self._through(layer, h, embedding, context)
            skips.append(h)
        for stage in self.middle:
            h = self.run(stage, h, embedding, context)
        for layer in self.up:
            if isinstance(layer, Stage):
                h = self.run(self._join, layer, h, skips.pop(), embedding, context)
            else:
                h = self._through(layer, h, embedding, context)
        return self.conv_out(self.norm_out(h)).to(x.dtype)

    def _through(
        self, layer: nn.Module, h: Tensor, embedding: Tensor, context: Tensor | None
    ) -> Tensor:
        """Pass a layer, giving it what its kind takes."""
        match layer:
            case Stage():
                return self.run(layer, h, embedding, context)
            case ResidualBlock():
                return self.run(layer, h, embedding)
            case _:
                return self.run(layer, h)

    def _join(
        self, stage: Stage, h: Tensor, skip: Tensor, embedding: Tensor, context: Tensor | None
    ) -> Tensor:
        """Pass a stage of the way up, which takes a skip beside what comes from below."""
        if self.config.skip_scale != 1:
            skip = skip * self.config.skip_scale
        return stage(torch.cat([h, skip], dim=1), embedding, context)

    def _embed(self, t: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Return ``silu(time + class + augmentation embedding)``, (B, E): what all blocks project."""
        embedding = self.time(t)
        if self.classes is not None:
            null = self.config.num_classes
            chosen = torch.full_like(t, null, dtype=torch.long) if labels is None else labels
            embedding = embedding + self.classes(chosen)
        if self.augment is not None and augment is not None:
            embedding = embedding + self.augment(augment.to(embedding))
        return F.silu(embedding)
