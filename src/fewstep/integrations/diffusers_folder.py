"""Folders of diffusers: a whole pipeline, or a network alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.checkpoints import load_json
from fewstep.errors import CheckpointError, InvalidInputError
from fewstep.integrations.diffusers_unet import CLASS, unet_from_diffusers
from fewstep.integrations.foreign_files import read_weights, tensors_in
from fewstep.integrations.found import Found, Weights
from fewstep.integrations.scheduler_config import process_from_scheduler
from fewstep.integrations.unet_names import DIFFUSERS
from fewstep.networks import UNetConfig
from fewstep.process import Process

INDEX_FILE, CONFIG_FILE, SCHEDULER_FILE = (
    "model_index.json",
    "config.json",
    "scheduler_config.json",
)
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
NETWORK_FOLDERS = ("unet_ema", "unet", ".")
"""Where the network lies; a training of diffusers keeps its averages beside it."""

OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What the layers of an attention were called before."""


def is_diffusers(folder: Path) -> bool:
    """Say whether a folder is a pipeline or a network of diffusers."""
    if (folder / INDEX_FILE).is_file():
        return True
    return any(
        "_class_name" in load_json(folder / place / CONFIG_FILE)
        for place in NETWORK_FOLDERS
        if (folder / place / CONFIG_FILE).is_file()
    )


def read_diffusers(folder: Path, weights: Weights, process_needed: bool) -> Found:
    """Read the network, and the process where the folder has a scheduler.

    Args:
        folder: A pipeline, a network alone, or a checkpoint of diffusers' training.
        weights: Which, if it has both.
        process_needed: Whether an unknown scheduler is an error, for nobody gave a process in its place.

    Raises:
        InvalidInputError: A network or a scheduler that has no counterpart here.
        CheckpointError: Files are missing or damaged.
    """
    place, which = _network_in(folder, weights)
    content = load_json(place / CONFIG_FILE)
    if content.get("_class_name") != CLASS:
        raise InvalidInputError(
            f"{place / CONFIG_FILE} is of a {content.get('_class_name')!r}, and only a {CLASS} can become our U-Net; "
            "sample it as it is: fewstep.Denoiser"
        )
    try:
        network, sines_first = unet_from_diffusers(content)
        size = _size(content.get("sample_size"))
    except InvalidInputError:
        raise
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise InvalidInputError(
            f"{place / CONFIG_FILE} has an entry of a wrong kind: {error}; copy it again from its source"
        ) from error
    facts = content.get("_fewstep")
    told = read_scheduler(folder) if process_needed else None
    return Found(
        kind=_kind(folder),
        network=network,
        names=DIFFUSERS,
        weights=_new_names(_weights_in(place)),
        sines_first=sines_first,
        size=size,
        weights_are=which,
        process=told and told[0].to_dict(),
        predicts=told and told[1],
        assumed=_heads_assumed(network, content),
        facts=facts if isinstance(facts, dict) else {},
    )


def read_scheduler(folder: Path) -> tuple[Process, str] | None:
    """Return the process and the prediction of a pipeline; None: it has no scheduler."""
    for path in (folder / "scheduler" / SCHEDULER_FILE, folder / SCHEDULER_FILE):
        if path.is_file():
            return process_from_scheduler(load_json(path))
    return None


def _heads_assumed(network: UNetConfig, content: Mapping[str, Any]) -> tuple[str, ...]:
    """What to say of the heads, which no weight tells of: the oldest files leave them out."""
    if "attention_head_dim" in content or not (network.attention or network.middle_attention):
        return ()
    return (
        f"attention heads of width {network.head_width}, as diffusers takes them today, for {CONFIG_FILE} does not "
        'tell; for a network with a single head, add "attention_head_dim": null to it',
    )


def _kind(folder: Path) -> str:
    if not (folder / INDEX_FILE).is_file():
        return f"a {CLASS} of diffusers"
    return f"a {load_json(folder / INDEX_FILE).get('_class_name', 'pipeline')} of diffusers"


def _network_in(folder: Path, weights: Weights) -> tuple[Path, str]:
    """The folder of the network, and which weights it holds."""
    places = [folder / name for name in NETWORK_FOLDERS if (folder / name / CONFIG_FILE).is_file()]
    both = [place for place in places if place.name != "unet_ema"]
    if not places:
        raise CheckpointError(
            f"{folder} has no network: neither unet/{CONFIG_FILE} nor {CONFIG_FILE}; give a whole folder of "
            "an unconditional image pipeline, or the folder of a network"
        )
    if len(both) == len(places):
        if weights == "raw":
            raise InvalidInputError(
                f"{folder} holds one set of weights and does not say which; leave out weights='raw'"
            )
        return places[0], "the only ones"
    return (places[0], "averaged") if weights == "ema" or not both else (both[0], "raw")


def _weights_in(place: Path) -> dict[str, Tensor]:
    path = next((place / name for name in WEIGHT_FILES if (place / name).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{place} has no weights: neither {' nor '.join(WEIGHT_FILES)}; copy the whole folder"
        )
    return tensors_in(read_weights(path))


def _new_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the layers of attentions the names that they have today."""
    renamed = {}
    for name, weight in weights.items():
        path, _, kind = name.rpartition(".")
        before, _, last = path.rpartition(".")
        if ".attentions." in name and last in OLD_NAMES:
            name = f"{before}.{OLD_NAMES[last]}.{kind}"
        renamed[name] = weight
    return renamed


def _size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    height, width = value if isinstance(value, Sequence) else (value, value)
    return int(height), int(width)
