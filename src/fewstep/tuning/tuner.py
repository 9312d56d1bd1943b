"""`tune`: the best plan of a few calls for a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from fewstep.denoisers import BaseDenoiser
from fewstep.errors import InvalidInputError, NonFiniteError, unknown_name
from fewstep.noise import Noise
from fewstep.plan import Plan
from fewstep.process import Level
from fewstep.samplers import plan
from fewstep.schedulers import Grid, make_grid
from fewstep.tuned import OPTION, Purpose
from fewstep.tuning.fit import Batch, fit
from fewstep.tuning.losses import Loss, pixels
from fewstep.tuning.search import searched_grids
from fewstep.tuning.table import Table, table_of
from fewstep.tuning.teacher import Lesson, conditioned, lesson

TUNED = "tuned"
"""Sampler of a plan with learned mixing weights."""

BASES = ("uni_pc_bh2", "dpmpp_2m", "ipndm")
"""Samplers that tuning may start from."""

SCHEDULERS = ("exponential", "karras", "trailing", "align_your_steps", "gits", "use_flow_sigmas")
"""Schedulers that tuning compares with, beside the levels it finds by itself."""

FINE_STEPS = 48
"""Steps of the converged results, at least."""

HELD_OUT_SEED = 1 << 40
"""How far the seeds of held-out noise are from those of the noise that is fitted on."""

STARTS, SCOUTING = 2, 6
"""Plans that learning starts from, and the iterations each of them is given on half of the pictures."""

PATIENCE = 5
"""Iterations without gain on held-out noise before learning ends."""

Method = Literal["learn", "search"]


@dataclass(frozen=True)
class Tuning:
    """A tuned plan and what it gains; distances to the converged results, on held-out noise.

    A distance is the root mean square of the loss: with the usual one, of the difference of the pixels.

    Attributes:
        plan: The plan: the tuned one, or the untuned start if tuning gained nothing. What it was tuned for stands in
            its options.
        error: Its distance.
        start: Name of the best untuned plan of as many calls.
        start_error: The distance of that one.
        method: How the plan was found: "learn", "search", "given" if it is the one to go on from, or "none" where no
            plan is better than the best untuned one.
        untuned: The distance of every untuned plan that was tried, by name.
        notes: What did not go as asked, such as a denoiser that cannot be learned for.
    """

    plan: Plan
    error: float
    start: str
    start_error: float
    method: str
    untuned: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def gain(self) -> float:
        """How many times nearer the plan comes than the start."""
        return self.start_error / self.error if self.error else math.inf

    def __str__(self) -> str:
        found = f"{self.plan.calls} calls: {self.start} {self.start_error:.4f}"
        if self.method == "none":
            return f"{found}, tuning gained nothing"
        return f"{found}, tuned ({self.method}) {self.error:.4f}, {self.gain:.2f} times nearer"


@dataclass(frozen=True)
class Stage:
    """How far tuning has come.

    Attributes:
        name: What is being done.
        done: Share of it that is done, 0..1.
        best: The best plan so far, once there is one.
    """

    name: str
    done: float
    best: Tuning | None = None


def tune(
    model: BaseDenoiser,
    steps: int,
    *,
    shape: Sequence[int] | None = None,
    guidance: float = 1.0,
    method: Method = "learn",
    start: Plan | None = None,
    images: int = 96,
    held_out: int = 48,
    iterations: int = 80,
    batch_size: int = 16,
    loss: Loss = pixels,
    seed: int = 0,
    on_stage: Callable[[Stage], None] = lambda stage: None,
) -> Tuning:
    """Find a plan of a few network calls whose results are as near as possible to the converged ones of the same noise.

    First the best of the usual plans is looked up; then levels are searched, see `fewstep.tuning.search`; then all
    numbers of the plan are fitted together by least squares. The best on held-out noise is returned, so the result is
    never worse there than the usual plans. No gradients of the network are needed.

    Args:
        model: A loaded model, or any denoiser. A model with classes is tuned on all of them alike; conditions that a
            denoiser has already, one for each of some pictures, are taken in turn.
        steps: Network calls of the plan, 2 or more.
        shape: Shape of one picture, where the model does not know it.
        guidance: Classifier-free guidance that the plan is meant for; 1 is off.
        method: "learn", or "search" to end after the searches, which change nothing but levels.
        start: A plan of as many calls to go on from, such as an earlier result; or one of fewer calls, such as a plan
            tuned before, which gets more and is one of those that learning begins with.
        images: Pictures that the plan is fitted on.
        held_out: Other pictures, on which plans are compared.
        iterations: Iterations of the fit at most.
        batch_size: Pictures that go through the network together.
        loss: What is wrong with a result, see `fewstep.tuning.losses`: `pixels`, `pseudo_huber` or `features`.
        seed: Of the noise that is fitted on; held-out noise has other seeds.
        on_stage: Told how far it has come, with the best plan so far. What it raises, as a KeyboardInterrupt does,
            ends the tuning.

    Returns:
        The plan and its figures.

    Raises:
        InvalidInputError: If a number is out of range, the shape is missing, or the start does not fit.
        NonFiniteError: If the model gives a NaN or infinity without any tuning.

    Source: of plans with all numbers free, Shaul et al. 2024, arXiv 2403.01329; the searches name their own.

    >>> import fewstep as fs
    >>> centres = torch.tensor([[-1.0, 0.5], [0.5, 1.0]])
    >>> model = fs.exact.GaussianMixture(centres, 0.2, process=fs.process.vp_linear())
    >>> tuned = fs.tune(model, steps=3, method="search", images=16, held_out=16)
    >>> tuned.plan.calls, tuned.error <= tuned.start_error
    (3, True)
    """
    for name, value, least in (
        ("steps", steps, 2),
        ("images", images, 1),
        ("held_out", held_out, 2),
        ("iterations", iterations, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidInputError(f"{name}={value!r} must be a whole number of at least {least}")
    if method not in get_args(Method):
        raise unknown_name("method", method, get_args(Method))
    if not math.isfinite(guidance):
        raise InvalidInputError(f"guidance={guidance} must be a finite number; 1 is off")
    size = model.shape if shape is None else tuple(shape)
    if size is None:
        raise InvalidInputError(
            "this denoiser does not know the shape of its pictures; give shape=(channels, height, width)"
        )
    given = None if start is None else _checked(start, model, steps)
    fine = make_grid("exponential", model.process, max(FINE_STEPS, 3 * steps))

    def lessons(name: str, first: int, count: int) -> Lesson:
        noise = Noise(range(first, first + count), size, model.device or "cpu")
        pictures = conditioned(model, count, guidance)
        return lesson(pictures, noise, fine, batch_size, lambda done: on_stage(Stage(name, done)))

    test = lessons("converged results, held out", seed + HELD_OUT_SEED, held_out)
    train = lessons("converged results", seed, images)
    contest = _Contest(test, batch_size, loss, _usual(model, steps), on_stage)
    if given is not None:
        contest.enter(given, "given")
    _search(contest, train, steps)
    if method == "learn":
        batches = [train.part(rows) for rows in torch.arange(images).split(batch_size)]
        if any(denoiser.for_run() is not denoiser for denoiser, _, _ in batches):
            contest.note(
                f"levels were searched, not learned: {batches[0][0].name} remembers earlier calls, "
                "so its answer is not a function of the point and the level"
            )
        else:
            goes_on = start is not None and start.calls == steps
            starts = [contest.leader] if goes_on else contest.leaders(STARTS)
            _learn(contest, batches, starts, iterations, loss)
    return contest.best


class _Contest:
    """The best plan so far on held-out noise."""

    def __init__(
        self,
        test: Lesson,
        batch_size: int,
        loss: Loss,
        starts: dict[str, Plan],
        on_stage: Callable[[Stage], None],
    ) -> None:
        self.test, self.batch_size, self.loss, self.on_stage = test, batch_size, loss, on_stage
        self.entries: list[tuple[float, Plan]] = []
        untuned = {}
        for name, made in starts.items():
            untuned[name] = self._measure(made)
            on_stage(Stage("usual plans", len(untuned) / len(starts)))
        name = min(untuned, key=lambda name: untuned[name])
        self.leader = starts[name]
        self.best = Tuning(self.leader, untuned[name], name, untuned[name], "none", untuned)
        self._crown(self.leader, untuned[name], "none")

    def enter(self, made: Plan, method: str) -> float:
        """Measure a plan, keep it if it is the best, and return its distance."""
        error = self._measure(made)
        if error < self.best.error:
            self._crown(made, error, method)
        return error

    def leaders(self, count: int) -> list[Plan]:
        """The nearest plans so far, best first, no two of them on one grid."""
        found: dict[tuple[Level, ...], Plan] = {}
        for _, made in sorted(self.entries, key=lambda entry: entry[0]):
            found.setdefault(made.levels, made)
        return list(found.values())[:count]

    def _measure(self, made: Plan) -> float:
        error = self.test.error_of(made, self.batch_size, self.loss)
        self.entries.append((error, made))
        return error

    def note(self, text: str) -> None:
        self.best = replace(self.best, notes=(*self.best.notes, text))

    def tell(self, name: str, done: float) -> None:
        self.on_stage(Stage(name, done, self.best))

    def _crown(self, made: Plan, error: float, method: str) -> None:
        pictures, start, start_error = self.test.model, self.best.start, self.best.start_error
        purpose = Purpose(
            pictures.model.name, pictures.guidance, method, error, start, start_error
        )
        self.leader = made
        self.best = replace(self.best, plan=purpose.signed(made), error=error, method=method)


def _search(contest: _Contest, train: Lesson, steps: int) -> None:
    """Enter plans on the levels that the searches find: all with one sampler, the best with the others too."""
    grids = list(searched_grids(train, steps))
    usual = contest.best.start.partition("/")[0]
    first = usual if usual in BASES else BASES[0]
    errors = []
    for grid in grids:
        errors.append(contest.enter(_plan(first, grid), "search"))
        contest.tell("search", len(errors) / (len(grids) + 1))
    best = grids[errors.index(min(errors))]
    for base in BASES:
        if base != first:
            contest.enter(_plan(base, best), "search")
    contest.tell("search", 1.0)


def _learn(
    contest: _Contest,
    batches: Sequence[Batch],
    starts: Sequence[Plan],
    iterations: int,
    loss: Loss,
) -> None:
    """Fit from several plans on half of the pictures, and go on from the one that comes nearest on all of them.

    At first pictures that go another way count for less; at last for what they are.
    """
    tables, half = [table_of(start) for start in starts], batches[: (len(batches) + 1) // 2]
    scouted = []
    for k, table in enumerate(tables if len(tables) > 1 else ()):
        stage = f"learning, start {k + 1} of {len(tables)}"
        scouted.append(
            _best_fit(contest, table, half, min(SCOUTING, iterations), loss, True, stage)
        )
    table = min(scouted, key=lambda found: found[0])[1] if scouted else tables[0]
    for soften in (True, False):
        stage = "learning" if soften else "learning, last"
        _, table = _best_fit(contest, table, batches, iterations, loss, soften, stage)


def _best_fit(
    contest: _Contest,
    start: Table,
    batches: Sequence[Batch],
    iterations: int,
    loss: Loss,
    soften: bool,
    stage: str,
) -> tuple[float, Table]:
    """The table of a fit that is the nearest on held-out noise, and its distance."""
    best, idle = (math.inf, start), 0
    fitted = fit(
        start,
        batches,
        loss=loss,
        soften=soften,
        on_share=lambda done: contest.tell(stage, done),
    )
    try:
        for table in itertools.islice(fitted, iterations):
            error = contest.enter(table.plan(TUNED), "learn")
            best, idle = ((error, table), 0) if error < best[0] else (best, idle + 1)
            if idle >= PATIENCE:
                break
    except NonFiniteError as failure:
        contest.note(f"{stage} ended early, with the best plan before it: {failure}")
    return best


def _usual(model: BaseDenoiser, steps: int) -> dict[str, Plan]:
    """The usual plans of so many calls, by name."""
    grids = {name: make_grid(name, model.process, steps) for name in SCHEDULERS}
    return {f"{base}/{name}": _plan(base, grid) for name, grid in grids.items() for base in BASES}


def _checked(start: Plan, model: BaseDenoiser, steps: int) -> Plan:
    """The plan to go on from, with as many calls, and without what an earlier tuning wrote into it."""
    table = table_of(start)
    if start.calls > steps or start.process != model.process or not start.levels[-1].is_clean:
        raise InvalidInputError(
            f"start={start.name} has {start.calls} calls on {start.process} and must have {steps} or fewer on "
            f"{model.process} and end at clean data"
        )
    if start.calls < steps:
        for _ in range(steps - start.calls):
            table = table.widened()
        return table.plan(TUNED)
    options = {name: value for name, value in start.options.items() if name != OPTION}
    return replace(start, options=options)


def _plan(sampler: str, grid: Grid) -> Plan:
    made = plan(sampler, grid)
    assert isinstance(made, Plan)
    return made
