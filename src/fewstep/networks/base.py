"""What all networks share: the form of a configuration, the checks of what they are given, checkpointing."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.errors import InvalidInputError, unknown_name


@dataclass(frozen=True)
class NetworkConfig(ABC):
    """The shape of a network: images and conditions here, what is inside in the subclasses.

    Args:
        in_channels: Channels of the images.
        out_channels: Channels of the output; None: ``in_channels``. Twice as many as
            ``in_channels`` stands for a learned variance.
        num_classes: Number of classes, 0 for none; label ``num_classes`` is the null class.
        context_width: Width of the context for cross-attention, 0 for none.
        augment_width: Numbers that tell the network how an image was augmented, 0 for none.
        time_scale: Factor on t before its embedding: 1 for t in steps, 1000 for t in [0, 1].
    """

    kind: ClassVar[str]
    """What messages call such a network."""

    in_channels: int = 3
    out_channels: int | None = None
    num_classes: int = 0
    context_width: int = 0
    augment_width: int = 0
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check every value."""
        require_whole("in_channels", self.in_channels, 1)
        if self.out_channels is not None:
            require_whole("out_channels", self.out_channels, 1)
        require_whole("num_classes", self.num_classes, 0)
        require_whole("context_width", self.context_width, 0)
        require_whole("augment_width", self.augment_width, 0)
        if not (is_number(self.time_scale) and 0 < self.time_scale < math.inf):
            raise InvalidInputError(
                f"time_scale = {self.time_scale!r}; give a finite number above 0, "
                "such as 1 for t in steps or 1000 for t in [0, 1]"
            )

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """What height and width of an image must be multiples of."""

    @property
    @abstractmethod
    def size_rule(self) -> str:
        """What cannot be done with images of another size, for messages."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain numbers and lists, ready for JSON."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build the configuration that `to_dict` wrote.

        Args:
            fields: Values by field name; a field that is left out takes its default.

        Raises:
            InvalidInputError: A field is unknown, or a value is out of range.
        """
        return cls().replace(**fields)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed.

        Raises:
            InvalidInputError: A field is unknown, or a value is out of range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise unknown_name(f"{self.kind} option", name, known)
        return dataclasses.replace(self, **changes)


Config = TypeVar("Config", bound=NetworkConfig)


class Network(nn.Module, Generic[Config]):
    """A network from a noisy image and its time to an image of the same size.

    Args:
        config: The shape of the network.

    Attributes:
        checkpointing: Whether training keeps only what passes between blocks and works out the
            rest again on the way back; gradients are the same bit for bit.
            Source: Chen et al. 2016, arXiv:1604.06174.
    """

    config: Config
    checkpointing: bool = False

    def run(self, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Return ``part(*inputs)``; nothing within it is kept for the way back if `checkpointing`."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return part(*inputs)
        draws = self.training and any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules()
        )
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=draws)

    def check_inputs(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None,
        context: Tensor | None,
        augment: Tensor | None = None,
    ) -> None:
        """Refuse what the network cannot take.

        Raises:
            InvalidInputError: The message names the shape, type or label, and the remedy.
        """
        c, multiple = self.config, self.config.size_multiple
        if x.ndim != 4 or x.shape[1] != c.in_channels:
            raise InvalidInputError(
                f"images of shape {tuple(x.shape)} do not fit a network for "
                f"(B, {c.in_channels}, H, W); convert the images, or build it with in_channels "
                "to match"
            )
        if not x.is_floating_point():
            raise InvalidInputError(
                f"images of type {x.dtype} are not floating; scale them to [-1, 1] first"
            )
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise InvalidInputError(
                f"images of {x.shape[2]}x{x.shape[3]} pixels {c.size_rule}; "
                f"height and width must be multiples of {multiple}: resize, pad or crop the images"
            )
        if t.shape not in ((), (x.shape[0],)):
            raise InvalidInputError(
                f"times of shape {tuple(t.shape)} do not fit {x.shape[0]} images; "
                f"give one time for all, shape (), or one for each, shape ({x.shape[0]},)"
            )
        if labels is not None:
            self._check_labels(labels, x.shape[0])
        self._check_context(context, x.shape[0])
        width = self.config.augment_width
        if augment is not None and augment.shape != (x.shape[0], width):
            raise InvalidInputError(
                f"augmentations of shape {tuple(augment.shape)} do not fit; give shape ({x.shape[0]}, {width}), "
                "or build the network with augment_width to match"
            )

    def _check_labels(self, labels: Tensor, batch: int) -> None:
        classes = self.config.num_classes
        if not classes:
            raise InvalidInputError(
                "labels were given to a network without classes; leave them out, "
                "or build the network with num_classes"
            )
        if labels.shape != (batch,) or labels.dtype not in (torch.int64, torch.int32):
            raise InvalidInputError(
                f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit "
                f"{batch} images; give integers (int64) of shape ({batch},)"
            )
        # To read a label that an accelerator holds would stall it; a traced graph holds none.
        if labels.device.type != "cpu" or torch.compiler.is_compiling() or not batch:
            return
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high > classes:
            raise InvalidInputError(
                f"label {low if low < 0 else high} is not a class of this network; allowed are "
                f"0..{classes - 1}, and {classes} (or labels=None) for no class"
            )

    def _check_context(self, context: Tensor | None, batch: int) -> None:
        width = self.config.context_width
        if context is None and width:
            raise InvalidInputError(
                f"this network attends to a context; give context of shape ({batch}, L, {width})"
            )
        if context is not None and not width:
            raise InvalidInputError(
                "a context was given to a network without cross-attention; leave it out, "
                "or build the network with context_width"
            )
        if context is not None and (context.ndim, context.shape[0], context.shape[-1]) != (
            3,
            batch,
            width,
        ):
            raise InvalidInputError(
                f"context of shape {tuple(context.shape)} does not fit; "
                f"give shape ({batch}, L, {width})"
            )


def augment_map(config: NetworkConfig, width: int) -> nn.Linear | None:
    """Return the map from augmentations to a network's embedding, zero at the start; None if it takes none.

    It has no bias: for an image that was not augmented it must add nothing.
    """
    if not config.augment_width:
        return None
    layer = nn.Linear(config.augment_width, width, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def is_number(value: object) -> bool:
    """Say whether a value is a number, which a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_whole(name: str, value: object, least: int) -> None:
    """Refuse what is not a whole number of at least ``least``.

    Raises:
        InvalidInputError: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidInputError(
            f"{name} = {value!r} is not allowed; give a whole number of at least {least}"
        )
