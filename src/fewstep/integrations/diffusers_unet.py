"""The configuration of diffusers' `UNet2DModel` as that of our U-Net, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.errors import InvalidInputError
from fewstep.networks import UNetConfig

CLASS, VERSION = "UNet2DModel", "0.30.0"
"""The class, and the version of diffusers whose files are written; newer ones read them."""
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""Its fields and what they are if a configuration leaves them out."""

ALLOWED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
"""Values of fields beside which our U-Net has no counterpart."""

RESAMPLE = {"conv": "conv", "resnet": "residual"}
PLAIN_BLOCKS = {
    "DownBlock2D": "conv",
    "UpBlock2D": "conv",
    "ResnetDownsampleBlock2D": "residual",
    "ResnetUpsampleBlock2D": "residual",
}
"""Blocks without attention, and how they change the resolution."""

ATTENTION_BLOCKS = {"AttnDownBlock2D": "downsample_type", "AttnUpBlock2D": "upsample_type"}
"""Blocks with attention, and the field that says how they change the resolution."""


def unet_from_diffusers(content: Mapping[str, Any]) -> tuple[UNetConfig, bool]:
    """Return our configuration of a `UNet2DModel`, and whether its time embedding has the sines first.

    Args:
        content: The content of its ``config.json``.

    Returns:
        ``num_classes`` is the number of its class embeddings, though the last row of ours is the null class.

    Raises:
        InvalidInputError: A field has a value that our U-Net has no counterpart of; names both.

    >>> fields = {"block_out_channels": [32], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    >>> config, sines_first = unet_from_diffusers({**fields, "downsample_padding": 0, "freq_shift": 1})
    >>> config.pad_after, config.frequency_shift, sines_first
    (True, 1, False)
    """
    fields = {**DEFAULTS, **{k: v for k, v in content.items() if not k.startswith("_")}}
    for name, value in fields.items():
        if name not in DEFAULTS and value:
            raise refused(name, value, "no such field")
        if name in ALLOWED and value not in ALLOWED[name]:
            raise refused(name, value, " or ".join(map(repr, ALLOWED[name])))
    channels = fields["block_out_channels"]
    _check_embedding_and_groups(fields, channels)
    downs, ups = fields["down_block_types"], fields["up_block_types"]
    attends, resample = _blocks(fields, "down_block_types", downs)
    attends_up, resample_up = _blocks(fields, "up_block_types", ups)
    if attends_up != attends[::-1] or len(attends) != len(channels):
        raise refused("up_block_types", ups, f"the mirror image of down_block_types {downs}")
    if resample_up != resample:
        raise refused("up_block_types", ups, f"the resampling of down_block_types {downs}")
    head = fields["attention_head_dim"]
    config = UNetConfig(
        in_channels=fields["in_channels"],
        out_channels=_or_none(fields["out_channels"], fields["in_channels"]),
        num_classes=fields["num_class_embeds"] or 0,
        channels=tuple(channels),
        blocks=fields["layers_per_block"],
        attention=tuple(level for level, attending in enumerate(attends) if attending),
        heads=1,
        head_width=head or 0,
        dropout=fields["dropout"],
        groups=fields["norm_num_groups"],
        norm_epsilon=fields["norm_eps"],
        condition="shift" if fields["resnet_time_scale_shift"] == "default" else "scale-shift",
        resample=resample,
        pad_after=fields["downsample_padding"] == 0 and resample == "conv",
        middle_attention=fields["add_attention"],
        frequency_shift=fields["freq_shift"],
    )
    return config, not fields["flip_sin_to_cos"]


def unet_to_diffusers(config: UNetConfig, size: Sequence[int]) -> dict[str, Any]:
    """Return the ``config.json`` of a `UNet2DModel` that computes the same.

    Args:
        config: Our configuration.
        size: Height and width of the images.

    Raises:
        InvalidInputError: A field that `UNet2DModel` has no counterpart of; names it and its value.

    >>> unet_to_diffusers(UNetConfig(pad_after=True), (32, 32))["downsample_padding"]
    0
    """
    for name, allowed in (
        ("context_width", 0),
        ("time_scale", 1),
        ("residual_scale", 1),
        ("skip_scale", 1),
    ):
        if getattr(config, name) != allowed:
            raise _unsaid(name, getattr(config, name), allowed)
    if config.group_width:
        raise _unsaid(
            "group_width",
            config.group_width,
            "one number of groups for all widths, norm_num_groups (here: group_width 0, and groups)",
        )
    if config.out_channels not in (None, config.in_channels):
        raise _unsaid("out_channels", config.out_channels, config.in_channels)
    if config.resample == "plain":
        raise _unsaid("resample", "plain", "'conv' or 'residual'")
    counts = {config.blocks_at(level) for level in range(len(config.channels))}
    if len(counts) > 1:
        raise _unsaid("blocks", config.blocks, "the same number for every resolution")
    kind = next(theirs for theirs, ours in RESAMPLE.items() if ours == config.resample)
    down, up = (name for name, way in PLAIN_BLOCKS.items() if way == config.resample)
    attends = [level in config.attention for level in range(len(config.channels))]
    return {
        "_class_name": CLASS,
        "_diffusers_version": VERSION,
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": config.frequency_shift,
        "flip_sin_to_cos": True,
        "down_block_types": ["AttnDownBlock2D" if a else down for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else up for a in reversed(attends)],
        "block_out_channels": list(config.channels),
        "layers_per_block": counts.pop(),
        "mid_block_scale_factor": 1,
        "downsample_padding": 0 if config.pad_after else 1,
        "downsample_type": kind,
        "upsample_type": kind,
        "dropout": config.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head_dim(config),
        "norm_num_groups": config.groups,
        "attn_norm_num_groups": config.groups,
        "norm_eps": config.norm_epsilon,
        "resnet_time_scale_shift": "default" if config.condition == "shift" else "scale_shift",
        "add_attention": config.middle_attention,
        "class_embed_type": None,
        "num_class_embeds": config.num_classes + 1 if config.num_classes else None,
    }


def refused(name: str, value: Any, allowed: str) -> InvalidInputError:
    """Build the error for a field that our U-Net has no counterpart of."""
    return InvalidInputError(
        f"{name} = {value!r} of this {CLASS} has no counterpart in our U-Net, which takes {allowed}; it can be "
        "sampled as it is: fewstep.Denoiser(lambda x, t: unet(x, t).sample, process, predicts)"
    )


def _check_embedding_and_groups(fields: Mapping[str, Any], channels: Sequence[int]) -> None:
    wide = 4 * channels[0]
    if fields["time_embedding_dim"] not in (None, wide):
        raise refused("time_embedding_dim", fields["time_embedding_dim"], f"{wide}")
    groups, own = fields["norm_num_groups"], fields["attn_norm_num_groups"]
    if own is None and fields["resnet_time_scale_shift"] == "default":
        own = groups
    if fields["add_attention"] and own != groups:
        raise refused(
            "attn_norm_num_groups",
            fields["attn_norm_num_groups"],
            f"{groups}, as norm_num_groups, for it always normalises before attention",
        )


def _blocks(fields: Mapping[str, Any], name: str, types: Sequence[str]) -> tuple[list[bool], str]:
    """Which blocks attend, and how they change the resolution, which the last does not."""
    short = [kind.removeprefix("UNetRes") for kind in types]
    for kind in short:
        if kind not in PLAIN_BLOCKS and kind not in ATTENTION_BLOCKS:
            raise refused(name, kind, ", ".join([*PLAIN_BLOCKS, *ATTENTION_BLOCKS]))
    ways = {
        PLAIN_BLOCKS.get(kind) or RESAMPLE[fields[ATTENTION_BLOCKS[kind]]] for kind in short[:-1]
    }
    if len(ways) > 1:
        raise refused(name, list(types), "one kind of resampling for all resolutions")
    return [kind in ATTENTION_BLOCKS for kind in short], ways.pop() if ways else "conv"


def _head_dim(config: UNetConfig) -> int | None:
    """The width of a head, None for one head of any width."""
    if config.head_width or config.heads == 1:
        return config.head_width or None
    attended = {config.channels[level] for level in config.attention}
    if config.middle_attention:
        attended.add(config.channels[-1])
    widths = {width // config.heads for width in attended}
    if len(widths) > 1:
        raise _unsaid("heads", config.heads, "1, or heads of one width: head_width")
    return widths.pop() if widths else None


def _or_none(value: int, usual: int) -> int | None:
    return None if value == usual else value


def _unsaid(name: str, value: Any, allowed: Any) -> InvalidInputError:
    return InvalidInputError(
        f"{name} = {value!r} of this network has no counterpart in diffusers' {CLASS}, which takes {allowed}; "
        "such a model cannot be exported"
    )
