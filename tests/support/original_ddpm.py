"""The network of DDPM as a function of its weights, written from the paper's appendix B: what imports are held against.

Weights have the names of the published PyTorch checkpoints. The function knows nothing of our networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS, EPSILON = 32, 1e-6


def random_weights(
    channels: tuple[int, ...], blocks: int, attends: tuple[int, ...], convolve: bool = True
) -> dict[str, Tensor]:
    """Weights of a network for colour images; without `convolve` the resolution changes without weights."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}

    def layer(name: str, *shape: int) -> None:
        scale = math.prod(shape[1:]) ** -0.5
        weights[f"{name}.weight"] = scale * torch.randn(shape, generator=generator)
        weights[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        weights[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def residual(name: str, width: int, out: int) -> None:
        norm(f"{name}.norm1", width)
        layer(f"{name}.conv1", out, width, 3, 3)
        layer(f"{name}.temb_proj", out, 4 * channels[0])
        norm(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3, 3)
        if width != out:
            layer(f"{name}.nin_shortcut", out, width, 1, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    layer("temb.dense.0", 4 * channels[0], channels[0])
    layer("temb.dense.1", 4 * channels[0], 4 * channels[0])
    layer("conv_in", channels[0], 3, 3, 3)
    left, width = [channels[0]], channels[0]
    last = len(channels) - 1
    for k, out in enumerate(channels):
        for i in range(blocks):
            residual(f"down.{k}.block.{i}", width, out)
            if k in attends:
                attention(f"down.{k}.attn.{i}", out)
            width = out
            left.append(width)
        if k < last:
            if convolve:
                layer(f"down.{k}.downsample.conv", width, width, 3, 3)
            left.append(width)
    residual("mid.block_1", width, width)
    attention("mid.attn_1", width)
    residual("mid.block_2", width, width)
    for k in reversed(range(len(channels))):
        for i in range(blocks + 1):
            residual(f"up.{k}.block.{i}", width + left.pop(), channels[k])
            width = channels[k]
            if k in attends:
                attention(f"up.{k}.attn.{i}", width)
        if k and convolve:
            layer(f"up.{k}.upsample.conv", width, width, 3, 3)
    norm("norm_out", width)
    layer("conv_out", 3, width, 3, 3)
    return weights


def evaluate(weights: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    """The prediction of the noise in images (B, 3, H, W) at the times t, shape (B,)."""

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def convolve(name: str, h: Tensor, **options: int) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2, **options)

    def norm(name: str, h: Tensor) -> Tensor:
        groups = h.unflatten(1, (GROUPS, -1))
        rest = (2, 3, 4)
        mean = groups.mean(rest, keepdim=True)
        variance = ((groups - mean) ** 2).mean(rest, keepdim=True)
        level = ((groups - mean) / (variance + EPSILON).sqrt()).flatten(1, 2)
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return level * weight[:, None, None] + bias[:, None, None]

    def swish(h: Tensor) -> Tensor:
        return h * torch.sigmoid(h)

    def residual(name: str, h: Tensor) -> Tensor:
        inner = convolve(f"{name}.conv1", swish(norm(f"{name}.norm1", h)))
        inner = inner + linear(f"{name}.temb_proj", swish(embedding))[:, :, None, None]
        inner = convolve(f"{name}.conv2", swish(norm(f"{name}.norm2", inner)))
        shortcut = f"{name}.nin_shortcut"
        return inner + (convolve(shortcut, h) if f"{shortcut}.weight" in weights else h)

    def attention(name: str, h: Tensor) -> Tensor:
        if f"{name}.q.weight" not in weights:
            return h
        normed = norm(f"{name}.norm", h)
        q, k, v = (convolve(f"{name}.{part}", normed).flatten(2) for part in "qkv")
        likeness = torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(q.shape[1])
        mixed = torch.einsum("bnm,bcm->bcn", likeness.softmax(-1), v)
        return h + convolve(f"{name}.proj_out", mixed.reshape(h.shape))

    def halve(name: str, h: Tensor) -> Tensor:
        if f"{name}.weight" not in weights:
            return h.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
        # A row and a column of zeros on the far sides alone.
        padded = torch.zeros(*h.shape[:2], h.shape[2] + 1, h.shape[3] + 1)
        padded[:, :, :-1, :-1] = h
        return F.conv2d(padded, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)

    def double(name: str, h: Tensor) -> Tensor:
        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return convolve(name, h) if f"{name}.weight" in weights else h

    def has(name: str) -> bool:
        return f"{name}.conv1.weight" in weights

    half = weights["temb.dense.0.weight"].shape[1] // 2
    angles = t[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    embedding = linear("temb.dense.1", swish(linear("temb.dense.0", waves)))
    h = convolve("conv_in", x)
    left, levels = [h], 0
    while has(f"down.{levels}.block.0"):
        levels += 1
    for k in range(levels):
        i = 0
        while has(f"down.{k}.block.{i}"):
            h = attention(f"down.{k}.attn.{i}", residual(f"down.{k}.block.{i}", h))
            left.append(h)
            i += 1
        if k + 1 < levels:
            h = halve(f"down.{k}.downsample.conv", h)
            left.append(h)
    h = attention("mid.attn_1", residual("mid.block_1", h))
    h = residual("mid.block_2", h)
    for k in reversed(range(levels)):
        i = 0
        while has(f"up.{k}.block.{i}"):
            joined = torch.cat([h, left.pop()], 1)
            h = attention(f"up.{k}.attn.{i}", residual(f"up.{k}.block.{i}", joined))
            i += 1
        if k:
            h = double(f"up.{k}.upsample.conv", h)
    return convolve("conv_out", swish(norm("norm_out", h)))
