"""The guard against numbers that are not finite: it skips steps, then halves the learning rate, then ends the run.

Whether a step is skipped is decided where the gradient lies and never waited for; only once in `STRETCH` steps is
the count read. What the guard does depends on the steps alone, so a resumed run does as an unbroken one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import NonFiniteError
from fewstep.training.config import TrainingConfig

STRETCH = 20
"""Steps after which skips are counted, from multiple to multiple."""

SKIPS = 3
"""Skips within a stretch that halve the learning rate."""

HALVINGS = 4
"""Most halvings; where one more is due, the run ends."""


class Guard:
    """Counts the steps whose loss or gradient is not finite, and what follows from them.

    Attributes:
        halvings: How often the learning rate was halved.
        is_exhausted: Whether a halving was due that is no longer allowed.
    """

    def __init__(self) -> None:
        self.halvings = 0
        self._before = 0
        self._skips: Tensor | int = 0

    @property
    def factor(self) -> float:
        """What the learning rate is multiplied by."""
        return 0.5 ** min(self.halvings, HALVINGS)

    @property
    def is_exhausted(self) -> bool:
        """Whether one more halving was due than is allowed."""
        return self.halvings > HALVINGS

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Say whether a step is to be skipped: 1 if loss or gradient norm is not finite, else 0; float32, shape ()."""
        skip = (~(loss.isfinite() & norm.isfinite())).to(torch.float32)
        self._skips = self._skips + skip
        return skip

    def end_step(self, step: int) -> None:
        """Draw the consequences at the end of a stretch; ``step`` counts the steps done."""
        if step % STRETCH:
            return
        skips = int(self._skips)
        self._before, self._skips = self._before + skips, 0
        if skips >= SKIPS:
            self.halvings += 1

    def record(self) -> dict[str, int]:
        """Return what a checkpoint keeps."""
        return {
            "halvings": self.halvings,
            "skipped_before": self._before,
            "skipped_in_stretch": int(self._skips),
        }

    def load(self, record: Mapping[str, Any]) -> None:
        """Take over what `record` gave."""
        self.halvings = int(record.get("halvings", 0))
        self._before = int(record.get("skipped_before", 0))
        self._skips = int(record.get("skipped_in_stretch", 0))

    def failure(self, step: int, config: TrainingConfig) -> NonFiniteError:
        """Return the error that ends a run."""
        return NonFiniteError(
            f"up to step {step}, {self._before} steps were skipped because the loss or its gradient was NaN or "
            f"infinite, even after the learning rate was halved {HALVINGS} times; the weights are from before and "
            f"are saved. Try a lower learning rate (now {config.learning_rate:g}), more warm-up steps (now "
            f"{config.warmup_steps}), or precision float32: in a new folder, or with --force from here"
        )


@torch.no_grad()
def follow(average: list[Tensor], values: list[Tensor], share: float, skip: Tensor) -> None:
    """Move an average by ``share`` of its distance from new values, in place; not at all where ``skip`` is 1.

    Args:
        average: What is moved.
        values: Where it is moved to.
        share: From 0 to 1.
        skip: 0 or 1, shape (), on the device of the values; it is not waited for there.
    """
    if skip.device.type == "cpu":
        if not skip:
            torch._foreach_lerp_(average, values, share)  # pyright: ignore[reportPrivateImportUsage]
        return
    change = torch._foreach_sub(values, average)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_mul_(change, (share * (1 - skip)).to(average[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(average, change)  # pyright: ignore[reportPrivateImportUsage]
