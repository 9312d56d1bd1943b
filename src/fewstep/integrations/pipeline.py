"""One of our models as a pipeline folder of diffusers, which gives the same outputs there."""

from __future__ import annotations

import os
from pathlib import Path

from fewstep.checkpoints import require_replaceable, save_json, save_tensors, write_folder
from fewstep.errors import InvalidInputError
from fewstep.integrations.diffusers_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    SCHEDULER_FILE,
    WEIGHT_FILES,
)
from fewstep.integrations.diffusers_unet import CLASS, VERSION, unet_to_diffusers
from fewstep.integrations.scheduler_config import PREDICTIONS, process_to_scheduler
from fewstep.integrations.unet_names import DIFFUSERS, to_theirs
from fewstep.models import Model
from fewstep.networks import UNet


def export_pipeline(model: Model, folder: str | os.PathLike[str]) -> list[str]:
    """Write a model as a `DDIMPipeline` of diffusers; one that exists is replaced as a whole.

    Args:
        model: A model whose network is a U-Net that `UNet2DModel` can express, on a table of betas.
        folder: Where to write.

    Returns:
        What else to know.

    Raises:
        InvalidInputError: A part of the model has no counterpart there; names it and its value.
        CheckpointError: No space or no permission.
    """
    network = model.network
    if not isinstance(network, UNet):
        raise InvalidInputError(
            f"{model.name} has a {type(network).__name__}, and only a U-Net can be exported as a {CLASS}"
        )
    scheduler = {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        **_scheduler(model),
    }
    config = unet_to_diffusers(network.config, model.shape[1:])
    noted = {
        "name": model.name,
        "class_names": list(model.class_names),
        "recommended": dict(model.config.recommended),
        "null_class": "last" if model.num_classes else None,
    }
    index = {
        "_class_name": "DDIMPipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", CLASS],
    }

    def write(target: Path) -> None:
        for name in ("unet", "scheduler"):
            (target / name).mkdir()
        save_json(target / INDEX_FILE, index)
        save_json(target / "scheduler" / SCHEDULER_FILE, scheduler)
        # diffusers keeps entries that begin with an underscore, and reads them not.
        save_json(target / "unet" / CONFIG_FILE, {**config, "_fewstep": noted})
        save_tensors(target / "unet" / WEIGHT_FILES[0], to_theirs(network, DIFFUSERS))

    require_replaceable(Path(folder), INDEX_FILE, "a pipeline of diffusers")
    write_folder(Path(folder), write)
    return _notes(model)


def _scheduler(model: Model) -> dict[str, object]:
    """The scheduler's configuration; trailing times begin at the noisiest, as ours do."""
    known = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if model.config.predicts not in known:
        raise InvalidInputError(
            f"predicts = {model.config.predicts!r} has no counterpart in diffusers' DDIMScheduler, which takes "
            f"{', '.join(known)}"
        )
    return {
        **process_to_scheduler(model.process),
        "prediction_type": known[model.config.predicts],
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
    }


def _notes(model: Model) -> list[str]:
    notes = []
    if model.config.network.augment_width:
        notes.append(
            "the map of augmentations, which training alone uses, is left out; outputs are equal"
        )
    if model.num_classes:
        notes.append(
            f"class {model.num_classes} is the null class; a DDIMPipeline gives its network no labels, so call "
            "pipe.unet(x, t, class_labels=...) in a loop of your own"
        )
    return notes
