"""The training loop, as a generator of facts that are complete when they are told."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fewstep import process as processes
from fewstep.checkpoints import only_writer, remove_leftovers, save_json, write_folder
from fewstep.data import ImageSet, OnProgress, load_images
from fewstep.errors import CheckpointError, FewstepError, InvalidInputError
from fewstep.models import (
    CHECKPOINTS,
    CONFIG_FILE,
    STEP_PREFIX,
    Model,
    ModelConfig,
    checkpoints_of,
    read_config,
)
from fewstep.team import Team, join
from fewstep.training.ahead import Ahead
from fewstep.training.batches import Batch, Batches
from fewstep.training.config import TrainingConfig
from fewstep.training.facts import Step, Window
from fewstep.training.gradients import Gradients, usual_parts
from fewstep.training.guard import Guard
from fewstep.training.held_out import HeldOut, held_out_error, split_rows
from fewstep.training.listeners import Board, Listeners
from fewstep.training.log import Log
from fewstep.training.measuring import Measurement, Ruler
from fewstep.training.memory import is_out_of_memory, memory_error
from fewstep.training.objective import pixelwise_loss
from fewstep.training.precision import autocast, compute_type
from fewstep.training.preparation import (
    changes,
    check_for_training,
    describe,
    fit_model,
    pixel_variance,
    require_same,
    require_same_start,
    require_shape,
    require_shares,
    usable_device,
)
from fewstep.training.previews import save_preview
from fewstep.training.randomness import global_seed, seed_of
from fewstep.training.starting import take_weights
from fewstep.training.state import TrainingState

SETTINGS_FILE = "training.json"
LOG_FILE = "log.jsonl"
SAMPLES = "samples"
KEPT_CHECKPOINTS = 2

logger = logging.getLogger(__name__)

T = TypeVar("T")


def run(
    config: TrainingConfig,
    folder: str | os.PathLike[str],
    *,
    images: ImageSet | None = None,
    device: str | torch.device | None = None,
    stop: Callable[[], bool] = lambda: False,
    force: bool = False,
) -> Iterator[Step]:
    """Train a model in a folder, or go on with the training that the folder holds.

    Args:
        config: The settings.
        folder: Gets ``checkpoints/``, ``samples/``, ``log.jsonl`` and ``training.json``.
        images: The data; None: what ``config.data`` names.
        device: Where to train; None: CUDA if there is any, else the CPU.
        stop: Asked after every step; once it says True, a checkpoint is saved and the run ends.
        force: Go on with a run under other settings or on other data.

    Yields:
        A `Step` every ``log_every`` steps, at every checkpoint, preview and measurement, and at the end.

    Raises:
        InvalidInputError: The folder holds a run with other settings or other data.
        DataError: The images cannot be trained on.
        NonFiniteError: The loss or its gradient was NaN or infinite again and again; see `fewstep.training.guard`.
        MemoryLimitError: A batch does not fit into memory; the message says which would.
        CheckpointError: Something cannot be read or written.

    >>> import tempfile
    >>> config = TrainingConfig(data="mnist-1000", steps=2, batch_size=4, sample_every=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [step.step for step in run(config, folder)]
    [2]
    """
    yield from Trainer(config, folder, images=images, device=device, force=force).steps(stop)


class Trainer:
    """A training run in a folder; see `run` for the arguments.

    Args:
        config: The settings.
        folder: Where the run lives; it is first written to when training starts.
        images: The data; None: what ``config.data`` names.
        device: Where to train; None: CUDA if there is any, else the CPU.
        resume: Whether to take over the newest readable checkpoint of the folder.
        force: Whether to take it over even if settings or data are others.
        on_progress: Told how far loading and checking the images is, see `fewstep.data.load_images`.

    Under `torchrun` or `accelerate launch` each worker takes its share of every batch, and the main one alone writes.

    Attributes:
        group: The workers of the run; usually this one alone.
        state: Weights, optimiser and step; taken from the newest readable checkpoint if there is one.
        model: What is trained, as it will be saved.
        findings: Warnings about the data, and about the weights that training starts from.
        changes: What differs from the settings and data that the run was trained with so far.
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
        force: bool = False,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.config = config
        self.folder = Path(folder)
        self.device = usable_device(Team.launched().device(device))
        self.group = join(self.device)
        require_shares(config.batch_size, self.group.size)
        if images is None:
            images = self.group.first_on_machine(
                lambda: load_images(config.data, on_progress=on_progress, **config.loading())
            )
        self.images = images
        self.findings = check_for_training(self.images, on_progress)
        self.process = processes.from_dict(config.process)
        self.objective = config.objective()
        self.pixelwise_loss = pixelwise_loss(
            self.process, pixel_variance(self.images), objective=self.objective
        )
        self._data = describe(self.images)
        boards = [Board(self.folder)] if config.tensorboard else []
        self._listeners = Listeners([Log(self.folder / LOG_FILE), *boards])
        self._ruler: Ruler | None = None
        self._seconds = 0.0
        self.changes: list[str] = []
        self.model = fit_model(config, self.images, self.folder.resolve().name)
        self.state = (self._restored(force) if resume else None) or self._first_state()
        require_same_start(self.group, config, self._data, self.state)
        if config.compile:
            self.state.network.compile()
        self._has_dropout = _has_dropout(self.state.network)
        self.rows, self.held_out_rows = split_rows(len(self.images), config.held_out, config.seed)
        share = self.group.rank, self.group.size
        self._batches = Batches(self.images, self.objective, config, self.device, share, self.rows)
        self._ahead = Ahead(self._batches, config.steps)
        self._gradients = Gradients(
            self.state.network,
            self._loss,
            self._parts(),
            threaded=not self._has_dropout,  # dropout draws from one generator, in order
            accumulate=config.accumulate,
            group=self.group,
        )

    def _parts(self) -> int:
        """Parts of a batch that are computed side by side; an accelerator, and a compiled network, take it whole."""
        config = self.config
        if self.device.type != "cpu" or config.compile:
            return 1
        images = config.batch_size // (config.accumulate * self.group.size)
        return config.parts or usual_parts(self.state.network, images)

    @property
    def precision(self) -> str:
        """The type of number that the network computes in, ``"float32"`` or ``"bfloat16"``."""
        return str(compute_type(self.config.precision, self.device)).removeprefix("torch.")

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done."""
        return self.state.step >= self.config.steps

    def steps(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Step]:
        """Train until the last step, or until ``stop`` says True, and save; see `run`."""
        guard = self.state.guard
        with ExitStack() as held, self._gradients, self._ahead:
            self.group.main_does(lambda: self._take_folder(held), None)
            window = Window()
            stopped = guard.is_exhausted
            while not (stopped or self.is_complete):
                rate = self.state.learning_rate
                self._advance(self._ahead[self.state.step], window)
                stopped = self.group.any(stop()) or guard.is_exhausted
                if self._has_news(stopped):
                    yield self._fact(window, rate, stopped)
                    window = Window()
        if guard.is_exhausted:
            raise guard.failure(self.state.step, self.config)

    def overfit(self, steps: int) -> Iterator[Step]:
        """Train on the first batch alone, noise and times included, and save nothing.

        A sound pipeline drives this loss far below its start; one that does not is broken, and hours of
        training would not mend it.
        """
        batch = self._batches[0]
        with self._gradients:
            for _ in range(steps):
                window, rate = Window(), self.state.learning_rate
                self._advance(batch, window)
                yield window.fact(self.state.step, self.config, rate)

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
            "guard": self.state.guard.record(),
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
        path = self.folder / SAMPLES / f"{STEP_PREFIX}{self.state.step:08d}.png"
        save_preview(path, self.state.network, self.state.average, self.model, self.state.step)
        return path

    def _advance(self, batch: Batch, window: Window) -> None:
        """One step: gradient, update of the weights, update of their average."""
        loss = self._gradient(batch)
        if loss is None:  # here the error is gone, and with it the memory that its frames held
            raise memory_error(self.config, self.state.network, self._loss, batch, self.device)
        window.add(loss, self.state.update(loss))

    def _gradient(self, batch: Batch) -> Tensor | None:
        """Set the gradients and return the loss; None: there is too little memory."""
        try:
            if not self._has_dropout:
                return self._gradients(batch, self.config.batch_size)
            # Each worker needs masks of its own; they are not those of the same images in a team of another size.
            purpose = f"dropout/{self.group.rank}" if self.group.rank else "dropout"
            with global_seed(seed_of(self.config.seed, purpose, self.state.step)):
                return self._gradients(batch, self.config.batch_size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.is_complete or self.state.step % every == 0)

    def _has_news(self, stopped: bool) -> bool:
        config = self.config
        periods = (
            config.log_every,
            config.checkpoint_every,
            config.sample_every,
            config.measure_every,
        )
        return stopped or any(self._is_due(every) for every in periods)

    def _fact(self, window: Window, rate: float, stopped: bool) -> Step:
        """Log the window before anything is saved: what a checkpoint has behind it, the log has as well."""
        fact = window.fact(self.state.step, self.config, rate)
        self._seconds += window.seconds
        return self.group.main_does(lambda: self._written(fact, stopped), fact)

    def _written(self, fact: Step, stopped: bool) -> Step:
        """Log a fact and write what is due after it."""
        if self.config.held_out and self._is_due(self.config.sample_every):
            fact = dataclasses.replace(
                fact, held_out=self._look("error on held-out images", self._held_out)
            )
        if self._is_due(self.config.measure_every):
            fact = dataclasses.replace(fact, measurement=self._look("distance", self._measured))
        self._listeners.figures(fact.step, fact.figures())
        if stopped or self._is_due(self.config.checkpoint_every):
            fact = dataclasses.replace(fact, checkpoint=self.save())
        if self._is_due(self.config.sample_every):
            fact = dataclasses.replace(fact, preview=self._look("samples", self.save_preview))
            if fact.preview is not None:
                self._listeners.sheet(fact.step, fact.preview)
        return fact

    def _look(self, what: str, look: Callable[[], T]) -> T | None:
        """Return what a look at the run finds; None if it fails, for only the training itself may end a run."""
        try:
            return look()
        except (FewstepError, MemoryError, RuntimeError) as error:
            if not isinstance(error, FewstepError) and not is_out_of_memory(error):
                raise
            logger.warning("step %d: no %s: %s", self.state.step, what, error)
            return None

    def _held_out(self) -> HeldOut:
        """Measure the averaged weights on images seen and not seen; the same images, noise and levels every time."""
        model = Model(self.state.average, self.model)
        return held_out_error(model, self.images, self.rows, self.held_out_rows, self.config.seed)

    def _measured(self) -> Measurement:
        """Measure samples of the averaged weights; the ruler is made when it is first needed."""
        if self._ruler is None:
            images, name = self.images, "training images"
            if len(self.held_out_rows) > 1:
                images, name = self.images.subset(self.held_out_rows), "held-out images"
            self._ruler = Ruler(images, self.config.measure_images, name)
        return self._ruler.measure(self.state.average, self.model)

    def _loss(self, batch: Batch) -> Tensor:
        given = {"labels": batch.labels, "augment": batch.augment}
        conditions = {name: value for name, value in given.items() if value is not None}
        with autocast(self.config.precision, self.device):
            return self.objective(self.state.network, batch.x0, batch.noise, batch.t, **conditions)

    def _take_folder(self, held: ExitStack) -> None:
        """Hold the folder for this run alone, and make it ready for the first step."""
        held.enter_context(only_writer(self.folder))
        remove_leftovers(self.folder / CHECKPOINTS)
        save_json(
            self.folder / SETTINGS_FILE, {"settings": self.config.to_dict(), "data": self._data}
        )
        held.enter_context(closing(self._listeners))
        self._listeners.start(self.state.step)

    def _new_state(self, model: ModelConfig) -> TrainingState:
        with global_seed(seed_of(self.config.seed, "weights", 0)):
            network = model.build_network()
        network.checkpointing = self.config.checkpoint_activations
        return TrainingState(network.to(self.device), self.config)

    def _first_state(self) -> TrainingState:
        """Return the state before the first step."""
        state = self._new_state(self.model)
        if self.config.start_from is not None:
            findings = take_weights(state.network, self.model, self.config.start_from)
            self.findings += tuple(findings)
            state.average.load_state_dict(state.network.state_dict())
        return state

    def _restored(self, force: bool) -> TrainingState | None:
        """Return the state of the newest readable checkpoint; its network counts, whatever became of the preset.

        Under other settings, if that is forced, the network is that of the settings, and the guard starts anew.
        """
        failures: list[CheckpointError] = []
        for path in reversed(checkpoints_of(self.folder)):
            try:
                saved = read_config(path)
                found = self._changes_since(path, saved.training)
                if not force:
                    require_same(found, self.folder)
                if found:
                    require_shape(saved.network, self.model.network, self.folder)
                network = self.model.network if found else saved.network
                model = dataclasses.replace(self.model, network=network)
                state = self._new_state(model)
                state.load(path)
                if found:
                    state.guard = Guard()
            except CheckpointError as error:
                failures.append(error)
                logger.warning("%s; going back to the checkpoint before it", error)
                continue
            self.changes = found
            self.model, self._seconds = model, float(saved.training.get("seconds", 0.0))
            return state
        if failures:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read, the newest because: {failures[0]}; "
                "to start anew, give another folder"
            )
        return None

    def _changes_since(self, path: Path, record: Mapping[str, Any]) -> list[str]:
        """Return what differs from the settings and images of a checkpoint, see `changes`."""
        try:
            return changes(self.config, self._data, record)
        except InvalidInputError as error:
            raise CheckpointError(
                f"the settings in {path / CONFIG_FILE} cannot be used ({error}): they were edited by hand, or written "
                "by another version of Fewstep; restore the file, or train with that version"
            ) from error


def _has_dropout(network: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())
