"""What commands do alike when they run long and, it may be, on several workers: who speaks, and how they stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FrameType

import typer

from fewstep.team import Team

INTERRUPTED = 130
PLAIN_LINE_SECONDS = 10.0
"""Between lines of progress where there is no terminal."""


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


class Seldom:
    """Says at most once in so many seconds that it is time.

    Args:
        seconds: From one time to the next.
        at_once: Whether the first time is now.

    >>> due = Seldom(60, at_once=True)
    >>> due(), due(), due(anyway=True)
    (True, False, True)
    """

    def __init__(self, seconds: float, *, at_once: bool = False) -> None:
        self.seconds = seconds
        self._last = -seconds if at_once else time.monotonic()

    def __call__(self, anyway: bool = False) -> bool:
        """Say whether it is time, and begin to wait anew if it is; ``anyway``: it is, however short the wait was."""
        now = time.monotonic()
        if not anyway and now - self._last < self.seconds:
            return False
        self._last = now
        return True


def clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock(3725)
    '1:02:05'
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
