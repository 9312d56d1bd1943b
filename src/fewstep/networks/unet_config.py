"""The configuration of the U-Net, and the configurations worth a name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.errors import InvalidInputError, unknown_name


@dataclass(frozen=True)
class UNetConfig:
    """Everything that decides the shape of a `UNet`; level 0 is the full resolution.

    Args:
        in_channels: Channels of the images.
        out_channels: Channels of the output; None: ``in_channels``. Twice as many as
            ``in_channels`` stands for a learned variance.
        channels: Width at each resolution, finest first; each level has half the height and width
            of the one before.
        blocks: Residual blocks per resolution on the way down: one number, or one per level.
        attention: Levels with attention, as indices ``(1, 2)`` or as one bool per level; the
            middle of the network always has it.
        heads: Attention heads, if ``head_width`` is 0.
        head_width: Channels per attention head, or 0 to fix the number of heads instead.
        num_classes: Number of classes, 0 for none; label ``num_classes`` is the null class.
        context_width: Width of the context for cross-attention, 0 for none.
        augment_width: Numbers that tell the network how an image was augmented, 0 for none.
        dropout: Probability of dropping an activation in a residual block, in [0, 1).
        groups: Groups of every normalisation, if ``group_width`` is 0.
        group_width: Channels per normalisation group, or 0 to fix the number of groups instead.
            From 16 up, torch's kernels for channels-last images are several times faster.
        time_scale: Factor on t before its embedding: 1 for t in steps, 1000 for t in [0, 1].

    Raises:
        InvalidInputError: A value is out of range, or two values do not fit together.

    >>> config = UNetConfig(channels=(32, 64), attention=(False, True), group_width=16)
    >>> config.attention
    (1,)
    >>> UNetConfig.from_dict(config.to_dict()) == config
    True
    """

    in_channels: int = 3
    out_channels: int | None = None
    channels: tuple[int, ...] = (64, 128, 256)
    blocks: int | tuple[int, ...] = 2
    attention: tuple[int, ...] | tuple[bool, ...] = ()
    heads: int = 1
    head_width: int = 0
    num_classes: int = 0
    context_width: int = 0
    augment_width: int = 0
    dropout: float = 0.0
    groups: int = 32
    group_width: int = 0
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        """Turn lists into tuples and bools into levels, then check every value."""
        for name in ("channels", "blocks", "attention"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("in_channels", "heads", "groups"):
            _require_whole(name, getattr(self, name), 1)
        for name in ("head_width", "group_width", "num_classes", "context_width", "augment_width"):
            _require_whole(name, getattr(self, name), 0)
        if self.out_channels is not None:
            _require_whole("out_channels", self.out_channels, 1)
        self._check_channels()
        self._check_blocks()
        object.__setattr__(self, "attention", self._attention_levels())
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise InvalidInputError(f"dropout = {self.dropout!r}; give a number in [0, 1)")
        if not (_is_number(self.time_scale) and 0 < self.time_scale < math.inf):
            raise InvalidInputError(
                f"time_scale = {self.time_scale!r}; give a finite number above 0, "
                "such as 1 for t in steps or 1000 for t in [0, 1]"
            )
        attended = {self.channels[level] for level in self.attention} | {self.channels[-1]}
        self._check_shares("heads", "head_width", sorted(attended))
        self._check_shares("groups", "group_width", self.channels)

    def _check_channels(self) -> None:
        if not isinstance(self.channels, tuple) or not self.channels:
            raise InvalidInputError(
                f"channels = {self.channels!r}; give one width per resolution, such as (64, 128)"
            )
        for width in self.channels:
            _require_whole("a width in channels", width, 1)
        if self.channels[0] % 2:
            raise InvalidInputError(
                f"channels[0] = {self.channels[0]} is odd; the time embedding needs as many "
                "sines as cosines: make it even"
            )

    def _check_blocks(self) -> None:
        counts = self.blocks if isinstance(self.blocks, tuple) else (self.blocks,)
        for count in counts:
            _require_whole("blocks", count, 1)
        if isinstance(self.blocks, tuple) and len(self.blocks) != len(self.channels):
            raise InvalidInputError(
                f"blocks = {self.blocks} has {len(self.blocks)} entries for {len(self.channels)} "
                "resolutions; give one number for all, or one for each"
            )

    def _attention_levels(self) -> tuple[int, ...]:
        """Read level indices, or one bool per level, as sorted level indices."""
        levels = len(self.channels)
        allowed = f"give indices from 0 (finest) to {levels - 1}, or {levels} bools"
        if not isinstance(self.attention, tuple):
            raise InvalidInputError(f"attention = {self.attention!r} is not a tuple; {allowed}")
        flags = sum(isinstance(entry, bool) for entry in self.attention)
        if flags and flags == len(self.attention) == levels:
            return tuple(level for level in range(levels) if self.attention[level])
        for entry in self.attention:
            if flags or not isinstance(entry, int) or not 0 <= entry < levels:
                raise InvalidInputError(
                    f"attention = {self.attention} does not fit {levels} resolutions; {allowed}"
                )
        return tuple(sorted(set(self.attention)))

    def _check_shares(self, count: str, width: str, widths: Sequence[int]) -> None:
        """Demand that heads, or groups, share out every one of some widths evenly."""
        name = width if getattr(self, width) else count
        parts = getattr(self, name)
        if any(total % parts for total in widths):
            raise InvalidInputError(
                f"{name} = {parts} does not divide all the widths {tuple(widths)} that it has to "
                f"share out; choose a divisor of {math.gcd(*widths)}"
            )

    @property
    def size_multiple(self) -> int:
        """What height and width of an image must be multiples of: 2 to the number of halvings."""
        return 2 ** (len(self.channels) - 1)

    def blocks_at(self, level: int) -> int:
        """Return the number of residual blocks on the way down at a level."""
        return self.blocks if isinstance(self.blocks, int) else self.blocks[level]

    def heads_at(self, width: int) -> int:
        """Return the number of attention heads where the image has ``width`` channels."""
        return width // self.head_width if self.head_width else self.heads

    def groups_at(self, width: int) -> int:
        """Return the number of normalisation groups where the image has ``width`` channels."""
        return width // self.group_width if self.group_width else self.groups

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain numbers and lists, ready for JSON."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> UNetConfig:
        """Build the configuration that `to_dict` wrote.

        Args:
            fields: Values by field name; a field that is left out takes its default.

        Raises:
            InvalidInputError: A field is unknown, or a value is out of range.
        """
        return cls().replace(**fields)

    def replace(self, **changes: Any) -> UNetConfig:
        """Return a copy with some fields changed.

        Raises:
            InvalidInputError: A field is unknown, or a value is out of range.

        >>> UNetConfig().replace(in_channels=1).in_channels
        1
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise unknown_name("U-Net option", name, known)
        return dataclasses.replace(self, **changes)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidInputError(
            f"{name} = {value!r} is not allowed; give a whole number of at least {least}"
        )


@dataclass(frozen=True)
class Preset:
    """A configuration worth a name.

    Args:
        name: How `UNet.from_preset` knows it.
        title: A few words, for lists.
        description: One sentence: what it is for.
        size: Height and width in pixels of the images that it is made for.
        config: The configuration.
    """

    name: str
    title: str
    description: str
    size: int
    config: UNetConfig


_PRESETS = (
    Preset(
        name="tutorial",
        title="64-128-256 channels, for 32x32 RGB",
        description=(
            "The U-Net of many a first course: three resolutions, attention at 16x16 and 8x8."
        ),
        size=32,
        config=UNetConfig(
            channels=(64, 128, 256), attention=(1, 2), head_width=64, group_width=16
        ),
    ),
    Preset(
        name="ddpm-cifar10",
        title="DDPM's network for CIFAR-10, 35.7M parameters",
        description=(
            "The network of Ho et al. 2020 (arXiv:2006.11239): four resolutions from 32x32 RGB, "
            "attention at 16x16, dropout 0.1."
        ),
        size=32,
        config=UNetConfig(channels=(128, 256, 256, 256), attention=(1,), dropout=0.1),
    ),
    Preset(
        name="small",
        title="32-64-128 channels, for 28x28 grey",
        description=(
            "Made for processors: three million parameters, attention at 14x14 and 7x7, "
            "widths and groups that the vector units like."
        ),
        size=28,
        config=UNetConfig(
            in_channels=1,
            channels=(32, 64, 128),
            blocks=(2, 2, 1),
            attention=(1, 2),
            head_width=64,
            group_width=16,
        ),
    ),
)


def presets() -> dict[str, Preset]:
    """Return the named configurations.

    >>> sorted(presets())
    ['ddpm-cifar10', 'small', 'tutorial']
    """
    return {preset.name: preset for preset in _PRESETS}
