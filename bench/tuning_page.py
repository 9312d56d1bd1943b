"""The results of `tuning.py` as a page and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report import header
from untuned import OURS, PEERS

CALLS = tuple(range(3, 21))
TUNED, FLOOR = "tuned", "converged"
PROBLEMS = ("exact", "digits", "cifar")

FEW, MANY = 5, 12
"""The target: so many tuned calls are at least as near as so many of the peer's best setting."""

TITLES = {"rmse": "Distance to the converged results", "distance": "Frechet distance"}


@dataclass
class Best:
    """The best of each side at each number of calls: the value and the setting's name."""

    of: dict[str, dict[int, tuple[float, str]]] = field(default_factory=dict)

    def offer(self, side: str, budget: int, value: float, name: str) -> None:
        """Keep it if it is the best so far."""
        own = self.of.setdefault(side, {})
        if budget not in own or value < own[budget][0]:
            own[budget] = value, name

    def value(self, side: str, budget: int) -> float:
        """Infinite where nothing was measured."""
        return self.of.get(side, {}).get(budget, (math.inf, ""))[0]

    def cell(self, side: str, budget: int) -> str:
        """The value, and which setting it is of."""
        value, name = self.of.get(side, {}).get(budget, (math.inf, ""))
        if math.isinf(value):
            return " | " if side != TUNED else ""
        return f"{value:.4g}" if side == TUNED else f"{value:.4g} | {_short(name)}"


def best(rows: Mapping[str, Mapping[str, Any]], measure: str) -> Best:
    """The best of each side; a setting that leaves calls over stands for the budget all the same."""
    found = Best()
    for key, row in rows.items():
        if key != FLOOR and row.get(measure) is not None:
            side, budget = key.split(" | ")[0], int(key.rsplit(" | ", 1)[1])
            found.offer(side, budget, row[measure], row["name"])
    return found


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by problem."""
    paths = {name: folder / f"{name}.json" for name in PROBLEMS}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }


def page(folder: Path) -> str:
    """All that was measured, as a document."""
    contents = stored(folder)
    lines = [
        *header(
            "Tuned plans against every untuned setting",
            "python bench/tuning.py",
            ("torch", "diffusers", "scikit-learn"),
        ),
        "Each row is a number of network calls. Untuned are all samplers of ours that need no trained companion, on "
        "all schedulers, with all their presets, choices and orders; and all general classes of diffusers with all "
        "values of their settings. The best of them stands in each row; settings of diffusers that are as by default "
        "are not named. Its schedulers hand the network exactly the level they compute with, and not a rounded time. "
        "Distances to the converged results are root mean squares over pixels in [-1, 1], of unipc of order 3 on 200 "
        "exponential steps from the same noise; only settings that draw no noise have one. For Frechet distances "
        "networks compute in bfloat16 where the processor does. Plans were tuned on other noise.",
        "",
    ]
    for name, content in contents.items():
        lines += _section(name, content, command_of(folder, name))
    return "\n".join(lines)


def keep_command(folder: Path, name: str, command: str) -> None:
    """Keep the command that measured a problem, for the page."""
    (folder / f"{name}.command").write_text(command, encoding="utf-8")


def command_of(folder: Path, name: str) -> str:
    """The command that measured a problem."""
    path = folder / f"{name}.command"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _section(name: str, content: Mapping[str, Any], command: str) -> list[str]:
    rows, facts = content["results"], content["conditions"]
    counts = {"rmse": facts["images"], "distance": facts["distance_images"]}
    lines = [f"## {name}", "", facts["about"], "", f"`{command}`", ""]
    for measure, title in TITLES.items():
        found = best(rows, measure)
        floor = rows[FLOOR]["distance"] if measure == "distance" and FLOOR in rows else None
        least = "" if floor is None else f" The converged results themselves are at {floor:.4g}."
        lines += [f"### {title}", "", f"{counts[measure]} pictures.{least}", ""]
        lines += [verdict(found, measure), ""]
        columns = ("calls", "best of ours untuned", "which", "best of diffusers", "which", "tuned")
        lines += [
            "| " + " | ".join((*columns, "as near as diffusers with")) + " |",
            "| ---: | ---: | --- | ---: | --- | ---: | --- |",
        ]
        for calls in sorted({n for own in found.of.values() for n in own}):
            cells = (found.cell(side, calls) for side in (OURS, PEERS, TUNED))
            lines.append(f"| {calls} | " + " | ".join((*cells, equivalent(found, calls))) + " |")
        lines.append("")
    return [*lines, *_all(rows), ""]


def verdict(found: Best, measure: str) -> str:
    """Whether few tuned calls reach the peer's best setting of many."""
    few, many = found.value(TUNED, FEW), found.value(PEERS, MANY)
    if math.isinf(few) or math.isinf(many):
        return f"{FEW} tuned calls, or {MANY} of diffusers, were not measured."
    met = "met" if few <= many else "not met"
    return (
        f"**{FEW} tuned calls {few:.4g}, the best setting of diffusers at {MANY} calls {many:.4g}: ratio "
        f"{few / many:.2f}, {met}.**"
    )


def equivalent(found: Best, calls: int) -> str:
    """The fewest calls with which the peer is at least as near as so many tuned ones."""
    own = found.value(TUNED, calls)
    if math.isinf(own):
        return ""
    theirs = sorted(found.of.get(PEERS, {}))
    enough = [n for n in theirs if found.value(PEERS, n) <= own]
    if enough:
        return f"{enough[0]} calls"
    return f"more than {theirs[-1]} calls" if theirs else ""


def _all(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every setting that was measured, at each number of calls, folded away."""
    table: dict[str, dict[int, Mapping[str, Any]]] = {}
    for key, row in rows.items():
        if key != FLOOR:
            side, budget = key.split(" | ")[0], int(key.rsplit(" | ", 1)[1])
            name = "" if side == TUNED else f" {_short(row['name'])}"
            table.setdefault(side + name, {})[budget] = row
    lines = [
        f"<details><summary>All {len(table)} settings that were measured</summary>",
        "",
        "| setting | measure | " + " | ".join(map(str, CALLS)) + " |",
        "| --- | --- " + "| ---: " * len(CALLS) + "|",
    ]
    for name, own in sorted(table.items()):
        for measure in TITLES:
            values = [own.get(n, {}).get(measure) for n in CALLS]
            if any(value is not None for value in values):
                cells = ("" if value is None else f"{value:.4g}" for value in values)
                lines.append(f"| {name} | {measure} | " + " | ".join(cells) + " |")
    return [*lines, "", "</details>"]


def _short(name: str) -> str:
    """A setting's name in a cell of a table."""
    solver, _, grid = name.partition(" | ")
    text = f"`{solver}` `{grid}`" if grid else f"`{solver}`"
    for word in ("Scheduler", "=True"):
        text = text.replace(word, "")
    return text


def plot(folder: Path, path: Path) -> None:
    """The distance to the converged results against calls, a panel for each problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    contents = stored(folder)
    size = (5.2 * len(contents), 4.2)
    figure, axes = plt.subplots(
        1, len(contents), figsize=size, constrained_layout=True, squeeze=False
    )
    sides = {OURS: "best untuned of ours", PEERS: "best of diffusers", TUNED: "tuned"}
    for axis, (name, content) in zip(axes[0], contents.items(), strict=True):
        found = best(content["results"], "rmse")
        for side, label in sides.items():
            own = sorted(found.of.get(side, {}).items())
            width = 2.2 if side == TUNED else 1.2
            axis.plot(
                [n for n, _ in own],
                [value for _, (value, _) in own],
                "o-",
                ms=4,
                lw=width,
                label=label,
            )
        axis.set(xscale="log", yscale="log", xlabel="network calls", title=name)
        shown = [n for n in (3, 4, 5, 6, 8, 10, 12, 16, 20) if n in CALLS]
        axis.set_xticks(shown, labels=list(map(str, shown)))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("RMSE to the converged results")
    axes[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
