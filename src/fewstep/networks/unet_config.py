"""The configuration of the U-Net."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fewstep.errors import InvalidInputError, unknown_name
from fewstep.networks.base import NetworkConfig, is_number, require_whole

CONDITIONS = ("shift", "scale-shift")
RESAMPLINGS = ("conv", "residual", "plain")


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Everything that decides the shape of a `UNet`; level 0 is the full resolution.

    Args:
        in_channels: See `NetworkConfig`, as for ``out_channels``, ``num_classes``,
            ``context_width`` and ``time_scale``.
        channels: Width at each resolution, finest first; each level has half the height and width
            of the one before.
        blocks: Residual blocks per resolution on the way down: one number, or one per level.
        attention: Levels with attention, as indices ``(1, 2)`` or as one bool per level; the
            middle of the network has it by ``middle_attention``.
        heads: Attention heads, if ``head_width`` is 0.
        head_width: Channels per attention head, or 0 to fix the number of heads instead.
        dropout: Probability of dropping an activation in a residual block, in [0, 1).
        groups: Groups of every normalisation, if ``group_width`` is 0.
        group_width: Channels per normalisation group, or 0 to fix the number of groups instead.
            From 16 up, torch's kernels for channels-last images are several times faster.
        norm_epsilon: What every normalisation adds to a variance: 1e-6 in the networks of Ho et al.
        condition: How time and class act in a residual block: ``"shift"`` adds a projection of
            their embedding; ``"scale-shift"`` normalises, then ``h (1 + scale) + shift``
            (adaptive group normalisation: Dhariwal and Nichol 2021, arXiv:2105.05233).
        resample: How the resolution is halved and doubled: ``"conv"``, by a convolution of stride
            2, and by repeating pixels before a convolution; ``"residual"``, inside a residual
            block (BigGAN: Brock et al. 2018, arXiv:1809.11096; Dhariwal and Nichol 2021);
            ``"plain"``, by means of 2x2 pixels and by repeating pixels, without weights.
        pad_after: Pad the convolution of stride 2 by one pixel on the right and below alone, as
            TensorFlow and with it the original DDPM do, in place of one all around.
        residual_scale: Factor on every sum of a residual block or an attention and its input:
            1/sqrt(2) keeps the variance (Song et al. 2021, arXiv:2011.13456).
        skip_scale: Factor on every skip where it joins the way up: 1/sqrt(2) in Imagen
            (Saharia et al. 2022, arXiv:2205.11487).
        middle_attention: Whether the middle of the network has attention.
        frequency_shift: s in the frequencies ``10000^(-i / (n - s))`` of the time embedding,
            i < n = channels[0] / 2: 1 in the original DDPM, whose slowest is 1/10000 itself.

    Raises:
        InvalidInputError: A value is out of range, or two values do not fit together.

    >>> config = UNetConfig(channels=(32, 64), attention=(False, True), group_width=16)
    >>> config.attention
    (1,)
    >>> UNetConfig.from_dict(config.to_dict()) == config
    True
    """

    kind: ClassVar[str] = "U-Net"

    channels: tuple[int, ...] = (64, 128, 256)
    blocks: int | tuple[int, ...] = 2
    attention: tuple[int, ...] | tuple[bool, ...] = ()
    heads: int = 1
    head_width: int = 0
    dropout: float = 0.0
    groups: int = 32
    group_width: int = 0
    norm_epsilon: float = 1e-5
    condition: str = "shift"
    resample: str = "conv"
    pad_after: bool = False
    residual_scale: float = 1.0
    skip_scale: float = 1.0
    middle_attention: bool = True
    frequency_shift: float = 0.0

    def __post_init__(self) -> None:
        """Turn lists into tuples and bools into levels, then check every value."""
        for name in ("channels", "blocks", "attention"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()
        for name in ("heads", "groups"):
            require_whole(name, getattr(self, name), 1)
        for name in ("head_width", "group_width"):
            require_whole(name, getattr(self, name), 0)
        self._check_channels()
        self._check_blocks()
        object.__setattr__(self, "attention", self._attention_levels())
        self._check_numbers()
        self._check_choices()
        attended = {self.channels[level] for level in self.attention}
        if self.middle_attention:
            attended.add(self.channels[-1])
        if self.context_width and not attended:
            raise InvalidInputError(
                "context_width needs a level with attention; give attention, such as (0,), or "
                "middle_attention=True"
            )
        self._check_shares("heads", "head_width", sorted(attended))
        self._check_shares("groups", "group_width", self.channels)

    def _check_numbers(self) -> None:
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise InvalidInputError(f"dropout = {self.dropout!r}; give a number in [0, 1)")
        for name in ("norm_epsilon", "residual_scale", "skip_scale"):
            value = getattr(self, name)
            if not (is_number(value) and 0 < value < math.inf):
                raise InvalidInputError(f"{name} = {value!r}; give a finite number above 0")
        most = self.channels[0] // 2
        if not (is_number(self.frequency_shift) and 0 <= self.frequency_shift < most):
            raise InvalidInputError(
                f"frequency_shift = {self.frequency_shift!r}; give a number in [0, {most}), half "
                "of channels[0]: 1 for the original DDPM, 0 for most others"
            )

    def _check_choices(self) -> None:
        for name, allowed in (("condition", CONDITIONS), ("resample", RESAMPLINGS)):
            if getattr(self, name) not in allowed:
                raise unknown_name(name, getattr(self, name), allowed)
        for name in ("pad_after", "middle_attention"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"{name} = {getattr(self, name)!r}; give true or false")
        if self.pad_after and self.resample != "conv":
            raise InvalidInputError(
                f"pad_after is about the convolution of stride 2, which resample = "
                f"{self.resample!r} does not have; leave one of the two out"
            )

    def _check_channels(self) -> None:
        if not isinstance(self.channels, tuple) or not self.channels:
            raise InvalidInputError(
                f"channels = {self.channels!r}; give one width per resolution, such as (64, 128)"
            )
        for width in self.channels:
            require_whole("a width in channels", width, 1)
        if self.channels[0] % 2:
            raise InvalidInputError(
                f"channels[0] = {self.channels[0]} is odd; the time embedding needs as many "
                "sines as cosines: make it even"
            )

    def _check_blocks(self) -> None:
        counts = self.blocks if isinstance(self.blocks, tuple) else (self.blocks,)
        for count in counts:
            require_whole("blocks", count, 1)
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

    @property
    def size_rule(self) -> str:
        """What cannot be done with images of another size, for messages."""
        return f"cannot be halved {len(self.channels) - 1} times"

    def blocks_at(self, level: int) -> int:
        """Return the number of residual blocks on the way down at a level."""
        return self.blocks if isinstance(self.blocks, int) else self.blocks[level]

    def heads_at(self, width: int) -> int:
        """Return the number of attention heads where the image has ``width`` channels."""
        return width // self.head_width if self.head_width else self.heads

    def groups_at(self, width: int) -> int:
        """Return the number of normalisation groups where the image has ``width`` channels."""
        return width // self.group_width if self.group_width else self.groups
