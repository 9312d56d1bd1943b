"""What `import fewstep` costs beyond `import torch`."""

from __future__ import annotations

import statistics
import subprocess
import sys

from report import Row

ROUNDS = 7


def rows() -> list[Row]:
    """One row: the cumulative import time of fewstep less that of torch inside it."""
    totals = [_import_seconds() for _ in range(ROUNDS)]
    whole = statistics.median(whole for whole, _ in totals)
    beyond = statistics.median(whole - torch for whole, torch in totals)
    return [
        Row(
            "`import fewstep` beyond torch",
            f"{whole:.2f} s in all",
            f"torch {whole - beyond:.2f} s",
            beyond,
            "at most 0.2 s",
            beyond <= 0.2,
        )
    ]


def _import_seconds() -> tuple[float, float]:
    """Cumulative seconds of fewstep and of torch in one fresh interpreter."""
    command = [sys.executable, "-X", "importtime", "-c", "import fewstep"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    times = {}
    for line in lines:
        _, cumulative, name = line.removeprefix("import time:").split("|")
        if cumulative.strip().isdigit():
            times[name.strip()] = int(cumulative) / 1e6
    return times["fewstep"], times["torch"]
