"""The diffusion transformer: an image as a sequence of patches, time and class as what modulates every block.

Source: Peebles and Xie 2023, arXiv:2212.09748.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.networks.base import Network, augment_map
from fewstep.networks.blocks import TimeEmbedding, attend, sinusoidal_embedding, zero_
from fewstep.networks.dit_config import DiTConfig
from fewstep.networks.presets import preset_config

FREQUENCIES = 256
"""Length of the sinusoidal embedding of a time, whatever the width."""
SPREAD = 0.02
"""Standard deviation of the first weights that embed time and class."""


class DiT(Network[DiTConfig]):
    """A network from a noisy image and its time to an image of the same size, a transformer on patches.

    ::

        x -> patches + positions -> block x depth -> norm, modulate, linear -> pixels -> y

    Every block is modulated by ``c = time + class``: ``shift, scale, gate = W silu(c)`` for its
    attention and again for its perceptron, and W starts at zero (adaLN-zero), so that every block
    starts as the identity. The last layer starts at zero: a new network returns 0 everywhere.

    Images may have any size that is a multiple of the patch, for positions are fixed functions of
    row and column.

    Args:
        config: The shape of the network.

    Source: Peebles and Xie 2023, arXiv:2212.09748, section 3.2.

    >>> with torch.random.fork_rng():  # the first weights come from torch's global generator
    ...     net = DiT(DiTConfig(in_channels=1, width=16, depth=2, heads=2, num_classes=10))
    >>> net(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999]), labels=torch.tensor([3, 10])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, out_channels = config.width, config.out_channels or config.in_channels
        self.time = TimeEmbedding(FREQUENCIES, width, config.time_scale)
        self.classes = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.augment = augment_map(config, width)
        self.patches = nn.Linear(config.patch**2 * config.in_channels, width)
        self.blocks = nn.ModuleList(
            DiTBlock(width, config.heads, round(config.mlp_ratio * width))
            for _ in range(config.depth)
        )
        self.last = LastLayer(width, config.patch**2 * out_channels)
        self._initialise()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> DiT:
        """Build a named network, with some fields of its configuration replaced.

        Args:
            name: One of `presets` that is a DiT.
            **overrides: Fields of `DiTConfig`.

        Raises:
            InvalidInputError: An unknown name or field, or a value out of range.

        >>> with torch.device("meta"):  # the shape alone, without weights
        ...     net = DiT.from_preset("dit-tiny/4", num_classes=10)
        >>> net.config.depth
        6
        """
        return cls(preset_config(name, DiTConfig, **overrides))

    def _initialise(self) -> None:
        """Draw Glorot's weights, zero the biases, the modulations and the last layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embeddings = [self.time.lift, self.time.mix, self.classes]
        for module in embeddings:
            if module is not None:
                nn.init.normal_(module.weight, std=SPREAD)
        for module in self.modules():
            if isinstance(module, DiTBlock | LastLayer):
                zero_(module.modulation)
        zero_(self.last.out)

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
                ``config.patch``.
            t: Times, shape (B,) or (), in the process's own unit; fractions are allowed.
            labels: Classes, shape (B,), integers in 0..num_classes; ``num_classes`` is the null
                class, and None stands for it.
            context: None; a DiT attends to no context.
            augment: How the images were augmented, shape (B, augment_width), zeros for not at
                all; None stands for zeros.

        Returns:
            Shape (B, out_channels, H, W), in the floating type of ``x``.

        Raises:
            InvalidInputError: A shape, type or label that the network cannot take.
        """
        self.check_inputs(x, t, labels, context, augment)
        edge, dtype = self.config.patch, self.patches.weight.dtype
        rows, columns = x.shape[2] // edge, x.shape[3] // edge
        condition = self._embed(t.to(x.device).expand(x.shape[0]), labels, augment)
        tokens = self.patches(patchify(x.to(dtype), edge))
        positions = position_embedding(rows, columns, self.config.width, x.device)
        tokens = tokens + positions.to(tokens.dtype)
        for block in self.blocks:
            tokens = self.run(block, tokens, condition)
        y = unpatchify(self.last(tokens, condition), rows, columns, edge)
        if x.is_contiguous(memory_format=torch.channels_last):
            y = y.contiguous(memory_format=torch.channels_last)
        return y.to(x.dtype)

    def _embed(self, t: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Return ``silu(time + class + augmentation embedding)``, (B, width): what all blocks project."""
        embedding = self.time(t)
        if self.classes is not None:
            null = self.config.num_classes
            chosen = torch.full_like(t, null, dtype=torch.long) if labels is None else labels
            embedding = embedding + self.classes(chosen)
        if self.augment is not None and augment is not None:
            embedding = embedding + self.augment(augment.to(embedding))
        return F.silu(embedding)


class DiTBlock(nn.Module):
    """Self-attention and a perceptron, each normalised, modulated and gated by the condition.

    ``x <- x + gate W softmax(q k^T / sqrt(d)) v`` with q, k, v of ``norm(x) (1 + scale) + shift``;
    then the same with ``W2 gelu(W1 .)`` in place of the attention.

    Args:
        width: Width of a token.
        heads: Attention heads; a divisor of ``width``.
        hidden: Width of the perceptron.

    Source: Peebles and Xie 2023, arXiv:2212.09748, figure 3.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.widen = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens (B, N, width) to the same shape, given ``silu(c)`` (B, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(
            6, dim=-1
        )
        x = x + gate1 * self._attention(modulate(x, shift1, scale1))
        return x + gate2 * self._perceptron(modulate(x, shift2, scale2))

    def _attention(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        return self.out(attend(query, key, value).transpose(1, 2).flatten(2))

    def _perceptron(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.widen(x), approximate="tanh"))


class LastLayer(nn.Module):
    """From tokens to the pixels of their patches, modulated by the condition.

    Args:
        width: Width of a token.
        out_width: Numbers in a patch of the output.
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out_width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens (B, N, width) to (B, N, out_width), given ``silu(c)`` (B, width)."""
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.out(modulate(x, shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return ``norm(x) (1 + scale) + shift``, with every token normalised over its width."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def patchify(x: Tensor, edge: int) -> Tensor:
    """Cut images (B, C, H, W) into patches, row by row: (B, N, edge * edge * C), channels fastest.

    >>> patchify(torch.arange(16.0).reshape(1, 1, 4, 4), 2)[0, 1]
    tensor([2., 3., 6., 7.])
    """
    parts = x.unflatten(3, (-1, edge)).unflatten(2, (-1, edge))
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, rows: int, columns: int, edge: int) -> Tensor:
    """Put patches together to images; undoes `patchify`."""
    parts = tokens.unflatten(2, (edge, edge, -1)).unflatten(1, (rows, columns))
    return parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def position_embedding(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Return the fixed embedding of every place of a grid: sines and cosines of column, then of row.

    Args:
        rows: Patches in a column.
        columns: Patches in a row.
        width: Width of the embedding, a multiple of 4.
        device: Where to make it.

    Returns:
        float32, shape (rows * columns, width), row by row.

    Source: the 2-D form of Vaswani et al. 2017, arXiv:1706.03762, as in Dosovitskiy et al. 2021,
    arXiv:2010.11929, and in Peebles and Xie 2023, arXiv:2212.09748.
    """

    def along(count: int) -> Tensor:
        places = torch.arange(count, dtype=torch.float64, device=device)
        cosines, sines = sinusoidal_embedding(places, width // 2).chunk(2, dim=-1)
        return torch.cat([sines, cosines], dim=-1).float()

    across = along(columns)[None, :].expand(rows, -1, -1)
    down = along(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)
