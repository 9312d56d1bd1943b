"""What other codes call the weights of our U-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.errors import CheckpointError
from fewstep.networks import UNet
from fewstep.networks.blocks import Downsample, ResidualBlock, Stage, Upsample

SHOWN = 3
"""How many faults of a checkpoint a message lists."""

AUGMENT = "augment"
"""Our layer that tells of augmentations: training alone uses it, and no other code has it."""


@dataclass(frozen=True)
class Names:
    """How a code names the layers of the U-Net.

    Args:
        outer: Its names of our layers outside the two ways and the middle.
        down: A resolution on the way down, from its ``level``, 0 the finest.
        up: A resolution on the way up, from its ``level`` or its ``place`` on the way, 0 the first.
        residual: The residual block ``index`` of the resolution ``{block}``.
        attention: The attention after it.
        halve: What halves a resolution, within it.
        double: What doubles it.
        middle: The residual block, the attention and the residual block of the middle.
        residual_parts: Names of the layers in a residual block, where they differ from ours.
        attention_parts: Names of the layers in an attention; two for our one that has keys and values.
    """

    outer: Mapping[str, str]
    down: str
    up: str
    residual: str
    attention: str
    halve: str
    double: str
    middle: tuple[str, str, str]
    residual_parts: Mapping[str, str]
    attention_parts: Mapping[str, tuple[str, ...]]


DIFFUSERS = Names(
    outer={
        "conv_in": "conv_in",
        "time.lift": "time_embedding.linear_1",
        "time.mix": "time_embedding.linear_2",
        "classes": "class_embedding",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    },
    down="down_blocks.{level}",
    up="up_blocks.{place}",
    residual="{block}.resnets.{index}",
    attention="{block}.attentions.{index}",
    halve="downsamplers.0",
    double="upsamplers.0",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    residual_parts={"condition": "time_emb_proj", "skip": "conv_shortcut"},
    attention_parts={
        "norm": ("group_norm",),
        "query": ("to_q",),
        "key_value": ("to_k", "to_v"),
        "out": ("to_out.0",),
    },
)
"""`UNet2DModel` of diffusers."""

ORIGINAL = Names(
    outer={
        "conv_in": "conv_in",
        "time.lift": "temb.dense.0",
        "time.mix": "temb.dense.1",
        "norm_out": "norm_out",
        "conv_out": "conv_out",
    },
    down="down.{level}",
    up="up.{level}",
    residual="{block}.block.{index}",
    attention="{block}.attn.{index}",
    halve="downsample",
    double="upsample",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    residual_parts={"condition": "temb_proj", "skip": "nin_shortcut"},
    attention_parts={
        "norm": ("norm",),
        "query": ("q",),
        "key_value": ("k", "v"),
        "out": ("proj_out",),
    },
)
"""The PyTorch versions of the original DDPM networks, as DDIM published them."""


def their_names(net: UNet, names: Names) -> dict[str, tuple[str, ...]]:
    """Return, for each of our weights, what another code calls it; two names for keys and values in one.

    >>> from fewstep.networks import UNetConfig
    >>> with torch.device("meta"):
    ...     net = UNet(UNetConfig(channels=(32,), blocks=1))
    >>> their_names(net, DIFFUSERS)["middle.0.attention.key_value.bias"]
    ('mid_block.attentions.0.to_k.bias', 'mid_block.attentions.0.to_v.bias')
    """
    layers = dict(_layers(net, names))
    table = {}
    for ours in net.state_dict():
        layer, _, kind = ours.rpartition(".")
        if layer == AUGMENT:
            continue
        table[ours] = tuple(f"{name}.{kind}" for name in layers[layer])
    return table


def from_theirs(
    net: UNet, names: Names, weights: Mapping[str, Tensor], sines_first: bool, source: str
) -> dict[str, Tensor]:
    """Return the weights of our network, given those of another code.

    Args:
        net: The network, for names and shapes; it may be on the device "meta".
        names: The code that they come from.
        weights: Tensors by its names; 1x1 convolutions do for linear layers.
        sines_first: Whether its time embedding has the sines before the cosines.
        source: Where they come from, for messages.

    Raises:
        CheckpointError: Weights are missing, unknown, or of another shape; says which.
    """
    table, own = their_names(net, names), net.state_dict()
    wanted = {
        name: piece.shape
        for ours, theirs in table.items()
        for name, piece in zip(theirs, own[ours].chunk(len(theirs)), strict=True)
    }
    given = {
        name: weights[name].reshape(shape) if _is_1x1(weights[name], shape) else weights[name]
        for name, shape in wanted.items()
        if name in weights
    }
    _refuse(source, "are missing", [name for name in wanted if name not in given])
    _refuse(source, "are unknown", [name for name in weights if name not in wanted])
    _refuse(
        source,
        "have another shape than its configuration says",
        [
            f"{name} {tuple(given[name].shape)} instead of {tuple(shape)}"
            for name, shape in wanted.items()
            if given[name].shape != shape
        ],
    )
    ready = {ours: torch.cat([given[name] for name in theirs]) for ours, theirs in table.items()}
    if sines_first:
        lift = ready["time.lift.weight"]
        ready["time.lift.weight"] = lift.roll(lift.shape[1] // 2, dims=1)
    return ready


def to_theirs(net: UNet, names: Names) -> dict[str, Tensor]:
    """Return the weights of our network by the names of another code, cosines before sines."""
    own = net.state_dict()
    return {
        name: piece
        for ours, theirs in their_names(net, names).items()
        for name, piece in zip(theirs, own[ours].chunk(len(theirs)), strict=True)
    }


def _layers(net: UNet, names: Names) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each layer with weights, and what the other code calls it."""
    levels = len(net.config.channels)
    for ours, theirs in names.outer.items():
        yield ours, (theirs,)
    yield from _way(net.down, "down", lambda p: names.down.format(level=p), names.halve, names)
    yield from _way(
        net.up,
        "up",
        lambda p: names.up.format(place=p, level=levels - 1 - p),
        names.double,
        names,
    )
    before, attention, after = names.middle
    for index, residual in enumerate((before, after)):
        stage = net.middle[index]
        assert isinstance(stage, Stage)
        yield from _stage(stage, f"middle.{index}", residual, attention, names)


def _way(
    layers: nn.ModuleList, ours: str, block_at: Callable[[int], str], between: str, names: Names
) -> Iterator[tuple[str, tuple[str, ...]]]:
    place = index = 0
    for number, layer in enumerate(layers):
        own, block = f"{ours}.{number}", block_at(place)
        if isinstance(layer, Stage):
            residual = names.residual.format(block=block, index=index)
            attention = names.attention.format(block=block, index=index)
            yield from _stage(layer, own, residual, attention, names)
            index += 1
            continue
        if isinstance(layer, ResidualBlock):
            yield from _residual(layer, own, f"{block}.{between}", names)
        elif isinstance(layer, Downsample | Upsample):
            yield own, (f"{block}.{between}.conv",)
        place, index = place + 1, 0


def _stage(
    stage: Stage, ours: str, residual: str, attention: str, names: Names
) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _residual(stage.residual, f"{ours}.residual", residual, names)
    if stage.attention is not None:
        for part, theirs in names.attention_parts.items():
            yield f"{ours}.attention.{part}", tuple(f"{attention}.{name}" for name in theirs)


def _residual(
    block: ResidualBlock, ours: str, theirs: str, names: Names
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for part, _ in block.named_children():
        yield f"{ours}.{part}", (f"{theirs}.{names.residual_parts.get(part, part)}",)


def _is_1x1(weight: Tensor, shape: torch.Size) -> bool:
    return weight.ndim == 4 and weight.shape == (*shape, 1, 1)


def _refuse(source: str, what: str, faults: list[str]) -> None:
    if faults:
        more = ", ..." if len(faults) > SHOWN else ""
        raise CheckpointError(
            f"{len(faults)} weights of {source} {what}: {', '.join(faults[:SHOWN])}{more}; the file is "
            "incomplete or of another network: copy it again from its source, or check its configuration"
        )
