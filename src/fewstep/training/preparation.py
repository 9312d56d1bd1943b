"""What has to be right before the first step: device, images, network, and the run that is gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data import Finding, ImageSet, OnProgress, check_images
from fewstep.errors import DataError, InvalidInputError
from fewstep.models import ModelConfig
from fewstep.networks import NetworkConfig, build, config_to_dict
from fewstep.team import Group
from fewstep.training.augmentation import WIDTH as AUGMENT_WIDTH
from fewstep.training.config import TrainingConfig
from fewstep.training.state import TrainingState

VARIANCE_IMAGES = 65_536


def usable_device(device: str | torch.device | None) -> torch.device:
    """Return a device that tensors can be made on; None: CUDA if there is any, else the CPU.

    Raises:
        InvalidInputError: There is no such device here.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise InvalidInputError(
            f"device {device!r} cannot be used ({reason}); give cpu, or cuda where there is an accelerator"
        ) from error
    return chosen


def check_for_training(
    images: ImageSet, on_progress: OnProgress | None = None
) -> tuple[Finding, ...]:
    """Return the warnings about images; `check_images` tells how far it is.

    Raises:
        DataError: They cannot be trained on.
    """
    if not isinstance(images, ImageSet):
        raise DataError(
            f"images are a {type(images).__name__}; give a fewstep.data.ImageSet of bytes, (N, C, H, W)"
        )
    findings = check_images(images, on_progress)
    errors = [finding.message for finding in findings if finding.severity == "error"]
    if errors:
        raise DataError("these images cannot be trained on: " + "; ".join(errors))
    return tuple(findings)


def fit_model(config: TrainingConfig, images: ImageSet, name: str) -> ModelConfig:
    """Return the model that settings and images ask for.

    Raises:
        InvalidInputError: The network cannot halve images of this size, or its options say something else of the
            images than they are.
    """
    _require_fitting(config, images)
    network = config.network_config(images.shape[0], images.num_classes)
    _, height, width = images.shape
    if height % network.size_multiple or width % network.size_multiple:
        multiple = network.size_multiple
        raise InvalidInputError(
            f"images of {height}x{width} pixels do not fit the network {config.network!r}, which needs "
            f"multiples of {multiple}; give a size such as {max(1, round(height / multiple)) * multiple}"
        )
    return ModelConfig(
        network=network,
        process=config.process,
        shape=images.shape,
        predicts=config.predicts,
        class_names=tuple(images.class_names),
        name=name,
    )


def _require_fitting(config: TrainingConfig, images: ImageSet) -> None:
    """Refuse options of the network that images and other settings decide otherwise."""
    channels = images.shape[0]
    decided = {
        "in_channels": channels,
        "out_channels": 2 * channels if config.learned_variance else channels,
        "num_classes": images.num_classes,
        "context_width": 0,
        "augment_width": AUGMENT_WIDTH if config.augment else 0,
    }
    for name, value in decided.items():
        given = config.network_options.get(name, value)
        if given != value and not (name == "out_channels" and given is None):
            raise InvalidInputError(
                f"{name} = {given!r} in network_options does not fit: these images and settings make it {value}; "
                "leave it out, for training sets it"
            )


def pixel_variance(images: ImageSet) -> Tensor:
    """Return the variance of each pixel over the images in [-1, 1], float64, shape (C, H, W).

    Of a very large set, `VARIANCE_IMAGES` images spread evenly over it stand for all.
    """
    total, squares = (torch.zeros(images.shape, dtype=torch.float64) for _ in range(2))
    some = torch.arange(0, len(images), -(-len(images) // VARIANCE_IMAGES))
    for rows in some.split(512):
        x = images.images[rows].to(torch.float64).cpu() / 127.5 - 1
        total += x.sum(0)
        squares += x.square().sum(0)
    mean = total / len(some)
    return (squares / len(some) - mean.square()).clamp(min=0)


def describe(images: ImageSet) -> dict[str, Any]:
    """Return what is recorded of the images; the digest tells whether others are the same."""
    return {
        "source": images.source,
        "images": len(images),
        "shape": list(images.shape),
        "classes": images.num_classes,
        "digest": images.digest,
    }


def changes(
    config: TrainingConfig, data: Mapping[str, Any], record: Mapping[str, Any]
) -> list[str]:
    """Return a line for everything that decides the weights and is not as it was: name, value before, value now.

    Args:
        config: The settings given now.
        data: The images given now, see `describe`.
        record: What the checkpoint says of its training.

    Raises:
        InvalidInputError: Its settings are none: they were edited by hand, or are those of another version.
    """
    found = config.differences(TrainingConfig.from_dict(record.get("settings", {})))
    before = record.get("data", {})
    if before.get("digest") != data["digest"]:
        found.append(f"images: {_named(before)} before, {_named(data)} now, which are not those")
    return found


def require_same(found: Sequence[str], folder: Path) -> None:
    """Refuse to go on with a run under other settings or on other images.

    Args:
        found: What differs, see `changes`.
        folder: The run, for the message.

    Raises:
        InvalidInputError: Something differs; the message lists it.
    """
    if found:
        raise InvalidInputError(
            f"{folder} holds a run with other settings ({'; '.join(found)}); give the same settings to go on with it, "
            "--force to go on under the new ones, or another folder to start anew"
        )


def require_shape(old: NetworkConfig, new: NetworkConfig, folder: Path) -> None:
    """Refuse to put the weights of one network into a network of another shape.

    Raises:
        InvalidInputError: The shapes differ; the message says in which fields of the network.
    """

    def weights(config: NetworkConfig) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {name: w.shape for name, w in build(config).state_dict().items()}

    if weights(old) != weights(new):
        before, now = config_to_dict(old), config_to_dict(new)
        fields = [
            f"{name}: {before.get(name)!r} before, {value!r} now"
            for name, value in now.items()
            if before.get(name) != value
        ]
        raise InvalidInputError(
            f"the network of the run in {folder} has another shape ({'; '.join(fields)}), so not even --force can "
            f"go on with it; start anew in another folder, with --start-from {folder} for the weights that fit"
        )


def require_shares(batch_size: int, workers: int) -> None:
    """Refuse more workers than there are images in a batch.

    Raises:
        InvalidInputError: Some worker would have nothing to do.
    """
    if workers > batch_size:
        raise InvalidInputError(
            f"a batch of {batch_size} images cannot be shared out among {workers} workers; launch at most "
            f"{batch_size}, or give a larger batch_size"
        )


def require_same_start(
    group: Group, config: TrainingConfig, data: Mapping[str, Any], state: TrainingState
) -> None:
    """Let all workers begin with the same settings, images and step, and with the very weights of the main one.

    Processors of another make may round differently when weights are drawn, so they are sent, not compared.

    Raises:
        InvalidInputError: Settings, images or step differ.
    """
    for what, value in (
        ("the settings", config.to_dict()),
        ("the images", data["digest"]),
        ("the checkpoint to go on from", state.step),
    ):
        digest = hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=7)
        group.require_same(what, int.from_bytes(digest.digest(), "big"))
    group.take_from_main(state.tensors())


def _named(data: Mapping[str, Any]) -> str:
    return f"{data.get('images', 'no')} of {data.get('source', 'unknown source')}"
