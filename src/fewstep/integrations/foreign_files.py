"""Reading the files of other codes, none of which may run code of theirs."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.checkpoints import load_tensors
from fewstep.errors import CheckpointError

TORCH_FILES = (".bin", ".ckpt", ".pt", ".pth")
CONVERT = (
    "if you trust it, convert its dictionary of tensors once: "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=False), 'model.safetensors')"
)


def read_weights(path: Path) -> Any:
    """Return what a file holds: tensors by name, or lists and dictionaries of them.

    Files of torch are read by its restricted reader, which makes tensors and plain containers and nothing else.

    Raises:
        CheckpointError: The file is missing, damaged, or needs code to be read.
    """
    if path.suffix == ".safetensors":
        return load_tensors(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a file with weights")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise CheckpointError(
            f"{path.name}: torch {torch.__version__} does not read such files safely; install torch 2.6 or newer, "
            "or convert it to safetensors"
        )
    if path.suffix not in TORCH_FILES and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is no file of weights; known are .safetensors, {', '.join(TORCH_FILES)}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols that are not its own
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever their bytes lead to
        if type(error).__name__ == "UnpicklingError":
            raise CheckpointError(
                f"{path} holds more than tensors and plain containers, so reading it would run code (pickle), "
                f"or it is damaged; {CONVERT}"
            ) from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"cannot read {path} ({reason:.100}): it is cut short, damaged or no file of torch; copy it again "
            "from its source"
        ) from error


def tensors_in(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a dictionary by name, without the prefix of a data-parallel wrapper."""
    if not isinstance(content, dict):
        return {}
    return {
        str(name).removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
