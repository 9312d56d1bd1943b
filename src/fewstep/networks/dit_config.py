"""The configuration of the diffusion transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewstep.errors import InvalidInputError
from fewstep.networks.base import NetworkConfig, is_number, require_whole


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """Everything that decides the shape of a `DiT`.

    Args:
        in_channels: See `NetworkConfig`, as for ``out_channels``, ``num_classes``,
            ``augment_width`` and ``time_scale``; ``context_width`` must be 0.
        patch: Edge of the square patches, in pixels; each is a token.
        width: Width of a token, a multiple of 4.
        depth: Number of blocks.
        heads: Attention heads; a divisor of ``width``.
        mlp_ratio: Width of the perceptron in a block as a multiple of ``width``.

    Raises:
        InvalidInputError: A value is out of range, or two values do not fit together.

    >>> DiTConfig(patch=4).size_multiple
    4
    >>> DiTConfig.from_dict(DiTConfig(depth=3).to_dict()).depth
    3
    """

    kind: ClassVar[str] = "DiT"

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        for name in ("patch", "width", "depth", "heads"):
            require_whole(name, getattr(self, name), 1)
        if self.context_width:
            raise InvalidInputError(
                f"context_width = {self.context_width}, but a DiT has no cross-attention; leave it "
                "out, or take a U-Net"
            )
        if self.width % 4:
            raise InvalidInputError(
                f"width = {self.width} is not a multiple of 4; the positions need as many sines as "
                "cosines for rows and for columns"
            )
        if self.width % self.heads:
            raise InvalidInputError(
                f"heads = {self.heads} does not divide width = {self.width}; choose a divisor of it"
            )
        if not (is_number(self.mlp_ratio) and 1 <= self.mlp_ratio * self.width < 2**31):
            raise InvalidInputError(
                f"mlp_ratio = {self.mlp_ratio!r}; give a number above 0, such as 4"
            )

    @property
    def size_multiple(self) -> int:
        """What height and width of an image must be multiples of: the edge of a patch."""
        return self.patch

    @property
    def size_rule(self) -> str:
        """What cannot be done with images of another size, for messages."""
        return f"cannot be cut into patches of {self.patch}x{self.patch}"
