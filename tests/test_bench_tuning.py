"""The benchmark of tuned plans: that the peers are run right, nothing is counted twice, and the page says what was
measured."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.errors import InvalidInputError

pytest.importorskip("diffusers", minversion="0.30")
pytest.importorskip("sklearn")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import contest  # noqa: E402
import tuning  # noqa: E402
import tuning_page  # noqa: E402
from peers import FAMILIES, PeerRun, products  # noqa: E402
from store import Results  # noqa: E402
from untuned import OURS, PEERS, ours, peer_recipe, plan_trial, theirs, toy  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PROCESS = fs.process.vp_linear()
CALLS = 5


def start() -> Tensor:
    return fs.Noise(range(3), (2,), dtype=torch.float64).initial()


class Counted:
    """The toy problem, counting how often it is asked, and keeping the points."""

    def __init__(self) -> None:
        self.points: list[Tensor] = []
        self.process = PROCESS

    def __call__(self, x: Tensor, level: fs.Level) -> Tensor:
        self.points.append(x)
        return toy(PROCESS)(x, level)


KARRAS = {"sigmas": "use_karras_sigmas"}


@pytest.mark.parametrize(
    ("family", "config", "sampler", "options", "scheduler", "steps"),
    [
        (
            "DDIMScheduler",
            {"timestep_spacing": "trailing", "clip_sample": False},
            "ddim",
            {},
            "trailing",
            10,
        ),
        ("DPMSolverMultistepScheduler", KARRAS, "dpmpp_2m", {}, "karras", 10),
        (
            "DPMSolverMultistepScheduler",
            {"sigmas": "use_exponential_sigmas", "solver_type": "heun"},
            "dpmpp_2m",
            {"solver_type": "heun"},
            "exponential",
            10,
        ),
        (
            "UniPCMultistepScheduler",
            {**KARRAS, "solver_order": 3},
            "unipc",
            {"order": 3},
            "karras",
            10,
        ),
        ("EulerDiscreteScheduler", KARRAS, "euler", {}, "karras", 10),
        ("HeunDiscreteScheduler", KARRAS, "heun", {}, "karras", 6),
        ("EDMEulerScheduler", {}, "euler", {}, "karras", 10),
        ("EDMDPMSolverMultistepScheduler", {}, "dpmpp_2m", {}, "karras", 10),
    ],
)
def test_a_peer_gives_what_our_plan_of_the_same_method_gives(
    family: str,
    config: Mapping[str, Any],
    sampler: str,
    options: Mapping[str, Any],
    scheduler: str,
    steps: int,
) -> None:
    """To the digits of the peer's own tables, which are in float32."""
    plan = fs.plan(sampler, fs.schedulers.make_grid(scheduler, PROCESS, steps), **options)
    assert isinstance(plan, fs.Plan)
    mine, its = Counted(), Counted()
    wanted = plan_trial(plan).run(mine, start(), 0)
    peer = PeerRun(family, config, {}, False, PROCESS, plan.calls)
    got = peer.run(its, start(), 0)
    assert plan.calls == peer.calls
    assert len(mine.points) == len(its.points) == plan.calls
    for a, b in zip([*its.points, got], [*mine.points, wanted], strict=True):
        torch.testing.assert_close(a, b, rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_a_peer_keeps_its_budget_and_draws_noise_when_it_says_so(family: str) -> None:
    chosen = next(f for f in FAMILIES if f.name == family)
    pick = random.Random(0).choice
    solvers, steps, grids = (
        list(products(values)) for values in (chosen.solver, chosen.step, chosen.grid)
    )
    recipes = [peer_recipe(chosen, solvers[0], steps[0], grids[0])]
    recipes += [peer_recipe(chosen, pick(solvers), pick(steps), pick(grids)) for _ in range(8)]
    ran, changed = 0, 0
    for recipe in recipes:
        asked = Counted()
        trial = recipe.trial(PROCESS, CALLS)
        result = trial and trial.attempt(asked, start(), 1)
        if trial is None or result is None:
            continue
        other = trial.attempt(toy(PROCESS), start(), 2)
        assert other is not None
        assert len(asked.points) == trial.calls <= CALLS
        assert trial.draws or other.equal(result), recipe.name
        ran, changed = ran + 1, changed + (not other.equal(result))
    assert ran
    assert bool(changed) == any(recipe.draws for recipe in recipes)


def test_no_setting_stands_twice() -> None:
    only = {"DDIMScheduler", "HeunDiscreteScheduler", "unipc", "heun"}
    for listed in (ours, theirs):
        found = list(listed(PROCESS, 4, only.__contains__))
        assert len({recipe.name for recipe, _ in found}) == len(found) > 20
    results = [
        tuple(result.flatten().tolist())
        for _, trial in ours(PROCESS, 4, lambda name: name == "unipc")
        if (result := trial.attempt(toy(PROCESS), start(), 0)) is not None
    ]
    assert len(set(results)) == len(results)


def test_a_recipe_is_rebuilt_from_plain_data() -> None:
    for listed in (ours, theirs):
        recipe, trial = list(listed(PROCESS, 4, {"heun", "HeunDiscreteScheduler"}.__contains__))[
            -1
        ]
        again = tuning.Recipe(**recipe.to_dict())
        rebuilt = again.trial(PROCESS, 4)
        assert rebuilt is not None
        assert again.key(4) == recipe.key(4)
        assert rebuilt.calls == trial.calls == 3
        assert rebuilt.run(toy(PROCESS), start(), 0).equal(trial.run(toy(PROCESS), start(), 0))


def row(value: float) -> dict[str, Any]:
    return {"name": "any | grid", "calls": 1, "rmse": value}


def test_the_verdict_and_what_a_tuned_plan_is_worth() -> None:
    rows = {f"{PEERS} | any | {n}": row(1 / n) for n in range(3, 21)}
    found = tuning_page.best({**rows, f"{tuning_page.TUNED} | abc | 5": row(0.08)}, "rmse")
    assert "ratio 0.96, met" in tuning_page.verdict(found, "rmse")
    assert tuning_page.equivalent(found, 5) == "13 calls"
    worse = tuning_page.best({**rows, f"{tuning_page.TUNED} | abc | 5": row(0.09)}, "rmse")
    assert "ratio 1.08, not met" in tuning_page.verdict(worse, "rmse")
    nearest = tuning_page.best({**rows, f"{tuning_page.TUNED} | abc | 5": row(0.01)}, "rmse")
    assert tuning_page.equivalent(nearest, 5) == "more than 20 calls"


def test_results_go_on_and_refuse_other_conditions(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with Results(path, {"images": 3}) as results:
        results.add("a", {"x": 1})
        results.add("b", {"x": 2})
    assert Results(path, {"images": 3}).rows == {"a": {"x": 1}, "b": {"x": 2}}
    with pytest.raises(InvalidInputError, match="images"):
        Results(path, {"images": 4})


def test_the_benchmark_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fs.plan("ddim", fs.schedulers.trailing(PROCESS, steps=4))
    assert isinstance(plan, fs.Plan)
    (tmp_path / "plans").mkdir()
    plan.to_json(tmp_path / "plans" / "exact-4.json")
    page = tmp_path / "tuning.md"
    arguments = (
        "--problem exact --only ddim --only DDIMScheduler --screened 4 --calls 4,5 --tuned-calls 4 --threads 1 "
        "--finalists 1 --distance-finalists 1 --distance-entrants 2 --rough-images 4 --screen-images 4 "
        f"--screen-distance-images 40 --images 4 --distance-images 40 "
        f"--plans {tmp_path}/plans --cache {tmp_path}/kept --out {page}"
    )
    monkeypatch.setattr(sys, "argv", ["tuning.py", *arguments.split()])
    tuning.main()
    text = page.read_text(encoding="utf-8")
    found = tuning_page.best(results_of(tmp_path / "kept" / "exact.json"), "rmse")
    # The same noise and the same method: the "tuned" plan is one of ours, and of the peer's.
    ours_on_trailing = found.value(tuning_page.TUNED, 4)
    assert found.value(OURS, 4) <= ours_on_trailing
    assert found.value(PEERS, 4) <= ours_on_trailing * 1.0001
    assert "| 4 |" in text
    assert "| 5 |" in text
    monkeypatch.setattr(contest.Contest, "results", None)
    tuning.main()
    assert page.read_text(encoding="utf-8") == text


def results_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))["results"]
