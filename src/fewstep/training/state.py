"""What changes during training: raw weights, averaged weights, the optimiser's memory, the step; on disk and off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.checkpoints import load_tensors, save_json, save_tensors
from fewstep.errors import CheckpointError
from fewstep.models import (
    CONFIG_FILE,
    WEIGHT_FILES,
    ModelConfig,
    fill,
    read_config,
    weights_file,
)
from fewstep.training.config import TrainingConfig
from fewstep.training.guard import Guard, follow
from fewstep.training.rates import average_decay, learning_rate, power_decay

OPTIMISER_FILE = "optimiser.safetensors"


class TrainingState:
    """The weights of a run and everything needed to go on with them.

    Args:
        network: The network in training; its weights are the raw ones.
        config: The settings.

    Attributes:
        average: A second network that holds the exponential moving average of the weights.
        more: Networks that hold the further averages, by name: ``ema-`` and a decay, ``power-`` and a width. Each takes
            as much memory as the weights, and a pass over them in each step.
        step: Updates that are done, skipped ones among them.
        guard: Skips updates that are not finite, and counts them.
    """

    def __init__(self, network: nn.Module, config: TrainingConfig) -> None:
        self.config = config
        self.step = 0
        self.guard = Guard()
        self.network = network.train()
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self._decays: dict[str, Callable[[int], float]] = further_averages(config)
        self.more = {name: copy.deepcopy(self.average) for name in self._decays}
        self._parameters = dict(network.named_parameters())
        self._averaged: list[Tensor] = list(self.average.parameters())
        self.optimiser = torch.optim.AdamW(
            _groups(self._parameters.values(), config.weight_decay),
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,  # the one kind that can leave out a step without a wait for the device
        )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return learning_rate(self.config, self.step) * self.guard.factor

    def update(self, loss: Tensor) -> Tensor:
        """Apply the gradients, update the average, count the step.

        Where the loss or a gradient is not finite, weights, averages and the optimiser's memory stay as they are.

        Args:
            loss: The loss that the gradients belong to, shape ().

        Returns:
            Euclidean norm of the gradient before clipping, shape ().
        """
        config = self.config
        parameters: list[Tensor] = list(self._parameters.values())
        norm = nn.utils.clip_grad_norm_(parameters, config.gradient_clip or float("inf"))
        skip = self.guard.judge(loss, norm)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate
        self.optimiser.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        follow(self._averaged, parameters, 1 - average_decay(config.ema_decay, self.step), skip)
        for name, decay in self._decays.items():
            follow(list(self.more[name].parameters()), parameters, 1 - decay(self.step), skip)
        self.step += 1
        self.guard.end_step(self.step)
        return norm

    def tensors(self) -> list[Tensor]:
        """All that training moves: weights, their averages, the optimiser's memory but for its count of steps."""
        memory = [value for value in self._optimiser_tensors().values() if value.ndim]
        more = [weight for network in self.more.values() for weight in network.parameters()]
        return [*self._parameters.values(), *self._averaged, *more, *memory]

    def save(self, folder: Path, model: ModelConfig) -> None:
        """Write the files of a checkpoint into a folder that exists.

        Raises:
            CheckpointError: A file cannot be written.
        """
        save_tensors(folder / WEIGHT_FILES["ema"], self.average.state_dict())
        save_tensors(folder / WEIGHT_FILES["raw"], self.network.state_dict())
        for name, network in self.more.items():
            save_tensors(folder / weights_file(name), network.state_dict())
        save_tensors(folder / OPTIMISER_FILE, self._optimiser_tensors())
        save_json(folder / CONFIG_FILE, model.to_dict())

    def load(self, folder: Path) -> None:
        """Take over the state of a checkpoint, bit for bit.

        Raises:
            CheckpointError: The checkpoint cannot be read or does not fit.
        """
        record = read_config(folder).training
        step = record.get("step")
        if not isinstance(step, int):
            raise CheckpointError(
                f"{folder / CONFIG_FILE} does not say after which step it was saved; it can be sampled from, "
                "but training cannot go on from it: use an earlier checkpoint"
            )
        kept = self.more  # an average that is new since then starts from the main one
        if "settings" in record:
            kept = further_averages(TrainingConfig.from_dict(record["settings"]))
        average, raw = (load_tensors(folder / WEIGHT_FILES[kind]) for kind in ("ema", "raw"))
        more = {
            name: load_tensors(folder / weights_file(name)) if name in kept else average
            for name in self.more
        }
        memory = load_tensors(folder / OPTIMISER_FILE)
        fill(self.average, average, folder / WEIGHT_FILES["ema"])
        for name, network in self.more.items():
            fill(network, more[name], folder / weights_file(name))
        fill(self.network, raw, folder / WEIGHT_FILES["raw"])
        self._fill_optimiser(memory, folder / OPTIMISER_FILE)
        self.step = step
        self.guard.load(record.get("guard", {}))

    def _optimiser_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self.optimiser.state.get(parameter, {}).items()
        }

    def _fill_optimiser(self, memory: Mapping[str, Tensor], path: Path) -> None:
        self.optimiser.state.clear()
        for full_name, value in memory.items():
            name, _, key = full_name.rpartition("/")
            parameter = self._parameters.get(name)
            if parameter is None or (value.ndim and value.shape != parameter.shape):
                raise CheckpointError(
                    f"{path} does not fit the network at {full_name!r}; the files of the folder come from "
                    "different runs: use an earlier checkpoint"
                )
            # In the memory order of the weights, so that every later update rounds as if nothing had happened.
            own = (
                torch.empty_like(parameter)
                if value.ndim
                else torch.empty_like(value, device=parameter.device)
            )
            self.optimiser.state[parameter][key] = own.detach().copy_(value)


def further_averages(config: TrainingConfig) -> dict[str, Callable[[int], float]]:
    """Return the averages of a run beside the first: by name, the share of the old average kept in step k.

    >>> list(further_averages(TrainingConfig(data="mnist-1000", ema_more=(0.99,), ema_widths=(0.1,))))
    ['ema-0.99', 'power-0.1']
    """
    decays = {f"ema-{decay:.10g}": partial(average_decay, decay) for decay in config.ema_more}
    widths = {f"power-{width:.10g}": partial(power_decay, width) for width in config.ema_widths}
    return {**decays, **widths}


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and kernels, but not biases and the scales of normalisations."""
    matrices, vectors = [], []
    for parameter in parameters:
        (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [(matrices, weight_decay), (vectors, 0.0)]
    return [{"params": group, "weight_decay": decay} for group, decay in groups if group]
