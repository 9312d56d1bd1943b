"""Pictures on the way: what the model can do after so many steps, by its raw and its averaged weights."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from fewstep.data import labelled_sheet, save_image
from fewstep.models import Model, ModelConfig
from fewstep.sampling import sample

COLUMNS, CALLS = 10, 50


def save_preview(
    path: Path, raw: nn.Module, average: nn.Module, model: ModelConfig, step: int
) -> None:
    """Write a sheet of two rows, raw and averaged weights; the same seeds and labels in every sheet of a run.

    Args:
        path: PNG file to write.
        raw: The network in training; it is copied, not changed.
        average: The network with the averaged weights.
        model: Process, shape and classes.
        step: For the record in the picture.

    Raises:
        DataError: The file cannot be written.
    """
    classes = model.class_names
    labels = [k % len(classes) for k in range(COLUMNS)] if classes else None
    rows = []
    for title, network in (("raw weights", raw), ("averaged weights", average)):
        samples = sample(
            Model(copy.deepcopy(network), model),
            sampler="ddim",
            steps=CALLS,
            seed=range(COLUMNS),
            labels=labels,
        )
        rows.append((title, samples.images))
    titles = [classes[label] for label in labels] if labels else None
    save_image(
        path, labelled_sheet(rows, titles), {"step": step, "sampler": "ddim", "steps": CALLS}
    )
