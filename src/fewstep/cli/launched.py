"""What commands do alike when they run long and, it may be, on several workers: who speaks, and how they stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FrameType

import typer

from fewstep.team import Team

INTERRUPTED = 130


@contextmanager
def main_speaks(team: Team) -> Iterator[None]:
    """Keep all workers but the main one quiet within the block; errors that leave it are still heard."""
    if team.is_main:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def stop_on_signal(team: Team, after: str) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and a polite kill end a run after what is at hand; a second one ends it at once.

    A launcher passes on what the terminal has sent to its workers already, so in a team the second one means nothing:
    there the launcher is who ends a run at once.

    Args:
        team: The workers.
        after: What is finished first, such as ``"this step"``.

    Yields:
        Says whether to stop.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and team.size == 1:
            raise KeyboardInterrupt
        if not received:
            typer.echo(f"Stopping after {after} ...", err=True)
        received.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, note) for number in signals]
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock(3725)
    '1:02:05'
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
