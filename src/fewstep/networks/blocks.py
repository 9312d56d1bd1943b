"""The parts of the networks, each a few lines of the papers that introduced it.

Every part keeps the memory format and the floating type of the image tensor that it is given:
channels-last stays channels-last and bfloat16 stays bfloat16, without a copy in the training step.
Normalisation and softmax accumulate in float32 or better inside torch's kernels, whatever the
type of the image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHORT = (
    512  # tokens up to which `attend` writes out the products in half precision on a processor
)


def sinusoidal_embedding(
    t: Tensor, width: int, base: float = 10_000.0, shift: float = 0.0
) -> Tensor:
    """Embed times in cosines and sines of geometrically falling frequencies.

    ``e_i = cos(w_i t)``, ``e_{n+i} = sin(w_i t)`` with ``w_i = base^(-i / (n - shift))``,
    ``i < n = width/2``.

    Computed in float32 or better: at t = 999 bfloat16 could not tell neighbouring steps apart.

    Args:
        t: Times, shape (B,), in steps; fractions are allowed.
        width: Length of the embedding, even.
        base: Ratio of the fastest to the slowest frequency: approached with shift 0, reached with 1.
        shift: Less than n; 1 in the original DDPM, 0 in most others.

    Returns:
        Shape (B, width); float64 if ``t`` is float64, otherwise float32.

    Source: Vaswani et al. 2017, arXiv:1706.03762; of times: Ho et al. 2020, arXiv:2006.11239.

    >>> sinusoidal_embedding(torch.zeros(1), 4)
    tensor([[1., 1., 0., 0.]])
    """
    dtype = torch.promote_types(t.dtype, torch.float32)
    n = width // 2
    exponent = torch.arange(n, dtype=dtype, device=t.device) / -(n - shift)
    angle = t.to(dtype)[:, None] * torch.exp(math.log(base) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def zero_(layer: nn.Module) -> None:
    """Set every parameter of a layer to zero, so that a residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class TimeEmbedding(nn.Module):
    """The conditioning vector of a time: sinusoids, then a two-layer perceptron.

    Args:
        width: Length of the sinusoidal embedding, even.
        out_width: Length of the conditioning vector.
        scale: Factor on t before the sinusoids, which expect steps: 1000 for times in [0, 1].
        shift: Of the frequencies, see `sinusoidal_embedding`.
    """

    def __init__(self, width: int, out_width: int, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.scale = scale
        self.shift = shift
        self.lift = nn.Linear(width, out_width)
        self.mix = nn.Linear(out_width, out_width)

    def forward(self, t: Tensor) -> Tensor:
        """Map times (B,) to conditioning vectors (B, out_width)."""
        steps = t.to(torch.promote_types(t.dtype, torch.float32)) * self.scale
        waves = sinusoidal_embedding(steps, self.width, shift=self.shift)
        return self.mix(F.silu(self.lift(waves.to(self.lift.weight.dtype))))


class NormSiLU(nn.GroupNorm):
    """Group normalisation followed by SiLU, ``u * sigmoid(u)``.

    Source: Wu and He 2018, arXiv:1803.08494; Elfwing et al. 2017, arXiv:1702.03118.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise and activate an image tensor (B, C, H, W)."""
        normed = super().forward(input)
        return F.silu(normed, inplace=not torch.is_grad_enabled())


class AdaptiveNormSiLU(nn.GroupNorm):
    """Group normalisation with a scale and a shift that depend on time and class, then SiLU.

    ``silu(norm(x) (1 + scale) + shift)``.

    Source: Dhariwal and Nichol 2021, arXiv:2105.05233.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, condition: Tensor
    ) -> Tensor:
        """Normalise an image tensor (B, C, H, W), given scale and shift, (B, 2C, 1, 1)."""
        scale, shift = condition.chunk(2, dim=1)
        return F.silu(super().forward(input) * (1 + scale) + shift)


class ResidualBlock(nn.Module):
    """Two normalised convolutions around the addition of the conditioning vector, plus the input.

    ``h = conv1(silu(norm1(x))) + W silu(c)``; ``y = skip(x) + conv2(dropout(silu(norm2(h))))``,
    where ``skip`` is the identity, or a 1x1 convolution if the width changes, and ``conv2`` starts
    at zero. Adaptive blocks have ``scale, shift = W silu(c)`` after ``norm2`` in place of the sum;
    blocks that change the resolution do it to x and to what ``conv1`` is given.

    Args:
        channels: Width of the input.
        out_channels: Width of the output.
        embedding_width: Length of the conditioning vector.
        groups: Groups of the two normalisations, each a divisor of the width that it normalises.
        dropout: Probability of dropping an activation during training.
        epsilon: What the normalisations add to a variance.
        adaptive: Scale and shift after ``norm2`` in place of a sum before it.
        resample: A layer without weights that halves or doubles the resolution, or None.
        scale: Factor on y.

    Source: Ho et al. 2020, arXiv:2006.11239, appendix B; adaptive and resampling blocks from
    Dhariwal and Nichol 2021, arXiv:2105.05233; the factor from Song et al. 2021, arXiv:2011.13456.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_width: int,
        groups: tuple[int, int],
        dropout: float,
        *,
        epsilon: float = 1e-5,
        adaptive: bool = False,
        resample: nn.Module | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.adaptive = adaptive
        self.scale = scale
        self.norm1 = NormSiLU(groups[0], channels, epsilon)
        self.resample = resample
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.condition = nn.Linear(embedding_width, (2 if adaptive else 1) * out_channels)
        norm = AdaptiveNormSiLU if adaptive else NormSiLU
        self.norm2 = norm(groups[1], out_channels, epsilon)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, out_channels, H', W'), given ``silu(c)`` (B, E)."""
        h = self.norm1(x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        condition = self.condition(embedding)[:, :, None, None]
        h = self.norm2(h, condition) if self.adaptive else self.norm2(h + condition)
        return _scaled(self.skip(x) + self.conv2(self.dropout(h)), self.scale)


def _scaled(x: Tensor, factor: float) -> Tensor:
    """Multiply, but not by 1, which would read and write the image for nothing."""
    return x if factor == 1 else x * factor


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Mix values by the softmax of the scaled products of queries and keys.

    ``softmax(q k^T / sqrt(d)) v``.

    Args:
        query: Shape (B, heads, N, d).
        key: Shape (B, heads, L, d).
        value: Shape (B, heads, L, d).

    Returns:
        Shape (B, heads, N, d).

    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """
    on_cpu = query.device.type == "cpu"
    reduced = query.dtype in (torch.bfloat16, torch.float16)
    if on_cpu and reduced and torch.is_grad_enabled() and key.shape[-2] <= _SHORT:
        # The gradient of torch's fused kernel sets up its products for each head of each image;
        # for short sequences in half precision that takes several times as long as the products.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return scores.softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Residual multi-head attention of the pixels to one another or to a context sequence.

    ``y = x + W softmax(q k^T / sqrt(d)) v`` per head of width d; q comes from the normalised
    pixels, k and v from the same pixels or from the context; W starts at zero.

    Args:
        channels: Width of the image tensor.
        heads: Number of heads; divides ``channels``.
        groups: Groups of the normalisation.
        context_width: Width of the context, or 0 for self-attention.
        epsilon: What the normalisation adds to a variance.
        scale: Factor on y.

    Source: Vaswani et al. 2017, arXiv:1706.03762; on pixels Ho et al. 2020, arXiv:2006.11239;
    to a context Rombach et al. 2022, arXiv:2112.10752.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        groups: int,
        context_width: int = 0,
        *,
        epsilon: float = 1e-5,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.norm = nn.GroupNorm(groups, channels, epsilon)
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(context_width or channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W) to the same shape; a context is (B, L, context_width)."""
        # In channels-last the sequence of pixels is a view of the image: no copy in or out.
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        query = self.query(pixels).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        source = pixels if context is None else context
        key, value = (
            self.key_value(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed = attend(query, key, value)
        attended = self.out(mixed.transpose(1, 2).flatten(2))
        return _scaled(x + attended.transpose(1, 2).unflatten(2, x.shape[2:]), self.scale)


class Stage(nn.Module):
    """A residual block, followed by self-attention and cross-attention where they are asked for.

    Args:
        residual: The residual block.
        attention: Attention among the pixels, or None.
        cross: Attention to the context, or None.
    """

    def __init__(
        self, residual: ResidualBlock, attention: Attention | None, cross: Attention | None
    ) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention
        self.cross = cross

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        """Map (B, C, H, W) to (B, C', H, W), given ``silu(c)`` (B, E) and context (B, L, W)."""
        x = self.residual(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        if self.cross is not None:
            x = self.cross(x, context)
        return x


class Downsample(nn.Conv2d):
    """Halve the resolution by a 3x3 convolution with stride 2.

    Args:
        channels: Width of the image.
        pad_after: Pad on the right and below alone, as the original DDPM does.
    """

    def __init__(self, channels: int, pad_after: bool = False) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=0 if pad_after else 1)
        self.pad_after = pad_after

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H/2, W/2)."""
        return super().forward(F.pad(input, (0, 1, 0, 1)) if self.pad_after else input)


class Upsample(nn.Conv2d):
    """Double the resolution by repeating pixels, then smooth by a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 2H, 2W)."""
        return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest"))
