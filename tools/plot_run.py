"""Plot what a training run logged: its loss, and the distance of its samples where that was measured.

python tools/plot_run.py runs/mine --out curves.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from fewstep.training.log import Log
from fewstep.training.trainer import LOG_FILE

SMOOTHED = 15
"""Lines of the log whose mean is drawn."""


def main() -> None:
    """Read the log and write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    entries = list(Log(given.run / LOG_FILE).entries())
    measured = [entry for entry in entries if "distance" in entry]
    figure, axes = plt.subplots(1, 1 + bool(measured), figsize=(9, 3.2), squeeze=False)
    loss = axes[0, 0]
    steps, losses = (np.array([entry[key] for entry in entries]) for key in ("step", "loss"))
    loss.plot(steps, losses, color="0.8", linewidth=0.8)
    kernel = np.ones(SMOOTHED) / SMOOTHED
    if len(losses) > SMOOTHED:
        middle = slice(SMOOTHED // 2, -(SMOOTHED // 2))
        loss.plot(steps[middle], np.convolve(losses, kernel, "valid"), color="C0")
    loss.set(xlabel="step", ylabel="loss", yscale="log")
    if measured:
        distance = axes[0, 1]
        distance.plot(
            [entry["step"] for entry in measured], [entry["distance"] for entry in measured], "o-"
        )
        distance.axhline(measured[-1]["distance_floor"], color="0.5", linestyle=":")
        distance.set(xlabel="step", ylabel=f"Fréchet distance, {measured[-1]['distance_in']}")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
