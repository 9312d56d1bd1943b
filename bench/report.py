"""What a benchmark prints: rows of measured figures, and the conditions under which they were measured."""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Row:
    """One figure: ours, what it is held against, the number that has a target, and whether it is met."""

    figure: str
    ours: str
    reference: str
    value: float
    target: str
    met: bool


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    ours: Callable[[], float], peer: Callable[[], float], rounds: int = 41
) -> tuple[float, float]:
    """Median of two self-timed functions that take turns, so that a busy machine slows both alike."""
    for _ in range(3):
        ours(), peer()
    pairs = [(ours(), peer()) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def header(title: str, command: str, packages: Sequence[str]) -> list[str]:
    """Title, command, date, hardware and versions, as lines of markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return [
        f"# {title}",
        "",
        f"- command: `{command}`",
        f"- date: {datetime.date.today().isoformat()}",
        f"- hardware: {_processor()}, {torch.get_num_threads()} threads",
        f"- versions: python {platform.python_version()}, {versions}",
        "",
    ]


def markdown(title: str, command: str, rows: Sequence[Row], packages: Sequence[str]) -> str:
    """The table of figures under its header."""
    lines = header(title, command, packages)
    lines += [
        "| figure | ours | reference | value | target | met |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.figure} | {r.ours} | {r.reference} | {r.value:.3f} | {r.target} | {'yes' if r.met else 'no'} |"
        for r in rows
    ]
    return "\n".join([*lines, "", f"{sum(r.met for r in rows)} of {len(rows)} targets met.", ""])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
