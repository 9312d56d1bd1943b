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

from fewstep.errors import InvalidInputError, unknown_name
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
from fewstep.networks.unet_config import UNetConfig, presets


class UNet(nn.Module):
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
        self.time = TimeEmbedding(width, embedding_width, config.time_scale)
        self.classes = (
            nn.Embedding(config.num_classes + 1, embedding_width) if config.num_classes else None
        )
        # What is added for an image that was not augmented must be nothing: no bias.
        self.augment = (
            nn.Linear(config.augment_width, embedding_width, bias=False)
            if config.augment_width
            else None
        )
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        skips = [width]
        self.down = nn.ModuleList(self._down_path(skips))
        width = config.channels[-1]
        self.middle = nn.ModuleList(
            [self._stage(width, width, attends=True), self._stage(width, width, attends=False)]
        )
        self.up = nn.ModuleList(self._up_path(skips))
        self.norm_out = NormSiLU(config.groups_at(config.channels[0]), config.channels[0])
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
        if name not in presets():
            raise unknown_name("U-Net preset", name, presets())
        return cls(presets()[name].config.replace(**overrides))

    def _stage(self, width: int, out_width: int, attends: bool) -> Stage:
        c = self.config
        heads, groups = c.heads_at(out_width), c.groups_at(out_width)
        residual = ResidualBlock(
            width, out_width, 4 * c.channels[0], (c.groups_at(width), groups), c.dropout
        )
        attention = Attention(out_width, heads, groups) if attends else None
        crosses = attends and c.context_width > 0
        cross = Attention(out_width, heads, groups, c.context_width) if crosses else None
        return Stage(residual, attention, cross)

    def _down_path(self, skips: list[int]) -> Iterator[nn.Module]:
        """Yield the stages and halvings; append to ``skips`` the width that each leaves behind."""
        c = self.config
        for level, width in enumerate(c.channels):
            for _ in range(c.blocks_at(level)):
                yield self._stage(skips[-1], width, level in c.attention)
                skips.append(width)
            if level + 1 < len(c.channels):
                yield Downsample(width)
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
                yield Upsample(width)

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
        if self.augment is not None:
            zero_(self.augment)

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
        self._check(x, t, labels, context)
        self._check_augment(augment, x.shape[0])
        weight = self.conv_in.weight
        embedding = self._embed(t.to(x.device).expand(x.shape[0]), labels, augment)
        if context is not None:
            context = context.to(weight.dtype)
        h = self.conv_in(x.to(weight.dtype))
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding, context) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, embedding, context)
        for layer in self.up:
            if isinstance(layer, Stage):
                h = layer(torch.cat([h, skips.pop()], dim=1), embedding, context)
            else:
                h = layer(h)
        return self.conv_out(self.norm_out(h)).to(x.dtype)

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

    def _check(self, x: Tensor, t: Tensor, labels: Tensor | None, context: Tensor | None) -> None:
        c, multiple = self.config, self.config.size_multiple
        if x.ndim != 4 or x.shape[1] != c.in_channels:
            raise InvalidInputError(
                f"images of shape {tuple(x.shape)} do not fit a network for "
                f"(B, {c.in_channels}, H, W); convert the images, or build it with in_channels "
                "to match"
            )
        if not x.is_floating_point():
            raise InvalidInputError(
                f"images of type {x.dtype} are not floating; scale them to [-1, 1] first"
            )
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise InvalidInputError(
                f"images of {x.shape[2]}x{x.shape[3]} pixels cannot be halved "
                f"{len(c.channels) - 1} times; height and width must be multiples of {multiple}: "
                "resize, pad or crop the images"
            )
        if t.shape not in ((), (x.shape[0],)):
            raise InvalidInputError(
                f"times of shape {tuple(t.shape)} do not fit {x.shape[0]} images; "
                f"give one time for all, shape (), or one for each, shape ({x.shape[0]},)"
            )
        if labels is not None:
            self._check_labels(labels, x.shape[0])
        self._check_context(context, x.shape[0])

    def _check_labels(self, labels: Tensor, batch: int) -> None:
        classes = self.config.num_classes
        if not classes:
            raise InvalidInputError(
                "labels were given to a network without classes; leave them out, "
                "or build the network with num_classes"
            )
        if labels.shape != (batch,) or labels.dtype not in (torch.int64, torch.int32):
            raise InvalidInputError(
                f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit "
                f"{batch} images; give integers (int64) of shape ({batch},)"
            )
        # To read a label that an accelerator holds would stall it; a traced graph holds none.
        if labels.device.type != "cpu" or torch.compiler.is_compiling() or not batch:
            return
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high > classes:
            raise InvalidInputError(
                f"label {low if low < 0 else high} is not a class of this network; allowed are "
                f"0..{classes - 1}, and {classes} (or labels=None) for no class"
            )

    def _check_augment(self, augment: Tensor | None, batch: int) -> None:
        width = self.config.augment_width
        if augment is not None and augment.shape != (batch, width):
            raise InvalidInputError(
                f"augmentations of shape {tuple(augment.shape)} do not fit; give shape ({batch}, {width}), "
                "or build the network with augment_width to match"
            )

    def _check_context(self, context: Tensor | None, batch: int) -> None:
        width = self.config.context_width
        if context is None and width:
            raise InvalidInputError(
                f"this network attends to a context; give context of shape ({batch}, L, {width})"
            )
        if context is not None and not width:
            raise InvalidInputError(
                "a context was given to a network without cross-attention; leave it out, "
                "or build the network with context_width"
            )
        if context is not None and (context.ndim, context.shape[0], context.shape[-1]) != (
            3,
            batch,
            width,
        ):
            raise InvalidInputError(
                f"context of shape {tuple(context.shape)} does not fit; "
                f"give shape ({batch}, L, {width})"
            )
