"""Draw the figures of docs/plans.md and docs/parallel.md: `python tools/make_plots.py [--out FOLDER] [NAME...]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch

import fewstep as fs

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
COLOURS = {
    "ddim": "#4c72b0",
    "dpmpp_2m": "#dd8452",
    "ipndm": "#55a868",
    "heun": "#c44e52",
    "ddpm": "#8172b3",
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 110,
}


def influence() -> Figure:
    """Total influence of each call, for four samplers of ten calls or so."""
    figure, panels = pyplot.subplots(1, 4, figsize=(10, 2.6), layout="constrained")
    for panel, name in zip(panels, ("ddim", "dpmpp_2m", "heun", "ddpm"), strict=True):
        plan = _plan(name, 6 if name == "heun" else 10)
        found = plan.influence()
        calls = np.arange(1, plan.calls + 1)
        panel.bar(calls, found.total.answers, color=COLOURS[name], width=0.75)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(title=f"{name}, {plan.calls} calls", xlabel="network call")
        panel.set_xticks(calls[::2])
    panels[0].set_ylabel("change of the result\nfor an error of 1")
    return figure


def stability() -> Figure:
    """How much more errors grow than in the exact solution, over the spread of the data."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
    for panel, steps in zip(panels, (5, 20), strict=True):
        for name in ("ddim", "dpmpp_2m", "ipndm", "heun"):
            found = _plan(name, steps).stability()
            panel.loglog(found.spreads, found.worst, color=COLOURS[name], label=name)
            panel.loglog(found.spreads, found.start, color=COLOURS[name], linestyle=":")
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(title=f"{steps} steps", xlabel="standard deviation of the data", ylim=(0.08, 20))
    panels[0].set_ylabel("growth, as a multiple of\nthe exact solution's")
    panels[0].plot([], [], color="grey", label="errors of all calls")
    panels[0].plot([], [], color="grey", linestyle=":", label="of the start")
    panels[0].legend(ncols=3, loc="lower right")
    return figure


def parallel() -> Figure:
    """Calls that are done after each round, and rounds over steps, on the bundled model."""
    model = fs.load("digits").with_conditions(labels=torch.tensor([3]))
    noise = fs.Noise([3], (1, 28, 28))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    counts = (5, 10, 20, 50, 100)
    for name in ("ddim", "ddpm"):
        rounds = []
        for steps in counts:
            plan = fs.plan(name, fs.schedulers.make_grid("trailing", model.process, steps))
            assert isinstance(plan, fs.Plan)
            finished = [0]
            plan.run_parallel(
                model,
                plan.levels[0].sigma * noise.initial(),
                noise,
                on_round=lambda r, finished=finished: finished.append(r.finished),
            )
            rounds.append(len(finished) - 1)
            if steps == 50:
                left.plot(finished, color=COLOURS[name], marker=".", label=name)
        right.plot(counts, rounds, color=COLOURS[name], marker="o", label=f"{name}, in rounds")
    left.plot([0, 50], [0, 50], color="black", linewidth=0.8, label="in order")
    left.set(title="50 steps", xlabel="rounds of the network", ylabel="calls that are done")
    right.plot(counts, counts, color="black", linewidth=0.8, label="in order")
    right.set(title="rounds of the network", xlabel="steps", ylim=(0, 60))
    for panel in (left, right):
        panel.legend(loc="best")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "influence": influence,
    "stability": stability,
    "parallel": parallel,
}


def main() -> None:
    """Draw the figures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}; all")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder for the pictures")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(FIGURES):
        parser.error(
            f"no figure is called {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context(STYLE):
        for name in arguments.names or FIGURES:
            figure = FIGURES[name]()
            figure.savefig(arguments.out / f"{name}.png", metadata={"Software": None})
            pyplot.close(figure)
            print(arguments.out / f"{name}.png")


def _plan(name: str, steps: int) -> fs.Plan:
    plan = fs.plan(name, fs.schedulers.karras(fs.process.vp_linear(), steps=steps))
    assert isinstance(plan, fs.Plan)
    return plan


if __name__ == "__main__":
    main()
