"""The training loop, as a generator of facts that are complete when they are told."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep import process as processes
from fewstep.checkpoints import remove_leftovers, save_json, write_folder
from fewstep.data import Finding, ImageSet, check_images, load_images
from fewstep.errors import CheckpointError, DataError, InvalidInputError, NonFiniteError
from fewstep.models import CHECKPOINTS, STEP_PREFIX, ModelConfig, checkpoints_of
from fewstep.training.batches import Batch, Batches
from fewstep.training.config import TrainingConfig
from fewstep.training.gradients import Gradients
from fewstep.training.log import Log
from fewstep.training.objective import pixelwise_loss, prediction_loss
from fewstep.training.precision import autocast
from fewstep.training.randomness import global_seed, seed_of
from fewstep.training.rates import learning_rate
from fewstep.training.state import TrainingState

SETTINGS_FILE = "training.json"
LOG_FILE = "log.jsonl"
SAMPLES = "samples"
KEPT_CHECKPOINTS = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What is true after an update of the weights and of their average.

    Args:
        step: Updates done so far.
        loss: Mean loss over the steps since the last `Step`.
        learning_rate: Learning rate of this update.
        gradient_norm: Mean norm of the gradients, before clipping, since the last `Step`.
        images_per_second: Images trained on per second since the last `Step`.
        checkpoint: The checkpoint that was written after this update, if any.
        preview: The sheet of samples that was written after this update, if any.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    images_per_second: float
    checkpoint: Path | None = None
    preview: Path | None = None


def run(
    config: TrainingConfig,
    folder: str | os.PathLike[str],
    *,
    images: ImageSet | None = None,
    device: str | torch.device | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Train a model in a folder, or go on with the training that the folder holds.

    Args:
        config: The settings.
        folder: Gets ``checkpoints/``, ``samples/``, ``log.jsonl`` and ``training.json``.
        images: The data; None: what ``config.data`` names.
        device: Where to train; None: CUDA if there is any, else the CPU.
        stop: Asked after every step; once it says True, a checkpoint is saved and the run ends.

    Yields:
        A `Step` every ``log_every`` steps, at every checkpoint and preview, and at the end.

    Raises:
        InvalidInputError: The folder holds a run with other settings or other data.
        DataError: The images cannot be trained on.
        NonFiniteError: The loss became NaN or infinite; the last checkpoint is from before.
        CheckpointError: Something cannot be read or written.
    """
    yield from Trainer(config, folder, images=images, device=device).steps(stop)


class Trainer:
    """A training run in a folder; see `run` for the arguments.

    Args:
        config: The settings.
        folder: Where the run lives; it is first written to when training starts.
        images: The data; None: what ``config.data`` names.
        device: Where to train; None: CUDA if there is any, else the CPU.
        resume: Whether to take over the newest readable checkpoint of the folder.

    Attributes:
        state: Weights, optimiser and step; taken from the newest readable checkpoint if there is one.
        model: What is trained, as it will be saved.
        findings: Warnings about the data.
        pixelwise_loss: A loss above this means that pictures are still noise, see `pixelwise_loss`.
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: str | os.PathLike[str],
        *,
        images: ImageSet | None = None,
        device: str | torch.device | None = None,
        resume: bool = True,
    ) -> None:
        self.config = config
        self.folder = Path(folder)
        self.images = images if images is not None else _load(config)
        self.findings = _checked(self.images)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.process = processes.from_dict(config.process)
        self.model = _model_config(config, self.images, self.folder.resolve().name)
        self.pixelwise_loss = pixelwise_loss(
            self.process, _pixel_variance(self.images), config.predicts
        )
        self.state = _initial_state(config, self.model, self.device)
        self._has_dropout = _has_dropout(self.state.network)
        on_cpu = self.device.type == "cpu"
        self._gradients = Gradients(
            self.state.network,
            self._loss,
            config.parts if on_cpu else 1,
            threaded=on_cpu and not self._has_dropout,  # dropout draws from one generator, in order
        )
        self._batches = Batches(self.images, self.process, config, self.device)
        self._log = Log(self.folder / LOG_FILE)
        self._data = _describe(self.images)
        self._seconds = 0.0
        if resume:
            self._resume()

    @property
    def precision(self) -> str:
        """The type of number that the network computes in."""
        enabled = autocast(self.config.precision, self.device)._enabled
        return "bfloat16" if enabled else "float32"

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done."""
        return self.state.step >= self.config.steps

    def steps(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Step]:
        """Train until the last step, or until ``stop`` says True, and save; see `run`."""
        self._prepare_folder()
        config, state = self.config, self.state
        window = _Window(self.device)
        stopped = False
        while not (stopped or self.is_complete):
            loss = self.train_on(self._batches[state.step])
            window.add(loss, state.update())
            stopped = stop()
            last = stopped or self.is_complete
            saves = last or state.step % config.checkpoint_every == 0
            shows = config.sample_every > 0 and (
                self.is_complete or state.step % config.sample_every == 0
            )
            if saves or shows or state.step % config.log_every == 0:
                fact = self._fact(window)
                if saves:
                    fact = dataclasses.replace(fact, checkpoint=self.save())
                if shows:
                    fact = dataclasses.replace(fact, preview=self.save_preview())
                yield fact
                window = _Window(self.device)

    def train_on(self, batch: Batch) -> Tensor:
        """Compute the loss of the next step on a batch, and its gradients; `state.update` applies them."""
        if not self._has_dropout:
            return self._gradients(batch)
        with global_seed(seed_of(self.config.seed, "dropout", self.state.step)):
            return self._gradients(batch)

    def overfit(self, steps: int) -> Iterator[Step]:
        """Train on the first batch alone, noise and times included, and save nothing.

        A sound pipeline drives this loss far below its start; one that does not is broken, and hours of
        training would not mend it.
        """
        batch = self._batches[0]
        for _ in range(steps):
            window = _Window(self.device)
            loss = self.train_on(batch)
            window.add(loss, self.state.update())
            yield window.fact(self.state.step, self.config)

    def save(self) -> Path:
        """Write a checkpoint of the present state, then remove all but the newest two.

        Raises:
            CheckpointError: It cannot be written; earlier checkpoints are unharmed.
        """
        path = self.folder / CHECKPOINTS / f"{STEP_PREFIX}{self.state.step:08d}"
        record = {
            "step": self.state.step,
            "images_seen": self.state.step * self.config.batch_size,
            "seconds": round(self._seconds, 1),
            "random": {
                "seed": self.config.seed,
                "next_step": self.state.step,
                "rule": "every draw is a function of (seed, purpose, step): see fewstep.training.randomness",
            },
            "data": self._data,
            "settings": self.config.to_dict(),
        }
        model = dataclasses.replace(self.model, training=record)
        write_folder(path, lambda target: self.state.save(target, model))
        for old in checkpoints_of(self.folder)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def save_preview(self) -> Path:
        """Write a sheet of samples of the present weights."""
        from fewstep.training.previews import save_preview

        path = self.folder / SAMPLES / f"{STEP_PREFIX}{self.state.step:08d}.png"
        save_preview(path, self.state.network, self.state.average, self.model, self.state.step)
        return path

    def _fact(self, window: _Window) -> Step:
        fact = window.fact(self.state.step, self.config)
        self._seconds += window.seconds
        self._log.append(
            {
                "step": fact.step,
                "loss": fact.loss,
                "learning_rate": fact.learning_rate,
                "gradient_norm": fact.gradient_norm,
                "images_per_second": round(fact.images_per_second, 1),
                "time": round(time.time(), 3),
            }
        )
        return fact

    def _loss(self, batch: Batch) -> Tensor:
        conditions = {} if batch.labels is None else {"labels": batch.labels}
        with autocast(self.config.precision, self.device):
            return prediction_loss(
                self.state.network,
                self.process,
                batch.x0,
                batch.noise,
                batch.t,
                self.config.predicts,
                **conditions,
            )

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot make the folder {self.folder} ({error.strerror or error}); choose another place"
            ) from error
        remove_leftovers(self.folder / CHECKPOINTS)
        save_json(self.folder / SETTINGS_FILE, {"settings": self.config.to_dict(), "data": self._data})
        self._log.cut_after(self.state.step)

    def _resume(self) -> None:
        failure: CheckpointError | None = None
        for path in reversed(checkpoints_of(self.folder)):
            try:
                record = self.state.load(path)
            except CheckpointError as error:
                failure = failure or error
                logger.warning("%s; trying the checkpoint before it", error)
                continue
            _require_same(self.config, self._data, record, self.folder)
            self._seconds = float(record.get("seconds", 0.0))
            return
        if failure is not None:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read, the newest because: {failure}"
            ) from failure


class _Window:
    """Losses and gradient norms since the last `Step`, left on the device until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.device = device
        self.seconds = 0.0
        self._start = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.losses.append(loss)
        self.norms.append(norm)

    def fact(self, step: int, config: TrainingConfig) -> Step:
        losses, norms = torch.stack([torch.stack(self.losses), torch.stack(self.norms)]).tolist()
        self.seconds = time.perf_counter() - self._start
        for k, pair in enumerate(zip(losses, norms, strict=True)):
            if not all(map(math.isfinite, pair)):
                raise NonFiniteError(
                    f"the loss of step {step - len(losses) + k + 1} is {pair[0]}, the norm of its gradient "
                    f"{pair[1]}; the last checkpoint is from before. Try a lower learning rate (now "
                    f"{config.learning_rate:g}), more warm-up steps (now {config.warmup_steps}), or precision "
                    "float32, in a new folder"
                )
        return Step(
            step=step,
            loss=sum(losses) / len(losses),
            learning_rate=learning_rate(config, step - 1),
            gradient_norm=sum(norms) / len(norms),
            images_per_second=len(losses) * config.batch_size / self.seconds,
        )


def _load(config: TrainingConfig) -> ImageSet:
    return load_images(config.data, size=config.size, channels=config.channels)


def _checked(images: ImageSet) -> tuple[Finding, ...]:
    findings = check_images(images)
    errors = [finding.message for finding in findings if finding.severity == "error"]
    if errors:
        raise DataError("these images cannot be trained on: " + "; ".join(errors))
    return tuple(findings)


def _model_config(config: TrainingConfig, images: ImageSet, name: str) -> ModelConfig:
    network = config.network_config(images.shape[0], images.num_classes)
    _, height, width = images.shape
    if height % network.size_multiple or width % network.size_multiple:
        raise InvalidInputError(
            f"images of {height}x{width} pixels do not fit the network {config.network!r}, which needs multiples "
            f"of {network.size_multiple}; give a size such as {_nearest_multiple(height, network.size_multiple)}"
        )
    return ModelConfig(
        network=network,
        process=config.process,
        shape=images.shape,
        predicts=config.predicts,
        class_names=tuple(images.class_names),
        name=name,
    )


def _nearest_multiple(edge: int, multiple: int) -> int:
    return max(1, round(edge / multiple)) * multiple


def _initial_state(config: TrainingConfig, model: ModelConfig, device: torch.device) -> TrainingState:
    with global_seed(seed_of(config.seed, "weights", 0)):
        network = model.build_network()
    return TrainingState(network.to(device), config)


def _has_dropout(network: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())


def _pixel_variance(images: ImageSet) -> Tensor:
    """Variance of each pixel over the data, in units of [-1, 1]."""
    total, squares = (torch.zeros(images.shape, dtype=torch.float64) for _ in range(2))
    for chunk in images.images.split(4096):
        x = chunk.to(torch.float64) / 127.5 - 1
        total += x.sum(0)
        squares += x.square().sum(0)
    mean = total / len(images)
    return (squares / len(images) - mean.square()).clamp(min=0)


def _describe(images: ImageSet) -> dict[str, Any]:
    digest = hashlib.blake2b(images.images.cpu().numpy().tobytes(), digest_size=16)
    if images.labels is not None:
        digest.update(images.labels.cpu().numpy().tobytes())
    return {
        "source": images.source,
        "images": len(images),
        "shape": list(images.shape),
        "classes": images.num_classes,
        "digest": digest.hexdigest(),
    }


def _require_same(
    config: TrainingConfig, data: Mapping[str, Any], record: Mapping[str, Any], folder: Path
) -> None:
    before = TrainingConfig.from_dict(record.get("settings", {}))
    differing = config.differences(before)
    if differing:
        raise InvalidInputError(
            f"{folder} holds a run with other settings ({'; '.join(differing)}); give the same settings to go on "
            "with it, or another folder to start anew"
        )
    if record.get("data", {}).get("digest") != data["digest"]:
        raise InvalidInputError(
            f"the images of {data['source']} are not those that the run in {folder} was trained on; bring back the "
            "same images to go on with it, or give another folder to start anew"
        )
