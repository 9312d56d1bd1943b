"""Everything that decides what a training run does, as one readable value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep import process as processes
from fewstep.errors import InvalidInputError, unknown_name
from fewstep.networks import UNetConfig, presets

PREDICTIONS = ("noise", "data", "velocity", "flow")
PRECISIONS = ("auto", "float32", "bfloat16")
DECAYS = ("cosine", "constant")

# What may change when a run is resumed: how long it goes on, what it writes on the way, and where the data lies,
# for the data itself is compared.
FREE_TO_CHANGE = frozenset({"data", "steps", "checkpoint_every", "sample_every", "log_every"})

_LEAST = {
    "batch_size": 1,
    "steps": 1,
    "warmup_steps": 0,
    "parts": 1,
    "seed": 0,
    "checkpoint_every": 1,
    "sample_every": 0,
    "log_every": 1,
}


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a training run.

    Args:
        data: What `fewstep.data.load_images` takes: a folder, an ``.npz`` file, or a name.
        size: Edge of the square images in pixels; None: as they are.
        channels: 1 (grey) or 3 (RGB); None: as they are.
        network: Name of a U-Net preset.
        network_options: Fields of `UNetConfig` that differ from the preset.
        process: The forward process as plain data, see `fewstep.process.from_dict`.
        predicts: What the network outputs: ``"noise"``, ``"data"``, ``"velocity"`` or ``"flow"``.
        steps: Updates of the weights in all.
        batch_size: Images per step.
        learning_rate: Peak step size of AdamW.
        warmup_steps: Steps over which the learning rate rises from zero.
        decay: After that: ``"cosine"`` falls to zero at ``steps``, ``"constant"`` stays.
        weight_decay: Decoupled weight decay of matrices and kernels, per unit of learning rate.
        betas: Decay of AdamW's two averages, each in [0, 1).
        gradient_clip: Longest gradient (Euclidean norm over all weights); 0: no limit.
        ema_decay: Weight of the old average of the weights in each step, in [0, 1).
        label_dropout: Share of images shown without their label, in [0, 1], for guidance.
        horizontal_flip: Whether to mirror half of the images.
        precision: ``"float32"``, ``"bfloat16"`` (weights stay float32), or ``"auto"``: bfloat16 where the
            processor computes in it natively.
        parts: On a CPU the batch is cut into so many parts, each with its own thread; 1: no threads of our own.
        seed: Decides the initial weights and every random number of every step.
        checkpoint_every: Steps between checkpoints.
        sample_every: Steps between sheets of samples; 0: none.
        log_every: Steps between lines of the log.

    Raises:
        InvalidInputError: A value is out of range; the message says which and what is allowed.

    >>> config = TrainingConfig(data="mnist-1000", steps=100)
    >>> TrainingConfig.from_dict(config.to_dict()) == config
    True
    """

    data: str
    size: int | None = None
    channels: int | None = None
    network: str = "small"
    network_options: Mapping[str, Any] = field(default_factory=dict)
    process: Mapping[str, Any] = field(default_factory=lambda: {"name": "vp_linear"})
    predicts: str = "noise"
    steps: int = 10_000
    batch_size: int = 128
    learning_rate: float = 5e-4
    warmup_steps: int = 200
    decay: str = "cosine"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    horizontal_flip: bool = False
    precision: str = "auto"
    parts: int = 2
    seed: int = 0
    checkpoint_every: int = 500
    sample_every: int = 1000
    log_every: int = 20

    def __post_init__(self) -> None:
        """Check every value; bring process and betas into their full form."""
        for name, least in _LEAST.items():
            _require_whole(name, getattr(self, name), least)
        for name, known in (
            ("network", presets()),
            ("predicts", PREDICTIONS),
            ("precision", PRECISIONS),
            ("decay", DECAYS),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        _require("learning_rate", self.learning_rate, 0, math.inf, open_low=True)
        _require("weight_decay", self.weight_decay, 0, math.inf)
        _require("gradient_clip", self.gradient_clip, 0, math.inf)
        _require("ema_decay", self.ema_decay, 0, 1)
        _require("label_dropout", self.label_dropout, 0, 1, closed_high=True)
        if not isinstance(self.betas, list | tuple) or len(self.betas) != 2:
            raise InvalidInputError(
                f"betas = {self.betas!r} is not allowed; give two numbers in [0, 1)"
            )
        for beta in self.betas:
            _require("betas", beta, 0, 1)
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "process", processes.from_dict(self.process).to_dict())
        self.network_config(channels=self.channels or 1, num_classes=0)

    def network_config(self, channels: int, num_classes: int) -> UNetConfig:
        """Return the network for images of so many channels and classes.

        Processes whose time ends at 1 get ``time_scale = 1000``, for the time embedding counts in steps.
        """
        fitted = {
            "in_channels": channels,
            "num_classes": num_classes,
            "time_scale": 1000.0 if processes.from_dict(self.process).t_max <= 1 else 1.0,
        }
        return presets()[self.network].config.replace(**{**fitted, **self.network_options})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, ready for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {"betas": list(self.betas), "network_options": dict(self.network_options)}
        return {**fields, **plain, "process": dict(self.process)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> TrainingConfig:
        """Build the settings that `to_dict` wrote.

        Raises:
            InvalidInputError: An unknown name, or a value out of range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise unknown_name("training setting", name, known)
        if "data" not in settings:
            raise InvalidInputError("the training settings name no data; add an entry 'data'")
        return cls(**settings)

    def differences(self, other: TrainingConfig) -> list[str]:
        """Return a line for each setting that decides the weights and differs: name, own value, other value."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [
            f"{name}: {mine[name]!r}, not {theirs[name]!r}"
            for name in mine
            if name not in FREE_TO_CHANGE and mine[name] != theirs[name]
        ]


def _require_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidInputError(
            f"{name} = {value!r} is not allowed; give a whole number of at least {least}"
        )


def _require(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    closed_high: bool = False,
) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    above = number > low if open_low else number >= low
    if above and (number <= high if closed_high else number < high) and math.isfinite(number):
        return
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{']' if closed_high else ')'}"
    raise InvalidInputError(f"{name} = {value!r} is not allowed; give a number in {interval}")
