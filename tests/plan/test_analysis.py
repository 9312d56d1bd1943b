"""Influence and stability against runs in which one answer, the start or a draw was changed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import fewstep as fs
from exact_problems import PROCESSES, WIDTH, law, law_grid, true_law
from fewstep.errors import InvalidInputError
from fewstep.plan import Combine, Denoise, Draw, Plan
from fewstep.plan.analysis import gain
from fewstep.samplers import SamplerEntry
from sampler_cases import TRACED

SPREAD = 0.7
NAMES = [entry.name for entry in TRACED]
GRIDS = {
    "open": fs.Grid.from_ratios(PROCESSES["vp"], [12.0, 5.0, 2.5, 1.0, 0.6, 0.2]),
    "clean": fs.Grid.from_ratios(PROCESSES["edm"], [9.0, 4.0, 1.5, 0.5, 0.0]),
    "pure noise": fs.Grid.from_ratios(PROCESSES["flow"], [math.inf, 6.0, 2.0, 0.8, 0.3]),
}


class Linear:
    """`D = w x / alpha` for normal data, with `w = spread^2 / (spread^2 + e^(-2 log_snr))`, and errors on demand."""

    def __init__(self, spread: float, errors: dict[int, float]) -> None:
        self.spread, self.errors, self.answer = spread, errors, 0

    def share(self, log_snr: float) -> float:
        return 1 / (1 + math.exp(-2 * log_snr) / self.spread**2) if log_snr > -math.inf else 0.0

    def exact(self, x: Tensor, level: fs.Level) -> Tensor:
        return self.share(level.log_snr) / level.alpha * x if level.alpha else 0 * x

    def off(self, value: Tensor) -> Tensor:
        self.answer += 1
        return value + self.errors.get(self.answer - 1, 0.0)

    def __call__(self, x: Tensor, level: fs.Level) -> Tensor:
        return self.off(self.exact(x, level))

    def guided_pair(self, x: Tensor, level: fs.Level) -> tuple[Tensor, Tensor]:
        return self.off(self.exact(x, level)), self.off(self.exact(x, level))

    def derivative(self, x: Tensor, along: Tensor, level: fs.Level) -> Tensor:
        """Both points of a difference, with `x^` moved along."""
        small, ends = 1e-5, []
        for step in (small, -small):
            ends.append(self.share(level.log_snr + step) * (x + step * along) / level.alpha)
        return self.off((ends[0] - ends[1]) / (2 * small))


class Constant(Linear):
    """Answers that are the same whatever is asked."""

    def exact(self, x: Tensor, level: fs.Level) -> Tensor:
        return torch.full_like(x, 0.3)

    def derivative(self, x: Tensor, along: Tensor, level: fs.Level) -> Tensor:
        return self.off(torch.full_like(x, 0.3))


def numbers(changed: int | None) -> Iterator[float]:
    """The draws: 0.1 each, and one that is larger by 1."""
    k = 0
    while True:
        yield 0.1 + (k == changed)
        k += 1


def run(
    plan: Plan,
    kind: type[Linear],
    start: float = 0.0,
    answer: int | None = None,
    draw: int | None = None,
) -> float:
    draws = numbers(draw)
    denoiser = kind(SPREAD, {} if answer is None else {answer: 1.0})
    x = torch.tensor([[0.4 + start]], dtype=torch.float64)
    return float(plan.run(denoiser, x, lambda a, b: torch.full_like(x, next(draws))))


@pytest.mark.parametrize("where", GRIDS)
@pytest.mark.parametrize("entry", TRACED, ids=NAMES)
def test_influence_is_the_change_of_a_run_with_that_error(entry: SamplerEntry, where: str) -> None:
    plan = fs.plan(entry.name, GRIDS[where])
    assert isinstance(plan, Plan)
    influence = plan.influence(SPREAD)
    assert len(influence.direct.draws) == plan.draws
    assert {a.call for a in influence.answers} == set(range(1, plan.calls + 1))
    for weights, kind in ((influence.direct, Constant), (influence.total, Linear)):
        before = run(plan, kind)
        assert weights.start == pytest.approx(run(plan, kind, start=1.0) - before, abs=1e-7)
        for k, weight in enumerate(weights.answers):
            assert weight == pytest.approx(run(plan, kind, answer=k) - before, abs=1e-7)
        for k, weight in enumerate(weights.draws):
            assert weight == pytest.approx(run(plan, kind, draw=k) - before, abs=1e-7)


@pytest.mark.parametrize("where", GRIDS)
@pytest.mark.parametrize("entry", TRACED, ids=NAMES)
def test_influence_keeps_the_signal_rule_and_follows_data_that_move(
    entry: SamplerEntry, where: str
) -> None:
    plan = fs.plan(entry.name, GRIDS[where])
    assert isinstance(plan, Plan)
    if "signal" in plan.inexact:
        return
    influence = plan.influence(SPREAD)
    first, last = plan.levels[0], plan.levels[-1]
    estimates = np.array([a.kind != "derivative" for a in influence.answers])
    direct = influence.direct.answers[estimates].sum() + influence.direct.start * first.alpha
    assert direct == pytest.approx(last.alpha, abs=1e-7)
    # Data that are moved by 1 move the start by its alpha, the result by its alpha, and the constant parts of the
    # answers: `D = w x^ + (1 - w) mean`, `dD/dlog_snr = 2 w (1 - w) (x^ - mean) + w dx^/dlog_snr`.
    w = np.array([a.level.alpha * gain(a.level, SPREAD) for a in influence.answers])
    total = (influence.total.answers * np.where(estimates, 1 - w, -2 * w * (1 - w))).sum()
    assert total + influence.total.start * first.alpha == pytest.approx(last.alpha, abs=1e-7)


def test_influence_names_guided_pairs_and_derivatives() -> None:
    def both(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
        (t, s), _ = grid.steps
        guided, weak = tape.denoise_pair(tape.start, t)
        x = s.alpha * guided + s.sigma / t.sigma * (tape.start - t.alpha * weak)
        denoised = tape.denoise(x, s)
        slope = tape.derivative(x, s.alpha * denoised - x, s)
        return denoised + 0.25 * slope

    grid = fs.Grid.from_ratios(PROCESSES["edm"], [2.0, 1.0, 0.0])
    influence = fs.plan(both, grid).influence(1.0)  # type: ignore[union-attr]
    assert [(a.call, a.kind) for a in influence.answers] == [
        (1, "guided"), (1, "weak"), (2, "estimate"), (3, "derivative"),
    ]  # fmt: skip
    assert influence.direct.answers.tolist() == [0.0, 0.0, 1.0, 0.25]
    # At sigma = 1: dD/dx = 1/2, along = D - x = -x/2 + e, so slope = 2 (1/4) x + along / 2 = x/4 + e/2.
    by_x = 0.5 + 0.25 * 0.25
    assert influence.total.answers == pytest.approx([by_x, -0.5 * by_x, 1.125, 0.25])
    assert influence.largest == influence.answers[2]
    assert influence.share.sum() == pytest.approx(1.0)
    assert "derivative" in str(influence) and "#" in str(influence)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun", "ddpm", "euler_ancestral"])
def test_width_is_that_of_the_law(name: str, process: fs.Process) -> None:
    plan = fs.plan(name, law_grid(process, 7))
    assert isinstance(plan, Plan)
    stability = plan.stability([WIDTH])
    width = law(plan)[1] / true_law(plan)[1]
    assert stability.width == pytest.approx([width], rel=1e-9)
    if not plan.draws:
        assert stability.start == pytest.approx(stability.width, rel=1e-9)


@pytest.mark.parametrize("end", [0.05, 0.0], ids=["open", "clean"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_many_small_steps_are_as_stable_as_the_exact_solution(
    process: fs.Process, end: float
) -> None:
    ratios = [*np.geomspace(50.0, 0.05, 1001), *([0.0] if end == 0 else [])]
    plan = fs.plan("ddim", fs.Grid.from_ratios(process, ratios))
    assert isinstance(plan, Plan)
    stability = plan.stability([0.1, 0.5, 2.0, 30.0])
    # The last step jumps to clean data; what lies below its level is lost.
    kept = 1 / np.hypot(1, 0.05 / stability.spreads) if end == 0 else 1.0
    assert stability.start == pytest.approx(stability.start * 0 + kept, rel=0.005)
    assert stability.worst == pytest.approx(_worst(stability.spreads, end), rel=0.005)
    assert (stability.errors >= 0).all() and stability.errors.shape == (4, plan.calls)


def _worst(spreads: np.ndarray, end: float) -> list[float]:
    """What DDIM in the limit makes of errors, over what the exact solution does; both by quadrature."""
    found = []
    for spread in spreads:
        if end:
            found.append(1.0)
            continue
        # DDIM keeps what the exact solution keeps down to 0.05; there D = w x^, and that estimate's own error.
        w = spread**2 / (spread**2 + 0.05**2)
        found.append((w * _errors(spread, 0.05) + 1) / (_errors(spread, 0.0) + 1))
    return found


def _errors(spread: float, end: float) -> float:
    """What errors of size 1 in all estimates from 50 to 0.05 have become at the end."""

    def rate(r: float) -> float:
        return math.hypot(spread, end) / math.hypot(spread, r) / r

    return quad(rate, 0.05, 50.0, limit=200)[0]


@pytest.mark.parametrize("name", ["heun", "ipndm", "unipc"])
def test_the_start_is_amplified_as_in_a_run(name: str) -> None:
    plan = fs.plan(name, fs.schedulers.karras(PROCESSES["vp"], steps=5))
    assert isinstance(plan, Plan)
    stability = plan.stability([SPREAD])
    growth = abs(run(plan, Linear, start=1.0) - run(plan, Linear))
    first = plan.levels[0]
    assert stability.start[0] == pytest.approx(
        growth * math.hypot(first.alpha * SPREAD, first.sigma) / SPREAD, rel=1e-9
    )


def test_stability_tells_steps_that_are_too_large() -> None:
    """Five steps of Heun leave the region of stability, those of DDIM do not, and small steps never do."""

    def factor(name: str, steps: int) -> float:
        plan = fs.plan(name, fs.schedulers.karras(PROCESSES["vp"], steps=steps))
        assert isinstance(plan, Plan)
        return plan.stability().factor

    assert factor("heun", 5) > 10 > 1.2 > factor("heun", 40)
    assert factor("ddim", 5) <= 1.0 and factor("ddim", 40) <= 1.0


def test_stability_reads_well() -> None:
    plan = fs.plan("heun", fs.schedulers.karras(PROCESSES["vp"], steps=5))
    assert isinstance(plan, Plan)
    stability = plan.stability()
    assert str(stability).startswith(f"heun/karras-5: errors grow at most {stability.factor:.4g}")
    assert stability.factor == max(stability.start.max(), stability.worst.max())
    assert stability.worst == pytest.approx(stability.errors.sum(1))


@pytest.mark.parametrize("spread", [0.0, -1.0, math.nan, math.inf])
def test_spreads_must_be_positive(spread: float) -> None:
    plan = fs.plan("ddim", GRIDS["open"])
    assert isinstance(plan, Plan)
    with pytest.raises(InvalidInputError, match="must be a finite standard deviation > 0"):
        plan.influence(spread)
    with pytest.raises(InvalidInputError, match="must be a finite standard deviation > 0"):
        plan.stability([1.0, spread])
    with pytest.raises(InvalidInputError, match="must be a finite"):
        plan.stability([])


@pytest.mark.parametrize("entry", TRACED, ids=NAMES)
def test_describe_accounts_for_every_call_and_draw(entry: SamplerEntry) -> None:
    plan = fs.plan(entry.name, GRIDS["clean"])
    assert isinstance(plan, Plan)
    text = plan.describe()
    lines = text.splitlines()
    assert lines[0] == str(plan) and f"sampler: {entry.name}" in text
    head = next(k for k, line in enumerate(lines) if line.startswith("step"))
    table = lines[head + 1 : head + 1 + len(plan.levels)]
    calls = sum(_size(line[37:45].strip()) for line in table)
    assert calls == plan.calls
    assert sum(int(line[45:51].strip() or 0) for line in table) == plan.draws
    assert "largest influence: call " in text and "width of the result" in text
    for rule in ("signal", "noise"):
        assert f"{rule} rule: kept" in text or rule in plan.inexact


def _size(numbers: str) -> int:
    """How many numbers "3-5" or "1,2" stands for."""
    if "-" in numbers:
        low, high = map(int, numbers.split("-"))
        return high - low + 1
    return len([n for n in numbers.split(",") if n])


def test_describe_says_which_rule_is_broken() -> None:
    plan = fs.plan("ddpm", fs.schedulers.karras(PROCESSES["vp"], steps=5), variance="large")
    assert isinstance(plan, Plan)
    assert "noise rule: broken as declared: " in plan.describe()
    assert "signal rule: kept" in plan.describe()
    assert "sampler: ddpm (variance=large)" in plan.describe()


def test_a_plan_without_calls_can_be_described() -> None:
    edm = PROCESSES["edm"]
    t, s = edm.level(2.0), edm.level(1.0)
    program = (Combine(1, ((0, 0.5),)),)
    plan = Plan(program, 1, (t, s), edm, inexact=("signal",))
    assert plan.influence().direct.start == 0.5 and not len(plan.influence().share)
    drawn = Plan(
        (Denoise(1, 0, t), Draw(2, t, s), Combine(3, ((1, 1.0), (2, 1.0)))), 3, (t, s), edm
    )
    assert drawn.influence().direct.draws.tolist() == [1.0]
    assert drawn.stability([1.0]).width == pytest.approx(
        [math.hypot(0.2 * math.sqrt(5), 1) / math.sqrt(2)]
    )
