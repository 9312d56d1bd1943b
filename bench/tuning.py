"""Tuned plans against every untuned setting: our samplers on our schedulers, and diffusers with all its settings.

    python bench/tuning.py --problem exact --plans out/plans
    python bench/tuning.py --problem digits --plans out/plans
    python bench/tuning.py --problem cifar --cifar RUN_FOLDER --cifar-data FILE.npz --plans out/plans \\
        --out docs/results/tuning.md --plot docs/images/tuning.png

Two measures for each number of network calls: the root mean square distance to the converged results of the same noise
(of settings that draw none), and the Frechet distance to real pictures. The noise has seeds that tuning never saw.

All settings run on the exact problem, which costs little, at a few numbers of calls. Of those, the best enter on a
network, on a few pictures. The best of them are measured at all numbers of calls, on many pictures. Plans that are
missing are tuned first. The colour model of the page was trained for 3,005 steps by

    fewstep train cifar10.npz --out RUN_FOLDER --network small --network-options '{"attention": [2]}' \\
        --predicts velocity --batch-size 128 --learning-rate 1e-3 --decay constant --horizontal-flip

on the 50,000 training images, an hour on two cores beside other work. What was measured is kept in a folder, so an
interrupted benchmark goes on where it was, and the page shows all problems that are found there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fewstep as fs
import problems
from contest import Contest
from problems import Problem
from store import Results
from tuning_page import CALLS, FLOOR, PROBLEMS, TUNED, keep_command, page, plot
from untuned import OURS, PEERS, Recipe, Trial, ours, plan_trial, theirs

SIDES = {OURS: ours, PEERS: theirs}
EXACT = "exact"
MEASURES = ("rmse", "distance")
BEST_GRIDS = 6
"""Settings that draw noise are tried on so many grids: those that are best for some setting that draws none."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        screened: Numbers of calls at which settings are chosen.
        entrants: Settings of each side that a network chooses from, at each of them.
        second: Settings of each side that are chosen from on more pictures.
        distance_entrants: The same for the Frechet distance; half of them are those nearest to converged results.
        finalists: Settings of each side that are measured at each number of calls.
        distance_finalists: The same for the Frechet distance.
        rough_images: Pictures for choosing by nearness at first. They are too few to end with: single pictures that
            turn into another one decide the distance of a setting.
        screen_images: Pictures for choosing by nearness.
        screen_distance_images: Pictures for choosing by Frechet distance.
        images: Pictures for the nearness that is shown.
        distance_images: Pictures for the Frechet distance that is shown.
        batch_size: Pictures that go through a network together.
    """

    screened: tuple[int, ...]
    entrants: int
    second: int
    distance_entrants: int
    finalists: int
    distance_finalists: int
    rough_images: int
    screen_images: int
    screen_distance_images: int
    images: int
    distance_images: int
    batch_size: int


ON_EXACT = Sizes((5, 8, 12), 0, 150, 20, 8, 5, 16, 128, 96, 128, 500, 250)
ON_NETWORK = Sizes((5, 8, 12), 100, 20, 12, 5, 3, 8, 32, 128, 64, 500, 64)


class Bench:
    """The stages of the benchmark on one problem.

    Args:
        problem: The problem.
        sizes: How much is measured.
        folder: Where results are kept.
        only: Samplers and classes to look at; all of them by default.
    """

    def __init__(
        self, problem: Problem, sizes: Sizes, folder: Path, only: Iterable[str] = ()
    ) -> None:
        self.problem, self.sizes, self.only = problem, sizes, frozenset(only)
        self.process = problem.model.process
        self.contest = Contest(problem, folder, sizes.batch_size)
        facts = {"about": problem.about, "batch_size": sizes.batch_size}
        choosing = {
            "rough_images": sizes.rough_images,
            "images": sizes.screen_images,
            "distance_images": sizes.screen_distance_images,
        }
        showing = {"images": sizes.images, "distance_images": sizes.distance_images}
        self.chosen = Results(folder / f"{problem.name}-screen.json", facts | choosing)
        self.shown = Results(folder / f"{problem.name}.json", facts | showing)

    def screen(self, exact: Mapping[str, Any] | None = None) -> None:
        """Choose among all settings, or among the best of the exact problem, whose results are given."""
        with self.chosen:
            for budget in self.sizes.screened:
                for side in SIDES:
                    started = time.monotonic()
                    if exact is None:
                        self._screen_all(side, budget)
                    else:
                        self._screen_best(exact, side, budget)
                    taken = time.monotonic() - started
                    best = (
                        self.ranked(side, budget, "rmse")[:1]
                        + self.ranked(side, budget, "distance")[:1]
                    )
                    print(
                        f"{self.problem.name}, {budget} calls, {side}: chosen in {taken:.0f} s;",
                        *(f"{recipe.name};" for recipe in best),
                        flush=True,
                    )

    def _screen_all(self, side: str, budget: int) -> None:
        done = f"screened | {side} {' '.join(sorted(self.only))} | {budget}"
        if done in self.chosen.rows:
            return
        noisy: list[tuple[Recipe, Trial]] = []
        for recipe, trial in SIDES[side](self.process, budget, self._wanted):
            if trial.draws:
                noisy.append((recipe, trial))
            else:
                self._choose(recipe, trial, budget, "rough")
        self._second_round(side, budget)
        nearest = self.ranked(side, budget, "rmse")
        grids = list(dict.fromkeys(recipe.of_grid for recipe in nearest))[:BEST_GRIDS]
        # Classes that draw noise and have grids of their own are not left out.
        others = {recipe.of_grid for recipe, _ in noisy if recipe.solver in OWN_GRIDS}
        for recipe, trial in noisy:
            if recipe.of_grid in grids or recipe.of_grid in others:
                self._choose(recipe, trial, budget, "distance")
        self._choose_among(nearest[: self.sizes.distance_entrants], budget, "distance")
        self.chosen.add(done, {})

    def _screen_best(self, exact: Mapping[str, Any], side: str, budget: int) -> None:
        entrants = ranked(exact, side, budget, "rmse")[: self.sizes.entrants]
        self._choose_among(entrants, budget, "rough")
        self._second_round(side, budget)
        half = self.sizes.distance_entrants // 2
        nearest = self.ranked(side, budget, "rmse")[:half]
        likely = ranked(exact, side, budget, "distance")[:half]
        self._choose_among([*nearest, *likely], budget, "distance")

    def _second_round(self, side: str, budget: int) -> None:
        likely = self.ranked(side, budget, "rough")[: self.sizes.second]
        self._choose_among(likely, budget, "rmse")

    def _choose_among(self, recipes: Iterable[Recipe], budget: int, measure: str) -> None:
        for recipe in recipes:
            if trial := recipe.trial(self.process, budget):
                self._choose(recipe, trial, budget, measure)

    def _choose(self, recipe: Recipe, trial: Trial, budget: int, measure: str) -> None:
        row = self.chosen.rows.get(recipe.key(budget), {"recipe": recipe.to_dict()})
        if measure in row:
            return
        if measure != "distance":
            sizes = self.sizes
            images = sizes.rough_images if measure == "rough" else sizes.screen_images
            value = self.contest.rmse(trial, images, precise=False)
        else:
            value = self.contest.distance(trial, self.sizes.screen_distance_images)
        self.chosen.add(recipe.key(budget), {**row, measure: value})

    def ranked(self, side: str, budget: int, measure: str) -> list[Recipe]:
        """What was chosen among, the best first."""
        return ranked(self.chosen.rows, side, budget, measure)

    def finalists(self, side: str, calls: int, measure: str) -> list[Recipe]:
        """The best at the nearest numbers of calls that were screened, in turn."""
        count = self.sizes.finalists if measure == "rmse" else self.sizes.distance_finalists
        lower = [b for b in self.sizes.screened if b <= calls][-1:]
        upper = [b for b in self.sizes.screened if b >= calls][:1]
        lists = [self.ranked(side, budget, measure) for budget in {*lower, *upper}]
        places = range(max(map(len, lists), default=0))
        mixed = [own[place] for place in places for own in lists if place < len(own)]
        return list({recipe.name: recipe for recipe in mixed}.values())[:count]

    def show(self, plans: Mapping[int, fs.Plan], calls: Iterable[int]) -> None:
        """Measure the best settings and the tuned plans at these numbers of calls."""
        with self.shown:
            if FLOOR not in self.shown.rows:
                self.shown.add(FLOOR, {"distance": self.contest.floor(self.sizes.distance_images)})
            for budget in calls:
                started = time.monotonic()
                for side in SIDES:
                    for measure in MEASURES:
                        for recipe in self.finalists(side, budget, measure):
                            if trial := recipe.trial(self.process, budget):
                                self._show(recipe.key(budget), recipe.name, trial, measure)
                if plan := plans.get(budget):
                    digest = hashlib.sha256(repr(plan.instructions).encode()).hexdigest()[:12]
                    for measure in MEASURES:
                        key = f"{TUNED} | {digest} | {budget}"
                        self._show(key, plan.name, plan_trial(plan), measure)
                    for key in [*self.shown.rows]:  # of a plan that was tuned anew since
                        if key.startswith(f"{TUNED} | ") and key.endswith(f" | {budget}"):
                            if digest not in key:
                                del self.shown.rows[key]
                taken = time.monotonic() - started
                print(f"{self.problem.name}, {budget} calls: {taken:.0f} s", flush=True)

    def _show(self, key: str, name: str, trial: Trial, measure: str) -> None:
        row = self.shown.rows.get(key, {"name": name, "calls": trial.calls})
        if measure in row or (measure == "rmse" and trial.draws):
            return
        if measure == "rmse":
            value = self.contest.rmse(trial, self.sizes.images)
        else:
            value = self.contest.distance(trial, self.sizes.distance_images)
        self.shown.add(key, {**row, measure: value})

    def _wanted(self, name: str) -> bool:
        return not self.only or name in self.only

    def projected(self, calls: Iterable[int]) -> float:
        """Seconds that all of it takes with nothing measured yet, without tuning."""
        sizes, seconds, total = self.sizes, self.contest.seconds, sum(calls)
        screened = sum(sizes.screened)
        precise, quick = seconds(sizes.images, True), seconds(sizes.distance_images, False)
        few, more = seconds(sizes.rough_images, False), seconds(sizes.screen_images, False)
        some = seconds(sizes.screen_distance_images, False)
        entrants = sizes.entrants or ALL_SETTINGS
        choosing = (
            entrants * (few + OVERHEAD) + sizes.second * more + sizes.distance_entrants * some
        )
        showing = (2 * sizes.finalists + 1) * precise + (2 * sizes.distance_finalists + 1) * quick
        return 2 * screened * choosing + total * showing + 200 * (precise + quick)


OWN_GRIDS = frozenset({"LCMScheduler", "TCDScheduler"})
ALL_SETTINGS, OVERHEAD = 3500, 5e-4
"""About how many settings of each side draw no noise, and what a call of one costs beside the denoiser, in seconds."""


def ranked(rows: Mapping[str, Any], side: str, budget: int, measure: str) -> list[Recipe]:
    """Settings of a side in rows of a screening, the best first; those that broke down, and repeats, left out."""
    found = [
        (row[measure], row["recipe"])
        for key, row in rows.items()
        if key.startswith(f"{side} | ") and key.endswith(f" | {budget}") and row.get(measure)
    ]
    # Settings that differ in name alone come to the same result.
    apart = {f"{value:.7g}": recipe for value, recipe in reversed(found)}
    return [Recipe(**apart[value]) for value in sorted(apart, key=float)]


def tuned_plans(problem: Problem, folder: Path, calls: Iterable[int]) -> dict[int, fs.Plan]:
    """The tuned plans of a problem; those that are missing are tuned now, each from the one of fewer calls."""
    folder.mkdir(parents=True, exist_ok=True)
    plans: dict[int, fs.Plan] = {}
    for steps in sorted(calls):
        path = folder / f"{problem.name}-{steps}.json"
        if not path.exists():
            with torch.enable_grad():
                tuning = fs.tune(
                    problem.model,
                    steps=steps,
                    shape=problem.shape,
                    start=plans[max(plans)] if plans else None,
                    **problem.tuning,
                )
            tuning.plan.to_json(path)
            print(f"{path}: {tuning}", flush=True)
        plans[steps] = fs.Plan.from_json(path)
    return plans


def _problems(given: argparse.Namespace) -> Iterator[Problem]:
    for name in given.problem:
        if name == "cifar":
            yield problems.cifar(given.cache, given.cifar, given.cifar_data)
        else:
            yield {"exact": problems.exact, "digits": problems.digits}[name]()


def _command(given: argparse.Namespace) -> str:
    """The command as anybody can give it."""
    placeholders = {str(given.cifar): "RUN_FOLDER", str(given.cifar_data): "FILE.npz"}
    return shlex.join(
        ["python", "bench/tuning.py", *(placeholders.get(w, w) for w in sys.argv[1:])]
    )


def _sizes(given: argparse.Namespace, default: Sizes) -> Sizes:
    chosen = {name: getattr(given, name) for name in vars(default)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return replace(default, **chosen)


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers and ranges, such as 3-12,16,20."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def main() -> None:
    """Tune what is missing, choose, measure, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--problem", action="append", choices=PROBLEMS, help="what to measure on")
    parser.add_argument("--cifar", type=Path, help="folder of a `fewstep train` run on CIFAR-10")
    parser.add_argument("--cifar-data", type=Path, help="images and labels as .npz")
    parser.add_argument("--plans", type=Path, help="folder of the tuned plans, NAME-CALLS.json")
    parser.add_argument("--tuned-calls", type=_numbers, help="calls that plans are tuned for")
    parser.add_argument("--calls", type=_numbers, default=CALLS, help="default 3-20")
    parser.add_argument("--only", action="append", default=[], help="these samplers and classes")
    parser.add_argument("--screened", type=_numbers, help="calls at which settings are chosen")
    for name in list(vars(ON_EXACT))[1:]:
        meaning = f"default {getattr(ON_EXACT, name)} on exact, else {getattr(ON_NETWORK, name)}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=meaning)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the processor")
    parser.add_argument("--cache", type=Path, default=Path("out/tuning"), help="folder of results")
    parser.add_argument("--out", type=Path, help="write the page to this file")
    parser.add_argument("--plot", type=Path, help="write the plot to this file")
    parser.add_argument("--dry-run", action="store_true", help="only say how long it takes")
    given = parser.parse_args()
    given.problem = given.problem or []
    if "cifar" in given.problem and not (given.cifar and given.cifar_data):
        parser.error("the problem cifar needs --cifar and --cifar-data")
    torch.set_num_threads(given.threads)
    for problem in _problems(given):
        sizes = _sizes(given, ON_NETWORK if problem.is_network else ON_EXACT)
        bench = Bench(problem, sizes, given.cache, given.only)
        minutes = bench.projected(given.calls) / 60
        print(f"{problem.name}: about {minutes:.0f} minutes, without tuning", flush=True)
        if given.dry_run:
            continue
        plans = {}
        if given.plans:
            plans = tuned_plans(problem, given.plans, given.tuned_calls or given.calls)
        if problem.is_network:
            on_exact = replace(ON_EXACT, screened=sizes.screened)
            first = Bench(problems.exact(), on_exact, given.cache, given.only)
            first.screen()
            bench.screen(first.chosen.rows)
        else:
            bench.screen()
        bench.show(plans, given.calls)
        keep_command(given.cache, problem.name, _command(given))
    text = page(given.cache)
    print(text.split("<details>")[0])
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text, encoding="utf-8")
    if given.plot:
        plot(given.cache, given.plot)


if __name__ == "__main__":
    with torch.no_grad():
        main()
