"""Who is told what happens in a run: the log and, where it is asked for, TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fewstep.errors import InvalidInputError


class Listener(Protocol):
    """Something that is told of a run as it goes on."""

    def start(self, step: int) -> None:
        """Forget what was told of later steps: they are about to be done (again)."""
        ...

    def figures(self, step: int, figures: Mapping[str, Any]) -> None:
        """Hear the figures of a step: numbers by name, None where there is no finite one, and a few words."""
        ...

    def sheet(self, step: int, path: Path) -> None:
        """Hear of a sheet of samples."""
        ...

    def close(self) -> None:
        """Hear that the run ends for now."""
        ...


class Board:
    """Event files for TensorBoard, with the names of the log.

    Args:
        folder: Where the event files go.

    Raises:
        InvalidInputError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InvalidInputError(
                "the setting tensorboard needs the package tensorboard; install it with "
                "pip install 'fewstep[train]', or train without it: log.jsonl has the same figures"
            ) from error
        self._writer_of, self._folder = SummaryWriter, folder
        self._writer: Any = None

    def start(self, step: int) -> None:
        """Begin an event file that takes back the points after a step."""
        self._writer = self._writer_of(str(self._folder), purge_step=step + 1)

    def figures(self, step: int, figures: Mapping[str, Any]) -> None:
        """Draw every number."""
        for name, value in figures.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def sheet(self, step: int, path: Path) -> None:
        """Show the picture."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image("samples", pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Listeners:
    """Several listeners as one, told in order.

    Args:
        listeners: Who is told.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._all = listeners

    def start(self, step: int) -> None:
        """Pass it on."""
        for listener in self._all:
            listener.start(step)

    def figures(self, step: int, figures: Mapping[str, Any]) -> None:
        """Pass it on."""
        for listener in self._all:
            listener.figures(step, figures)

    def sheet(self, step: int, path: Path) -> None:
        """Pass it on."""
        for listener in self._all:
            listener.sheet(step, path)

    def close(self) -> None:
        """Pass it on."""
        for listener in self._all:
            listener.close()
