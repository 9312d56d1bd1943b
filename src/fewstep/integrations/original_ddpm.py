"""The PyTorch checkpoints of DDPM's and DDIM's networks: their shape is read off their weights.

Source: Ho, Jain, Abbeel 2020, arXiv 2006.11239; Song, Meng, Ermon 2020, arXiv 2010.02502.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.errors import CheckpointError, InvalidInputError
from fewstep.integrations.foreign_files import tensors_in
from fewstep.integrations.found import Found, Weights
from fewstep.integrations.unet_names import ORIGINAL
from fewstep.networks import UNetConfig

MARK = "temb.dense.0.weight"
ATTENTION_SIZE = 16
"""Edge of the images at which all of DDPM's networks attend."""

EMA_PLACE = 4
"""Where DDIM's training puts the averaged weights: after network, optimiser, epoch and step."""

UNUSED = "logvar"
"""Numbers that some of the files hold beside the network."""


def is_original(content: Any) -> bool:
    """Say whether the content of a file is such a checkpoint."""
    return MARK in tensors_in(content[0] if isinstance(content, list) and content else content)


def read_original(content: Any, path: Path, weights: Weights) -> Found:
    """Read the checkpoint: tensors by name, or a list of network, optimiser, epoch, step and perhaps averages.

    Raises:
        InvalidInputError: It has no such weights.
        CheckpointError: The weights that tell the shape of the network are not all there.
    """
    states = content if isinstance(content, list) else [content]
    averaged = tensors_in(states[EMA_PLACE]) if len(states) > EMA_PLACE else {}
    single = not isinstance(content, list)
    if weights == "raw" and single:
        raise InvalidInputError(
            f"{path.name} holds one set of weights and does not say which; leave out weights='raw'"
        )
    taken = averaged if averaged and weights == "ema" else tensors_in(states[0])
    chosen = {name: value for name, value in taken.items() if name != UNUSED}
    network = _config(chosen, path)
    size = ATTENTION_SIZE * 2 ** network.attention[0] if network.attention else None
    return Found(
        kind="a network of DDPM or DDIM in PyTorch",
        network=network,
        names=ORIGINAL,
        weights=chosen,
        sines_first=True,
        size=None if size is None else (size, size),
        weights_are="the only ones" if single else ("averaged" if taken is averaged else "raw"),
        size_from="such networks attend at 16x16",
        assumed=("dropout 0, for weights do not tell it; the published networks have 0.1 or 0",),
    )


def _config(weights: Mapping[str, Tensor], path: Path) -> UNetConfig:
    """Read the network's shape off its weights; what is the same in all of them stands here."""
    levels = _count(weights, "down.{}.block.0.conv1.weight")
    blocks = [_count(weights, f"down.{k}.block.{{}}.conv1.weight") for k in range(levels)]
    try:
        return UNetConfig(
            in_channels=weights["conv_in.weight"].shape[1],
            out_channels=_or_none(weights),
            channels=tuple(
                weights[f"down.{k}.block.0.conv1.weight"].shape[0] for k in range(levels)
            ),
            blocks=blocks[0] if len(set(blocks)) == 1 else tuple(blocks),
            attention=tuple(k for k in range(levels) if f"down.{k}.attn.0.q.weight" in weights),
            middle_attention="mid.attn_1.q.weight" in weights,
            resample="conv" if _resamples(weights) or levels == 1 else "plain",
            pad_after=_resamples(weights),
            groups=32,
            norm_epsilon=1e-6,
            frequency_shift=1,
        )
    except (KeyError, InvalidInputError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"{path} looks like a network of DDPM, but its shape cannot be read off it: {what}; the file is "
            "incomplete or of another network: copy it again from its source"
        ) from error


def _count(weights: Mapping[str, Tensor], name: str) -> int:
    """How many of a numbered weight there are."""
    count = 0
    while name.format(count) in weights:
        count += 1
    return count


def _resamples(weights: Mapping[str, Tensor]) -> bool:
    return "down.0.downsample.conv.weight" in weights


def _or_none(weights: Mapping[str, Tensor]) -> int | None:
    out = weights["conv_out.weight"].shape[0]
    return None if out == weights["conv_in.weight"].shape[1] else out
