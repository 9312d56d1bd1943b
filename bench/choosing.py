"""Which sampler at which budget: every sampler on three schedulers, on the bundled model of digits.

    python bench/choosing.py --images 2000 --device cuda --batch-size 500 \\
        --out docs/results/choosing.md --plot docs/images/choosing.png

Three measures for each number of network calls, with as many steps as the calls pay for:

- the root mean square distance to the converged result of the same noise, for samplers that draw none of their own and
  solve the probability-flow ODE;
- for samplers that draw noise and solve the reverse SDE, the root mean square distance to their own result of many
  steps along the same path of noise;
- from 500 images on, the Frechet distance to MNIST in the features of the bundled classifier, for all samplers.

Results are kept in a file after each run, so an interrupted benchmark goes on where it was. Samplers with a tolerance
run at several of them, and count for the budgets that their calls fit into. CFG++ samplers run with their own guidance.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep.errors import FewstepError
from fewstep.metrics import digit_features, digit_statistics, frechet_distance, load_classifier
from fewstep.plan import EagerPlan
from fewstep.samplers import SAMPLERS, SamplerEntry
from report import header
from store import Results

BUDGETS = (5, 8, 10, 15, 20, 30, 50)
SCHEDULERS = ("karras", "exponential", "simple")
TOLERANCES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
"""Of adaptive samplers: relative ones."""

ADAPTIVE_STEPS = 20
"""Steps of the grid of an adaptive sampler, which only uses its ends."""

CFG_PP_GUIDANCE = 0.6
"""The scale of CFG++ in the middle of its useful range, which is 0 to 1."""

LIMIT_STEPS = 250
"""Steps to the limit of a sampler that draws noise."""

CONVERGED = {"sampler": "unipc", "order": 3, "scheduler": "exponential", "steps": 200}
WORST_SHOWN = 5.0
"""How far the plot goes up, in medians of all that was measured: a diverging run must not flatten it."""

ENOUGH_IMAGES = 500
"""With fewer pictures a Frechet distance says little, and is left out."""

BEST = 5
"""How many of the best settings are named for each budget."""


@dataclass(frozen=True)
class Setting:
    """One run: a sampler on a scheduler, for a budget or at a tolerance."""

    entry: SamplerEntry
    scheduler: str
    budget: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        given = "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{self.entry.name}{given} | {self.scheduler} | {self.budget or 'adaptive'}"

    @property
    def is_guided(self) -> bool:
        return "guided pair" in self.entry.needs

    @property
    def has_solution(self) -> bool:
        """Whether it solves the ODE of the converged result."""
        return bool(self.entry.order) and not self.entry.stochastic and not self.is_guided

    @property
    def follows_a_path(self) -> bool:
        """Whether it draws noise, and has a limit for each path of it."""
        return bool(self.entry.order) and self.entry.stochastic and not self.is_guided

    def plan(self, process: fs.Process) -> fs.Plan | EagerPlan | None:
        """With the most steps that the budget pays for; None if it does not even pay for one."""
        if self.entry.eager:
            grid = fs.schedulers.make_grid(self.scheduler, process, ADAPTIVE_STEPS)
            return fs.plan(self.entry.name, grid, **self.options)
        for steps in range(self.budget, 0, -1):
            grid = fs.schedulers.make_grid(self.scheduler, process, steps)
            plan = fs.plan(self.entry.name, grid, **self.options)
            assert isinstance(plan, fs.Plan)
            if plan.calls <= self.budget:
                return plan
        return None


def settings(only: Sequence[str]) -> Iterator[Setting]:
    """All runs of the samplers asked for, or of all that need no trained companion of the network."""
    for entry in SAMPLERS:
        if (only and entry.name not in only) or entry.needs_training:
            continue
        adaptive = any(option.name == "rtol" for option in entry.options)
        for scheduler in SCHEDULERS:
            if adaptive:
                for rtol in TOLERANCES:
                    options = {"rtol": rtol, "atol": rtol / 10}
                    yield Setting(entry, scheduler, options=options)
            elif not entry.eager:
                for budget in BUDGETS:
                    yield Setting(entry, scheduler, budget)


class Bench:
    """The model, the noise that all runs start from, and the converged result.

    Args:
        images: How many pictures each run makes.
        device: Where to compute.
        batch_size: Pictures that go through the network together.
        store: Where the converged result is kept.
    """

    def __init__(self, images: int, device: str, batch_size: int, store: Path) -> None:
        self.images, self.batch_size = images, batch_size
        self.device = torch.device(device)
        self.model = fs.load("digits", device=device)
        self.classifier = load_classifier().to(self.device)
        assert self.model.shape is not None
        noise = fs.Noise(range(images), self.model.shape, self.device)
        self.noise = noise.initial()
        self.labels = torch.arange(images, device=self.device) % 10
        self.converged = self._converged(store)
        self._limits: dict[str, Tensor] = {}

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Calls, steps, and both distances, or what went wrong."""
        try:
            plan = setting.plan(self.model.process)
            if plan is None:
                return {"error": "does not fit"}
            pictures, calls = self.run(plan, CFG_PP_GUIDANCE if setting.is_guided else None)
        except FewstepError as error:
            return {"error": str(error)}
        row = {"calls": calls, "steps": len(plan.levels) - 1}
        if self.images >= ENOUGH_IMAGES:
            features = digit_features(pictures, classifier=self.classifier)
            row["distance"] = frechet_distance(features, digit_statistics())
        if setting.has_solution:
            row["rmse"] = (pictures - self.converged).square().mean().sqrt().item()
        if setting.follows_a_path:
            row["path"] = self._off_its_limit(setting, pictures)
        return row

    def _off_its_limit(self, setting: Setting, pictures: Tensor) -> float:
        name = setting.entry.name
        if name not in self._limits:
            grid = fs.schedulers.make_grid("exponential", self.model.process, LIMIT_STEPS)
            self._limits = {name: self.run(fs.plan(name, grid), None)[0]}
        return (pictures - self._limits[name]).square().mean().sqrt().item()

    def run(self, plan: fs.Plan | EagerPlan, guidance: float | None) -> tuple[Tensor, float]:
        """The pictures of a plan, and its network calls."""
        pictures, calls = [], []
        for rows in torch.arange(self.images, device=self.device).split(self.batch_size):
            denoiser = self.model.with_conditions(labels=self.labels[rows])
            if guidance is not None:
                null = {"labels": self.model.num_classes}
                denoiser = fs.ClassifierFree(denoiser, guidance, null=null)
            noise = fs.Noise(rows.tolist(), self.noise.shape[1:], self.device)
            x = plan.levels[0].sigma * self.noise[rows]
            if isinstance(plan, EagerPlan):
                solution = plan.solve(denoiser, x, noise)
                pictures.append(solution.x)
                calls.append(solution.calls)
            else:
                pictures.append(plan.run(denoiser, x, noise))
                calls.append(plan.calls)
        return torch.cat(pictures), sum(calls) / len(calls)

    def _converged(self, store: Path) -> Tensor:
        if store.exists():
            return torch.load(store, map_location=self.device, weights_only=True)
        process, steps = self.model.process, CONVERGED["steps"]
        grid = fs.schedulers.make_grid(CONVERGED["scheduler"], process, steps)
        plan = fs.plan(CONVERGED["sampler"], grid, order=CONVERGED["order"])
        pictures, _ = self.run(plan, None)
        new = store.with_suffix(".new.pt")
        torch.save(pictures, new)
        new.replace(store)
        return pictures


def measures(results: Results) -> tuple[str, ...]:
    """What so many images can tell."""
    enough = results.conditions["images"] >= ENOUGH_IMAGES
    return ("rmse", "path", "distance") if enough else ("rmse", "path")


Table = Mapping[str, Mapping[int, float]]
"""For each sampler and scheduler: what was measured at each budget."""


def table(rows: Mapping[str, Mapping[str, Any]], measure: str) -> dict[str, dict[int, float]]:
    """The results by name; an adaptive sampler's most costly run that fits stands for a budget."""
    found: dict[str, dict[int, float]] = {}
    costs: dict[tuple[str, int], float] = {}
    for key, row in rows.items():
        sampler, scheduler, _ = key.split(" | ")
        name = f"{sampler.split()[0]} | {scheduler}"
        fits = [b for b in BUDGETS if row.get("calls", math.inf) <= b]
        own = key.rsplit(" | ", 1)[1]
        budgets = fits if own == "adaptive" else [int(own)] * bool(fits)
        for budget in budgets:
            if measure in row and row["calls"] > costs.get((name, budget), 0):
                costs[name, budget] = row["calls"]
                found.setdefault(name, {})[budget] = row[measure]
    return found


def best(of: Table) -> list[str]:
    """The best settings of each budget, as lines of markdown."""
    lines = []
    for budget in BUDGETS:
        ranked = sorted((row[budget], name) for name, row in of.items() if budget in row)[:BEST]
        named = (f"`{name.replace(' | ', '` `')}` {value:.4g}" for value, name in ranked)
        lines.append(f"- {budget} calls: {', '.join(named)}")
    return lines


def markdown(of: Table) -> list[str]:
    """A table with a column for each budget."""
    return [
        "| sampler | scheduler | " + " | ".join(f"{b} calls" for b in BUDGETS) + " |",
        "| --- " * (2 + len(BUDGETS)) + "|",
        *(
            f"| {name} | "
            + " | ".join(f"{row[b]:.4g}" if b in row else "" for b in BUDGETS)
            + " |"
            for name, row in of.items()
        ),
    ]


def page(results: Results, command: str) -> str:
    """The results as a document."""
    what = ", ".join(f"{name} {value}" for name, value in CONVERGED.items())
    told = {
        "rmse": (
            "Distance to the converged result",
            f"Root mean square over the pixels, in [-1, 1], to the result of {what}, of the same noise.",
        ),
        "path": (
            "Samplers that draw noise",
            f"Root mean square distance to their own result of {LIMIT_STEPS} steps (exponential) along the same path "
            "of noise. Each has its own limit, so this says how soon it settles, not how good the picture is.",
        ),
        "distance": (
            "Distance to MNIST",
            "Frechet distance in the features of the bundled classifier, of all samplers.",
        ),
    }
    lines = [
        *header("Error against network calls on `digits`", command, ("torch",)),
        f"{results.conditions['images']} images, seeds from 0, labels 0 to 9 in turn. Steps are as many as the calls "
        "pay for. Empty places were not measured, or the calls do not pay for a single step.",
    ]
    for measure in measures(results):
        title, text = told[measure]
        of = table(results.rows, measure)
        lines += ["", f"## {title}", "", f"{text} Best first:", "", *best(of), "", *markdown(of)]
    return "\n".join([*lines, ""])


def plot(results: Results, path: Path, highlighted: int = 6) -> None:
    """Both measures against calls: each sampler on its best scheduler, the best ones in colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {
        "rmse": "distance to the converged result",
        "path": "samplers that draw noise: distance to their own limit",
        "distance": "Frechet distance to MNIST",
    }
    shown = measures(results)
    size = (6.5 * len(shown), 5.5)
    figure, axes = plt.subplots(
        1, len(shown), figsize=size, constrained_layout=True, squeeze=False
    )
    for axis, measure in zip(axes[0], shown, strict=True):
        lines = _envelopes(table(results.rows, measure))
        ranked = sorted(lines, key=lambda name: _mean_rank(lines, name))
        for place, name in reversed(list(enumerate(ranked))):
            budgets = sorted(lines[name])
            values = [lines[name][b] for b in budgets]
            if place < highlighted:
                axis.plot(budgets, values, "o-", ms=4, label=name, zorder=3)
            else:
                axis.plot(budgets, values, color="0.8", lw=0.8)
        axis.set(xscale="log", yscale="log", xlabel="network calls", title=titles[measure])
        axis.set_xticks(BUDGETS, labels=list(map(str, BUDGETS)))
        axis.minorticks_off()
        axis.set_ylim(
            top=WORST_SHOWN * statistics.median(v for row in lines.values() for v in row.values())
        )
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles[::-1], labels[::-1], fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _envelopes(of: Table) -> dict[str, dict[int, float]]:
    """Each sampler at each budget on the scheduler that suits it best."""
    found: dict[str, dict[int, float]] = {}
    for name, row in of.items():
        own = found.setdefault(name.split(" | ")[0], {})
        for budget, value in row.items():
            own[budget] = min(value, own.get(budget, math.inf))
    return found


def _mean_rank(lines: Table, name: str) -> float:
    """Over all budgets; a budget that the sampler cannot keep counts as the last place."""
    ranks: list[int] = []
    for budget in BUDGETS:
        values: Iterable[float] = (row[budget] for row in lines.values() if budget in row)
        own = lines[name].get(budget, math.inf)
        ranks.append(sum(value < own for value in values))
    return sum(ranks) / len(ranks)


def main() -> None:
    """Measure what is not measured yet, print the best settings, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1000, help="pictures of each run")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda")
    parser.add_argument("--batch-size", type=int, default=250, help="pictures at a time")
    parser.add_argument("--sampler", action="append", default=[], help="these samplers alone")
    parser.add_argument("--again", action="store_true", help="measure also what is known already")
    parser.add_argument("--cache", type=Path, help="file of the results so far")
    parser.add_argument("--out", type=Path, help="write the tables to this file")
    parser.add_argument("--plot", type=Path, help="write the plot to this file")
    given = parser.parse_args()
    cache = given.cache or Path(f"out/choosing-{given.images}.json")
    results = Results(cache, {"images": given.images})
    names = [SAMPLERS.find(name).name for name in given.sampler]
    left = [s for s in settings(names) if given.again or s.key not in results.rows]
    bench = Bench(given.images, given.device, given.batch_size, cache.with_suffix(".pt"))
    with results:
        for k, setting in enumerate(left, 1):
            row = results.add(setting.key, bench.measure(setting))
            print(f"{k}/{len(left)} {setting.key}: {json.dumps(row)}", flush=True)
    text = page(results, f"python bench/choosing.py --images {given.images}")
    for measure in measures(results):
        print(f"\nBest by {measure}:", *best(table(results.rows, measure)), sep="\n")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text, encoding="utf-8")
    if given.plot:
        plot(results, given.plot)


if __name__ == "__main__":
    with torch.no_grad():
        main()
