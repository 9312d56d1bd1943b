"""A trained model as an object: its network, its process, and what it was trained on; and where models live.

A model folder holds ``config.json``, readable, and ``model.safetensors``, the weights. A checkpoint of
`fewstep train` is such a folder with more files in it, so every checkpoint can be sampled from as it stands.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewstep.process as processes
from fewstep.checkpoints import (
    load_json,
    load_tensors,
    require_replaceable,
    save_json,
    save_tensors,
    write_folder,
)
from fewstep.denoisers import Denoiser
from fewstep.errors import CheckpointError, InvalidInputError, unknown_name
from fewstep.networks import Network, NetworkConfig, build, config_from_dict, config_to_dict

FORMAT, VERSION = "fewstep-model", 1
CONFIG_FILE = "config.json"
WEIGHT_FILES = {"ema": "model.safetensors", "raw": "raw.safetensors"}
AVERAGE_PREFIXES = ("ema-", "power-")
CHECKPOINTS = "checkpoints"
STEP_PREFIX = "step-"


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model but its weights.

    Args:
        network: The shape of its network.
        process: The forward process as plain data.
        shape: Channels, height and width of its images.
        predicts: What the network outputs, see `fewstep.Denoiser`.
        class_names: What each label means; empty if the model takes no labels.
        name: What to call it.
        recommended: Options of `fewstep.sample` that suit it.
        training: How it was trained, for the record.
    """

    network: NetworkConfig
    process: Mapping[str, Any]
    shape: tuple[int, int, int]
    predicts: str = "noise"
    class_names: tuple[str, ...] = ()
    name: str = ""
    recommended: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def build_network(self) -> Network[Any]:
        """Return the network with new weights, in channels-last memory order."""
        network = build(self.network)
        return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain data, ready for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "shape": list(self.shape),
            "class_names": list(self.class_names),
            "predicts": self.predicts,
            "process": dict(self.process),
            "recommended": dict(self.recommended),
            "network": config_to_dict(self.network),
            "training": dict(self.training),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ModelConfig:
        """Build the configuration that `to_dict` wrote.

        Raises:
            InvalidInputError: It is of another format or version, or an entry is missing or wrong.
        """
        if content.get("format") != FORMAT:
            raise InvalidInputError(
                f"format is {content.get('format')!r}, not {FORMAT!r}; give a model that Fewstep saved"
            )
        if content.get("version") != VERSION:
            raise InvalidInputError(
                f"version {content.get('version')!r} of the model format is not known here, only {VERSION}; "
                "install a newer Fewstep"
            )
        try:
            channels, height, width = (int(edge) for edge in content["shape"])
            return cls(
                network=config_from_dict(content["network"]),
                process=processes.from_dict(content["process"]).to_dict(),
                shape=(channels, height, width),
                predicts=content["predicts"],
                class_names=tuple(content.get("class_names", ())),
                name=content.get("name", ""),
                recommended=dict(content.get("recommended", {})),
                training=dict(content.get("training", {})),
            )
        except KeyError as error:
            raise InvalidInputError(
                f"the entry {error} is missing; copy the file again"
            ) from error
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"an entry is wrong: {error}; copy the file again") from error


class Model(Denoiser):
    """A trained network with its process: a `Denoiser` that knows the images it was made for.

    Args:
        network: The network; it is put into evaluation mode.
        config: Everything else.
        folder: Where it was loaded from, if it was.
    """

    def __init__(
        self, network: nn.Module, config: ModelConfig, folder: Path | None = None
    ) -> None:
        network.eval().requires_grad_(False)
        super().__init__(network, processes.from_dict(config.process), config.predicts)
        self.config = config
        self.folder = folder

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.config.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""
        return self.config.shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """What each label means; empty if the model takes no labels."""
        return self.config.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes; 0: the model takes no labels."""
        return self.config.network.num_classes

    def save(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write a model folder; a model that is there already is replaced as a whole.

        Args:
            folder: Where to write.
            dtype: Type of the stored weights, ``torch.float32`` or ``torch.float16``.

        Raises:
            InvalidInputError: Another type, or a folder that holds something else than a model.
            CheckpointError: No space or no permission.
        """
        if dtype not in (torch.float32, torch.float16):
            raise InvalidInputError(
                f"weights cannot be stored as {dtype}; use torch.float32 or torch.float16"
            )
        require_replaceable(Path(folder), CONFIG_FILE, "a model")
        assert isinstance(self.network, nn.Module)
        weights = {name: w.to(dtype) for name, w in self.network.state_dict().items()}

        def write(target: Path) -> None:
            save_json(target / CONFIG_FILE, self.config.to_dict())
            save_tensors(target / WEIGHT_FILES["ema"], weights)

        write_folder(Path(folder), write)

    def __repr__(self) -> str:
        return f"Model({self.name!r}, shape={self.shape}, process={self.process!r}, classes={self.num_classes})"


def bundled_models() -> dict[str, Path]:
    """Return the folders of the models that come with the package, by name."""
    root = Path(str(files("fewstep"))) / "bundled"
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return {folder.name: folder for folder in folders if _holds_model(folder)}


def checkpoints_of(run: Path) -> list[Path]:
    """Return the complete checkpoints of a training run, oldest first."""
    return sorted((run / CHECKPOINTS).glob(f"{STEP_PREFIX}[0-9]*"))


def weights_file(weights: str) -> str:
    """Return the file of a folder that holds weights of that name."""
    return WEIGHT_FILES.get(weights, f"{weights}.safetensors")


def averages_in(folder: Path) -> list[str]:
    """Return the names of the further averages in a checkpoint."""
    return sorted(
        file.stem for start in AVERAGE_PREFIXES for file in folder.glob(f"{start}*.safetensors")
    )


def load(
    source: str | os.PathLike[str], device: str | torch.device = "cpu", weights: str = "ema"
) -> Model:
    """Load a trained model; weights are read as float32, no code is ever loaded.

    Args:
        source: Name of a bundled model, a model folder, or the folder of a `fewstep train` run, which gives
            its newest checkpoint. A name wins over a folder of the same name; write ``./name`` for the folder.
        device: Where the network goes.
        weights: ``"ema"``, averaged over training, or ``"raw"``, as the optimiser left them (checkpoints only), or
            one of a run's further averages, such as ``"ema-0.9999"``.

    Raises:
        UnknownNameError: There is neither such a model nor such a folder, or it has no such weights.
        CheckpointError: The folder holds no readable model.
    """
    folder = _folder_of(source)
    config = read_config(folder)
    known = {**WEIGHT_FILES, **dict.fromkeys(averages_in(folder))}
    if weights not in known:
        raise unknown_name("weights", weights, known)
    path = folder / weights_file(weights)
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {weights} weights ({path.name}); "
            + ("use weights='ema'" if weights == "raw" else "copy it again from its source")
        )
    with torch.device("meta"):  # no initial weights, so no random numbers either
        network = config.build_network()
    network = network.to_empty(device="cpu")
    fill(network, load_tensors(path), path)
    return Model(network.to(torch.device(device)), config, folder)


def read_config(folder: Path) -> ModelConfig:
    """Read the configuration of a model folder.

    Raises:
        CheckpointError: It is missing or wrong.
    """
    path = folder / CONFIG_FILE
    try:
        return ModelConfig.from_dict(load_json(path))
    except InvalidInputError as error:
        raise CheckpointError(f"{path} is not usable: {error}") from error


def fill(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights into a network, keeping its memory order and type.

    Args:
        network: The network.
        weights: Tensors by parameter name.
        path: Where they come from, for messages.

    Raises:
        CheckpointError: A weight is missing, unknown, or of another shape.
    """
    own = network.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - weights.keys()]
    problems += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit its {CONFIG_FILE}: {sorted(problems)[0]} ({len(problems)} such faults); "
            "the two files come from different models: copy the folder again from its source"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def _holds_model(folder: Path) -> bool:
    try:
        return load_json(folder / CONFIG_FILE).get("format") == FORMAT
    except CheckpointError:
        return False


def _folder_of(source: str | os.PathLike[str]) -> Path:
    bundled = bundled_models()
    if isinstance(source, str) and source in bundled:
        return bundled[source]
    folder = Path(source).expanduser()
    if not folder.exists():
        raise unknown_name(
            "model",
            source,
            bundled,
            "Or give a model folder, or the folder of a `fewstep train` run",
        )
    if (folder / CONFIG_FILE).exists():
        return folder
    if checkpoints := checkpoints_of(folder):
        return checkpoints[-1]
    if (folder / CHECKPOINTS).is_dir():
        raise CheckpointError(
            f"{folder} has no complete checkpoint yet; let `fewstep train` run on, or stop it with Ctrl-C, "
            "which saves one"
        )
    raise CheckpointError(
        f"{folder} is not a model: it holds neither {CONFIG_FILE} nor {CHECKPOINTS}/; give a model folder, the "
        f"folder of a `fewstep train` run, or one of the bundled models: {', '.join(bundled) or 'none'}"
    )
