"""Everything that decides what a training run does, as one readable value."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fewstep import process as processes
from fewstep.denoisers.parameterisation import SILENT_AT_PURE_NOISE
from fewstep.errors import InvalidInputError, unknown_name
from fewstep.networks import NetworkConfig, presets
from fewstep.training.augmentation import WIDTH as AUGMENT_WIDTH
from fewstep.training.loss_weights import WEIGHTS
from fewstep.training.named import full_form
from fewstep.training.objective import Objective
from fewstep.training.settings import (
    Each,
    Number,
    Numbers,
    OneOf,
    Options,
    Setting,
    Text,
    Whole,
    check_settings,
    settings_of,
)
from fewstep.training.times import TIMES

PREDICTIONS = ("noise", "data", "velocity", "flow", "edm")
PRECISIONS = ("auto", "float32", "bfloat16")
DECAYS = ("cosine", "constant", "linear", "inverse_sqrt", "cooldown", "linear_cooldown")
TIMES_HELP = (
    f"How times are drawn: {', '.join(TIMES.names())}, or JSON: "
    '\'{"name": "log_normal", "mean": -1.2}\'.'
)
WEIGHT_HELP = (
    f"How much each noise level counts: {', '.join(WEIGHTS.names())}, or JSON: "
    '\'{"name": "min_snr", "gamma": 5}\'.'
)
GREATEST_WIDTH = 0.28
"""Of a power function that rises, in `ema_widths`; an even average over the whole run has 0.289."""


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a training run; each field says what it means and what it may be.

    Raises:
        InvalidInputError: A value is out of range; the message says which and what is allowed.

    >>> config = TrainingConfig(data="mnist-1000", steps=100)
    >>> TrainingConfig.from_dict(config.to_dict()) == config
    True
    """

    data: Annotated[
        str,
        Setting(
            "Images: a folder (sub-folders are classes), tar shards, an .npz file, or a name such as mnist-1000.",
            Text(),
            "Images",
            decides=False,  # the images themselves are compared
        ),
    ]
    size: Annotated[
        int | None,
        Setting(
            "Edge of the square images in pixels; by default as they are.", Whole(1), "Images"
        ),
    ] = None
    channels: Annotated[
        int | None, Setting("1 (grey) or 3 (RGB); by default as they are.", Whole(1), "Images")
    ] = None
    labels: Annotated[
        str | None,
        Setting(
            "CSV file with the columns file_name and label or caption; by default labels.csv beside the images.",
            Text(),
            "Images",
            decides=False,  # the labels themselves are compared
        ),
    ] = None
    cache: Annotated[
        str,
        Setting(
            "Keep decoded images on disk: auto (if they are many), off, or the folder to keep them in.",
            Text(),
            "Images",
            decides=False,
        ),
    ] = "auto"
    held_out: Annotated[
        float,
        Setting(
            "Share of images kept from training, 0 to 0.5, to measure what it does to new ones.",
            Number(0, 0.5, open_high=False),
            "Images",
            advice="With each sheet the error on them is logged, see [Few images](few-images.md)",
        ),
    ] = 0.0
    augment: Annotated[
        float,
        Setting(
            "Probability, 0 to 1, of each augmentation that the network is told of; for few images.",
            Number(0, 1, open_high=False),
            "Images",
            advice="0.1 to 0.3; see [Few images](few-images.md)",
        ),
    ] = 0.0
    horizontal_flip: Annotated[
        bool,
        Setting(
            "Mirror half of the images.",
            group="Images",
            advice="Good for photographs, wrong for digits and text",
        ),
    ] = False
    label_dropout: Annotated[
        float,
        Setting(
            "Share of images shown without label, 0 to 1, for guidance.",
            Number(0, 1, open_high=False),
            "Images",
            advice="0 if you never want guidance",
        ),
    ] = 0.1
    network: Annotated[
        str,
        Setting(
            f"Preset of the network: {', '.join(presets())}.", OneOf(tuple(presets())), "Network"
        ),
    ] = "small"
    network_options: Annotated[
        Mapping[str, Any],
        Setting(
            "What differs from the preset, as JSON: '{\"channels\": [32, 64]}'.",
            Options({"channels": [32, 64]}),
            "Network",
        ),
    ] = field(default_factory=dict)
    process: Annotated[
        Mapping[str, Any],
        Setting(
            'Forward process: a name, or JSON: \'{"name": "vp_cosine", "steps": 500}\'.',
            Options({"name": "vp_cosine"}),
            "Objective",
            advice=(
                "[A process](models.md#its-process) by name or as JSON. `vp_cosine` adds noise more "
                "gently, which suits images of 64x64 and below (Nichol, Dhariwal 2021)"
            ),
        ),
    ] = field(default_factory=lambda: {"name": "vp_linear"})
    predicts: Annotated[
        str,
        Setting(
            "What the network outputs: noise, data, velocity, flow, or edm (preconditioned).",
            OneOf(PREDICTIONS),
            "Objective",
            advice=(
                "`velocity` and `flow` stay well defined at pure noise, so take one of these with zero "
                "terminal SNR"
            ),
        ),
    ] = "noise"
    times: Annotated[
        Mapping[str, Any],
        Setting(TIMES_HELP, Options({"name": "log_normal"}), "Objective"),
    ] = field(default_factory=lambda: {"name": "uniform"})
    stratified: Annotated[
        bool,
        Setting("Spread the times of a batch evenly over their distribution.", group="Objective"),
    ] = False
    weight: Annotated[
        Mapping[str, Any],
        Setting(WEIGHT_HELP, Options({"name": "min_snr"}), "Objective"),
    ] = field(default_factory=lambda: {"name": "simple"})
    learned_variance: Annotated[
        bool,
        Setting(
            "Learn the variance of the reverse steps too: twice the channels come out.",
            group="Objective",
        ),
    ] = False
    steps: Annotated[
        int,
        Setting(
            "Updates of the weights in all.",
            Whole(1),
            "Weights",
            decides=False,
            advice=(
                "Small grey images look right after thousands, photographs of 32x32 after tens to "
                "hundreds of thousands"
            ),
        ),
    ] = 10_000
    batch_size: Annotated[
        int,
        Setting(
            "Images per step.",
            Whole(1),
            "Weights",
            advice=(
                "Less memory with less; below 32 the gradient gets noisy, so lower the learning rate "
                "too"
            ),
        ),
    ] = 128
    learning_rate: Annotated[
        float,
        Setting(
            "Peak learning rate of AdamW.",
            Number(0, open_low=True),
            "Weights",
            advice=(
                "1e-3 for tiny networks, 2e-4 for `ddpm-cifar10`. If the loss jumps or steps are "
                "skipped, halve it"
            ),
        ),
    ] = 5e-4
    warmup_steps: Annotated[
        int,
        Setting(
            "Steps over which the learning rate rises from zero.",
            Whole(0),
            "Weights",
            advice="1000 or more for large networks",
        ),
    ] = 200
    decay: Annotated[
        str,
        Setting(
            "Learning rate afterwards: cosine or linear (fall to zero), constant, inverse_sqrt, cooldown or "
            "linear_cooldown (constant, then a fall to zero).",
            OneOf(DECAYS),
            "Weights",
            advice=(
                "`constant` or `inverse_sqrt` for runs whose end is not known yet; a cooldown can be "
                "added to one later, see below"
            ),
        ),
    ] = "cosine"
    decay_after: Annotated[
        int,
        Setting(
            "Steps after which inverse_sqrt falls; 0: the warm-up's.",
            Whole(0),
            "Weights",
        ),
    ] = 0
    cooldown_share: Annotated[
        float,
        Setting(
            "Share of all steps, the last ones, in which a cooldown falls.",
            Number(0, 1, open_low=True, open_high=False),
            "Weights",
        ),
    ] = 0.2
    weight_decay: Annotated[
        float,
        Setting(
            "Decoupled weight decay of AdamW, of matrices and kernels alone.",
            Number(0),
            "Weights",
            advice="Rarely matters",
        ),
    ] = 0.01
    betas: Annotated[
        tuple[float, float],
        Setting(
            "Decay of AdamW's averages of gradient and squared gradient.",
            Numbers(2, Number(0, 1)),
            "Weights",
        ),
    ] = (0.9, 0.99)
    gradient_clip: Annotated[
        float,
        Setting("Longest gradient, as Euclidean norm; 0: no limit.", Number(0), "Weights"),
    ] = 1.0
    ema_decay: Annotated[
        float,
        Setting(
            "Share of the averaged weights kept in each step, below 1.",
            Number(0, 1),
            "Weights",
            advice=(
                "The average remembers about `1 / (1 - decay)` steps: 0.999 for thousands of steps, "
                "0.9999 for hundreds of thousands"
            ),
        ),
    ] = 0.999
    ema_more: Annotated[
        tuple[float, ...],
        Setting(
            "Decays of further averages, kept beside the first.", Each(Number(0, 1)), "Weights"
        ),
    ] = ()
    ema_widths: Annotated[
        tuple[float, ...],
        Setting(
            "Further averages by EDM2's power function: widths as share of the run, such as 0.1.",
            Each(Number(0, GREATEST_WIDTH, open_low=True)),
            "Weights",
        ),
    ] = ()
    start_from: Annotated[
        str | None,
        Setting(
            "First weights: a model folder, a run or a bundled model, as far as its weights fit.",
            Text(),
            "Weights",
            advice=(
                "Averaged weights are taken; what does not fit in name and shape starts anew and is "
                "listed"
            ),
        ),
    ] = None
    precision: Annotated[
        str,
        Setting(
            "float32, bfloat16 (weights stay float32), or auto (bfloat16 where it is native).",
            OneOf(PRECISIONS),
            "Speed",
            advice="Weights stay in float32",
        ),
    ] = "auto"
    parts: Annotated[
        int | None,
        Setting(
            "Parts of a batch, each with its own thread on a CPU; by default 2, or 1 if the batch is small for the "
            "network.",
            Whole(1),
            "Speed",
            advice=(
                "About the number of cores, where batches are large: every part handles all weights "
                "anew. Not used on an accelerator"
            ),
        ),
    ] = None
    accumulate: Annotated[
        int,
        Setting(
            "Pieces of a batch that are computed one after the other, to save memory; the result is the same within "
            "rounding.",
            Whole(1),
            "Speed",
        ),
    ] = 1
    compile: Annotated[
        bool,
        Setting(
            "Compile the network with torch.compile before the first step.",
            group="Speed",
            advice="For accelerators; on a processor it was no faster, see [Networks](networks.md#compiling)",
        ),
    ] = False
    checkpoint_activations: Annotated[
        bool,
        Setting(
            "Keep less for the gradient and compute it twice: less memory, same weights, more time.",
            group="Speed",
            decides=False,
            advice="[Less memory](networks.md#memory) for a third more work",
        ),
    ] = False
    seed: Annotated[
        int,
        Setting(
            "Decides every random number of the run.",
            Whole(0),
            advice="The first weights too",
        ),
    ] = 0
    checkpoint_every: Annotated[
        int,
        Setting(
            "Steps between checkpoints.",
            Whole(1),
            decides=False,
            advice="Also at the end and on Ctrl-C. The newest two are kept",
        ),
    ] = 500
    sample_every: Annotated[
        int,
        Setting(
            "Steps between sheets of samples; 0: none.",
            Whole(0),
            decides=False,
            advice="One costs 2 x 50 network calls on 10 images",
        ),
    ] = 1000
    log_every: Annotated[
        int, Setting("Steps between lines of the log.", Whole(1), decides=False)
    ] = 20
    measure_every: Annotated[
        int,
        Setting(
            "Steps between measured distances of samples to data; 0: none.",
            Whole(0),
            decides=False,
            advice="Each costs 10 network calls on `measure_images` images, see below",
        ),
    ] = 0
    measure_images: Annotated[
        int,
        Setting(
            "Samples for each measured distance.",
            Whole(2),
            decides=False,
            advice="Figures from different numbers of samples cannot be compared",
        ),
    ] = 500
    tensorboard: Annotated[
        bool,
        Setting(
            "Write event files for TensorBoard as well.",
            decides=False,
            advice="Needs `pip install 'fewstep[train]'`; then `tensorboard --logdir runs`",
        ),
    ] = False

    def __post_init__(self) -> None:
        """Check every value; bring paths, process and betas into their full form."""
        check_settings(self)
        for name in ("data", "labels", "cache", "start_from"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "process", processes.from_dict(self.process).to_dict())
        for name, registry in (("times", TIMES), ("weight", WEIGHTS)):
            object.__setattr__(self, name, full_form(registry, getattr(self, name)))
        for name in ("ema_more", "ema_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._require_samples()
        self.objective()
        self.network_config(channels=self.channels or 1, num_classes=0)

    def objective(self) -> Objective:
        """Return the loss that these settings ask for."""
        return Objective(
            processes.from_dict(self.process),
            self.predicts,
            self.times,
            self.weight,
            self.stratified,
            self.learned_variance,
        )

    def _require_samples(self) -> None:
        """Refuse a network from which nothing could be sampled, for it says nothing where every sample begins."""
        process = processes.from_dict(self.process)
        if process.noisiest.is_pure_noise and self.predicts in SILENT_AT_PURE_NOISE:
            raise InvalidInputError(
                f"predicts = {self.predicts!r} does not go with the process {process.name}, which ends in "
                "pure noise: there such a network says nothing about the image, so that no sample could begin; "
                "give predicts = 'flow' (--predicts flow), 'velocity' or 'data'"
            )

    def network_config(self, channels: int, num_classes: int) -> NetworkConfig:
        """Return the network for images of so many channels and classes.

        Processes whose time ends at 1 get ``time_scale = 1000``, for the time embedding counts in steps; networks that
        predict edm get 250, for their time ``ln(sigma / alpha) / 4`` runs over 2.4 to 2.7 on common processes.
        """
        ends_at_one = processes.from_dict(self.process).t_max <= 1
        fitted = {
            "in_channels": channels,
            "num_classes": num_classes,
            "augment_width": AUGMENT_WIDTH if self.augment else 0,
            "time_scale": 250.0 if self.predicts == "edm" else 1000.0 if ends_at_one else 1.0,
            "out_channels": 2 * channels if self.learned_variance else None,
        }
        return presets()[self.network].config.replace(**{**fitted, **self.network_options})

    def loading(self) -> dict[str, Any]:
        """Return the options of `load_images`."""
        names = ("size", "channels", "labels", "cache")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, ready for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        lists = {name: list(getattr(self, name)) for name in ("betas", "ema_more", "ema_widths")}
        mappings = ("network_options", "process", "times", "weight")
        return {**fields, **lists, **{name: dict(getattr(self, name)) for name in mappings}}

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
        """Return a line for each setting that decides the weights and differs: name, the other's value, own value."""
        settings = settings_of(TrainingConfig)
        mine, theirs = self.to_dict(), other.to_dict()
        return [
            f"{name}: {theirs[name]!r} before, {mine[name]!r} now"
            for name in mine
            if settings[name].decides and mine[name] != theirs[name]
        ]
