"""Draw `docs/images/schedulers.png`: the levels of every scheduler, ten steps each.

`python tools/plot_schedulers.py` needs matplotlib, which `pip install fewstep[plots]` brings.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from fewstep.process import vp_linear
from fewstep.registry import Entry
from fewstep.schedulers import SCHEDULERS, exponential, make_grid

FILE = Path(__file__).resolve().parents[1] / "docs" / "images" / "schedulers.png"
PROCESS, STEPS, COLUMNS = vp_linear(), 10, 5
INK, FAINT, BACKDROP = "#1f4e79", "#c8c8c8", "#f7f7f7"


def main() -> None:
    """Write the figure."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 8})
    entries = list(SCHEDULERS)
    rows = math.ceil(len(entries) / COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(10, 1.45 * rows + 0.5), sharex=True, sharey=True
    )
    panels = axes.flat
    for panel, entry in zip(panels, entries, strict=False):
        draw(panel, entry)
    for panel in list(axes.flat)[len(entries) :]:
        panel.set_visible(False)
    figure.supylabel("sigma / alpha", fontsize=9)
    figure.supxlabel(
        f"level; {STEPS} steps on {PROCESS.name} with the default options, in gray equal steps in log_snr, "
        "clean data left out",
        fontsize=9,
    )
    figure.tight_layout(h_pad=0.5, w_pad=0.4)
    figure.savefig(FILE, dpi=130)


def draw(panel: Axes, entry: Entry) -> None:
    """One scheduler's levels in its panel."""
    for ratios, style in (
        (exponential(PROCESS, STEPS).ratios, {"color": FAINT, "linewidth": 1.0}),
        (
            make_grid(entry.name, PROCESS, STEPS).ratios,
            {"color": INK, "linewidth": 0.8, "marker": "o", "markersize": 2.8},
        ),
    ):
        noisy = [ratio for ratio in ratios if ratio]
        panel.plot(range(len(noisy)), noisy, **style)
    panel.set_title(entry.name, fontsize=8.5, pad=3)
    panel.set_yscale("log")
    panel.set_xticks([0, 3, 6, 9])
    panel.set_yticks([0.01, 1, 100])
    panel.minorticks_off()
    panel.grid(color="#e6e6e6", linewidth=0.5)
    panel.set_facecolor(BACKDROP)
    panel.tick_params(length=2, color=FAINT)
    for spine in panel.spines.values():
        spine.set_visible(False)


if __name__ == "__main__":
    main()
