"""Checkpoints of other codes as models of ours, with the outputs that they had there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fewstep.process as processes
from fewstep.checkpoints import load_json
from fewstep.errors import InvalidInputError
from fewstep.integrations.denoising_diffusion import (
    is_denoising_diffusion,
    read_process,
    refuse_network,
)
from fewstep.integrations.diffusers_folder import is_diffusers, read_diffusers, read_scheduler
from fewstep.integrations.foreign_files import read_weights
from fewstep.integrations.found import (
    DEFAULT_PREDICTS,
    DEFAULT_PROCESS,
    Found,
    NullClass,
    Weights,
)
from fewstep.integrations.original_ddpm import is_original, read_original
from fewstep.integrations.unet_names import from_theirs
from fewstep.models import CONFIG_FILE, FORMAT, Model, ModelConfig, fill
from fewstep.networks import UNet
from fewstep.process import Process

KNOWN = (
    "a folder of diffusers with an unconditional or class-conditional image pipeline or its UNet2DModel, or a file "
    "of the PyTorch networks of DDPM and DDIM"
)


def import_checkpoint(
    source: str | os.PathLike[str],
    *,
    name: str = "",
    weights: Weights = "ema",
    size: int | None = None,
    process: Mapping[str, Any] | None = None,
    predicts: str | None = None,
    null_class: NullClass | None = None,
) -> Model:
    """Return a trained network of another code as a model of ours; what it is, is found out by its files.

    No code is ever loaded from a file.

    Args:
        source: A folder of diffusers, or a file of the PyTorch networks of DDPM and DDIM.
        name: What to call the model; by default as the source.
        weights: "ema", the averaged ones if there are two sets, or "raw".
        size: Height and width of the images, in pixels; by default what the source says.
        process: The process as plain data, if the source tells none or a wrong one.
        predicts: What the network predicts, likewise.
        null_class: For class-conditional networks: "last", if the last of its classes stood for "no class" in
            training; "mean", to add a null class that is the mean of all classes. By default "mean", or what
            `export_pipeline` noted.

    Returns:
        The model; ``config.training["imported"]`` records what it was, and what was taken for granted.

    Raises:
        InvalidInputError: There is no such source, or it has no counterpart here; says what.
        CheckpointError: The source is damaged or incomplete, or would have to run code to be read.
    """
    path = _existing(source)
    found = _read(path, weights, process_needed=process is None or predicts is None)
    assumed = list(found.assumed)
    if found.process is None and process is None:
        assumed.append("the process vp_linear of DDPM, for the source has no scheduler")
    if found.predicts is None and predicts is None:
        assumed.append("that it predicts noise, for the source has no scheduler")
    if size is None and found.size and found.size_from:
        assumed.append(f"images of {found.size[0]}x{found.size[1]}, for {found.size_from}")
    height, width = (size, size) if size is not None else found.size or (None, None)
    if height is None or width is None:
        raise InvalidInputError(f"{path.name} does not tell how large its images are; give size")
    found = _with_null_class(found, null_class, assumed)
    network = _network(found, path)
    classes = found.network.num_classes
    names = found.facts.get("class_names", [])
    if len(names) != classes:
        names = [str(label) for label in range(classes)]
    config = ModelConfig(
        network=found.network,
        process=processes.from_dict(process or found.process or DEFAULT_PROCESS).to_dict(),
        shape=(found.network.in_channels, height, width),
        predicts=predicts or found.predicts or DEFAULT_PREDICTS,
        class_names=tuple(names),
        name=name or found.facts.get("name") or (path.name if path.is_dir() else path.stem),
        recommended=found.facts.get("recommended", {}),
        training={
            "imported": {
                "kind": found.kind,
                "source": path.name,
                "weights": found.weights_are,
                "assumed": assumed,
            }
        },
    )
    return Model(network, config)


def import_process(source: str | os.PathLike[str]) -> tuple[Process, str]:
    """Return the process of a checkpoint of another code, and what its network predicts, for `fewstep.Denoiser`.

    Args:
        source: A pipeline of diffusers, or a file of denoising-diffusion-pytorch.

    Raises:
        InvalidInputError: There is no such source, or it tells of no process.
        CheckpointError: The source is damaged, or would have to run code to be read.
    """
    path = _existing(source)
    if path.is_dir():
        told = read_scheduler(path)
        if told is None:
            raise InvalidInputError(f"{path} has no scheduler; give the folder of a pipeline")
        return told
    content = read_weights(path)
    if not is_denoising_diffusion(content):
        raise InvalidInputError(
            f"{path.name} tells of no process; give a pipeline of diffusers or a file of denoising-diffusion-pytorch"
        )
    return read_process(content, path)


def _existing(source: str | os.PathLike[str]) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise InvalidInputError(
            f"there is no file or folder {path}; nothing is downloaded: get it first, then give where it lies. "
            f"It may be {KNOWN}"
        )
    return path.resolve()


def _read(path: Path, weights: Weights, process_needed: bool) -> Found:
    """Find out what a source is, and read it."""
    if path.is_dir():
        if is_diffusers(path):
            return read_diffusers(path, weights, process_needed)
        config = path / CONFIG_FILE
        if config.is_file() and load_json(config).get("format") == FORMAT:
            raise InvalidInputError(
                f"{path} is no checkpoint of another code; fewstep.load reads models of ours"
            )
        raise InvalidInputError(f"{path} is no checkpoint that can be imported; known are {KNOWN}")
    content = read_weights(path)
    if is_original(content):
        return read_original(content, path, weights)
    if is_denoising_diffusion(content):
        raise refuse_network(content, path)
    if isinstance(content, dict) and "time_embedding.linear_1.weight" in content:
        raise InvalidInputError(
            f"{path.name} holds the weights of a network of diffusers without its configuration; give the folder "
            "that has its config.json too"
        )
    raise InvalidInputError(
        f"{path} holds no network that can be imported ({_holds(content)}); known are {KNOWN}"
    )


def _with_null_class(found: Found, null_class: NullClass | None, assumed: list[str]) -> Found:
    """Make the last row of the class embeddings the null class, by adding one or by declaring the last to be it."""
    rows = found.network.num_classes
    if not rows:
        if null_class is not None:
            raise InvalidInputError(
                f"null_class = {null_class!r}, but the network has no classes; leave it out"
            )
        return found
    if (null_class or found.facts.get("null_class")) == "last":
        if rows == 1:
            raise InvalidInputError("null_class = 'last' leaves no class of 1; leave it out")
        return replace(found, network=found.network.replace(num_classes=rows - 1))
    assumed.append(
        "a null class, the mean of all classes; guidance away from it was not trained for"
    )
    embedding = found.names.outer["classes"] + ".weight"
    if embedding not in found.weights:
        return found
    table = found.weights[embedding]
    extended = torch.cat([table, table.mean(0, keepdim=True)])
    return replace(found, weights={**found.weights, embedding: extended})


def _network(found: Found, path: Path) -> nn.Module:
    with torch.device("meta"):  # no initial weights, so no random numbers either
        network = UNet(found.network).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    ready = from_theirs(network, found.names, found.weights, found.sines_first, path.name)
    network = network.to_empty(device="cpu")
    fill(network, ready, path)
    return network


def _holds(content: Any) -> str:
    if isinstance(content, dict):
        names = [str(name) for name in list(content)[:3]]
        return f"entries such as {', '.join(names)}" if names else "nothing"
    return f"a {type(content).__name__}"
