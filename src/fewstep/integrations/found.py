"""What a checkpoint of another code was found to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fewstep.integrations.unet_names import Names
from fewstep.networks import UNetConfig

Weights = Literal["ema", "raw"]
NullClass = Literal["mean", "last"]

DEFAULT_PROCESS, DEFAULT_PREDICTS = {"name": "vp_linear"}, "noise"
"""What a network is taken for whose files tell of no process: that of the original DDPM."""


@dataclass(frozen=True)
class Found:
    """A checkpoint of another code, read and understood.

    Args:
        kind: What it is, for people.
        network: Our configuration of its network; ``num_classes`` is the number of its class embeddings.
        names: How it names the weights.
        weights: Its tensors by those names.
        sines_first: Whether its time embedding has the sines before the cosines.
        size: Height and width of its images, or None if it does not tell.
        size_from: What the size was concluded from, if the source does not tell it outright.
        weights_are: Which of its weights these are, for people.
        process: Its process as plain data, or None if it does not tell.
        predicts: What it predicts, or None if it does not tell.
        facts: What `export_pipeline` noted of one of our models.
        assumed: What it does not tell and was taken for granted.
    """

    kind: str
    network: UNetConfig
    names: Names
    weights: dict[str, Tensor]
    sines_first: bool
    size: tuple[int, int] | None
    weights_are: str
    process: Mapping[str, Any] | None = None
    predicts: str | None = None
    size_from: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
