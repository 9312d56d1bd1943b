"""`fewstep tune` as a user meets it, and `fewstep sample --plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fewstep as fs
from command_line import run
from fewstep.data import read_metadata
from fewstep.plan import Plan
from fewstep.tuning import Stage
from tiny_model import tiny_model

FEW = ["--steps", "2", "--iterations", "1", "--images", "3", "--held-out", "3"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a class-conditional model of 4x4 pictures, whose network does something."""
    folder = tmp_path / "tiny"
    tiny_model().save(folder)
    return folder


def test_the_plan_lies_beside_the_model_and_can_be_used(tiny, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "tune", str(tiny), *FEW) == 0
    told = capsys.readouterr().out
    file = tiny / "plans" / "tuned-2.json"
    assert [path.name for path in file.parent.iterdir()] == ["tuned-2.json"]
    plan = Plan.from_json(file)
    assert plan.calls == 2 and plan.options["tuned_for"]["model"] == "tiny"
    start = plan.options["tuned_for"]["start"]
    assert f"2 calls: {start}" in told and f"Written to {file}" in told and "usual plans:" in told
    assert f"Use it: fewstep sample {tiny} --steps 2\n" in told
    out = tmp_path / "x.png"
    words = ["sample", str(tiny), "--plan", str(file), "--out", str(out)]
    assert run(monkeypatch, *words) == 0
    assert not capsys.readouterr().err.strip()
    settings = read_metadata(out)
    assert (settings["sampler"], settings["network_calls"]) == (plan.sampler, 2)
    assert settings["sampler_options"]["tuned_for"]["model"] == "tiny"
    assert run(monkeypatch, *words, "--steps", "7") == 2
    assert "--plan holds sampler and levels" in capsys.readouterr().err


def test_a_plan_for_something_else_is_used_with_a_warning(tiny, tmp_path, monkeypatch, capsys):
    model = fs.load(str(tiny))
    plan = fs.tune(model, 2, images=2, held_out=2, method="search").plan
    facts = {**plan.options["tuned_for"], "model": "giant"}
    file = tmp_path / "plan.json"
    fs.plan("ddim", fs.Grid(plan.process, plan.levels)).to_json(file)
    words = ["sample", str(tiny), "--plan", str(file), "--out", str(tmp_path / "x.png")]
    assert run(monkeypatch, *words) == 0
    assert not capsys.readouterr().err.strip()  # a plan that was not tuned fits everywhere
    Plan.from_dict({**plan.to_dict(), "options": {"tuned_for": facts}}).to_json(file)
    assert run(monkeypatch, *words, "--label", "1", "--guidance", "3") == 0
    assert capsys.readouterr().err.strip().splitlines() == [
        "Warning: the plan was tuned for the model 'giant', not 'tiny'",
        "Warning: the plan was tuned for guidance 1.0, not 3.0",
    ]


def test_more_calls_start_from_the_plan_of_fewer(tiny, monkeypatch, capsys):
    starts: list[Plan | None] = []
    real = fs.tune

    def listen(*arguments: Any, start: Plan | None, **options: Any) -> fs.Tuning:
        starts.append(start)
        return real(*arguments, start=start, **options)

    monkeypatch.setattr("fewstep.tuning.tune", listen)
    for steps in ("2", "3"):
        assert run(monkeypatch, "tune", str(tiny), *FEW, "--steps", steps) == 0
    assert starts == [None, Plan.from_json(tiny / "plans" / "tuned-2.json")]


def test_searched_levels_are_printed_for_other_programs(tiny, tmp_path, monkeypatch, capsys):
    found: list[fs.Tuning] = []
    real = fs.tune

    def search(*arguments: Any, **options: Any) -> fs.Tuning:
        found.append(real(*arguments, **options))
        return found[-1]

    monkeypatch.setattr("fewstep.tuning.tune", search)
    out = tmp_path / "plan.json"
    words = ["--method", "search", "--guidance", "2", "--out", str(out)]
    assert run(monkeypatch, "tune", str(tiny), *FEW, *words) == 0
    told = capsys.readouterr().out
    assert "--label 0 --guidance 2" in told
    assert f"--plan {out}" in told
    assert ("fewstep export" in told) is (found[0].method == "search")
    assert ("gained nothing" in told) is (found[0].method == "none")
    assert Plan.from_json(out) == found[0].plan


def test_ctrl_c_writes_the_best_so_far_and_a_second_run_goes_on(
    tiny, tmp_path, monkeypatch, capsys
):
    real = fs.tune

    def stopped_at(name: str, how: BaseException):
        def interrupted(*arguments, on_stage, **options):
            def listen(stage: Stage) -> None:
                on_stage(stage)
                if stage.name == name:
                    raise how

            return real(*arguments, on_stage=listen, **options)

        return interrupted

    file = tmp_path / "new" / "plan.json"
    words = ["tune", str(tiny), *FEW, "--out", str(file)]
    monkeypatch.setattr(
        "fewstep.tuning.tune", stopped_at("converged results", KeyboardInterrupt())
    )
    assert run(monkeypatch, *words) == 130
    assert "nothing is written" in capsys.readouterr().err and not file.exists()
    monkeypatch.setattr("fewstep.tuning.tune", stopped_at("search", SystemExit(137)))
    assert run(monkeypatch, *words) == 137  # as if killed: what was found is on disk
    assert Plan.from_json(file).calls == 2
    monkeypatch.setattr("fewstep.tuning.tune", stopped_at("search", KeyboardInterrupt()))
    assert run(monkeypatch, *words) == 130
    assert "the best plan so far is written" in capsys.readouterr().out
    before = Plan.from_json(file).options["tuned_for"]["error"]
    monkeypatch.setattr("fewstep.tuning.tune", real)
    assert run(monkeypatch, *words) == 0
    assert f"Going on from {file}" in capsys.readouterr().out
    assert Plan.from_json(file).options["tuned_for"]["error"] <= before
    assert run(monkeypatch, *words, "--guidance", "2") == 2
    assert "tuned for guidance 1.0, not 2.0; give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits"], "give --out tuned-5.json"),
        (["digits", "--steps", "1", "--out", "x.json"], "steps=1 must be a whole number"),
        (["digitz"], "did you mean 'digits'"),
        (["digits", "--out", "there.json"], "not JSON"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("mine", encoding="utf-8")
    assert run(monkeypatch, "tune", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0
    assert Path("there.json").read_text(encoding="utf-8") == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


def test_a_place_that_cannot_be_written_is_told(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    out = tmp_path / "file" / "plan.json"
    assert run(monkeypatch, "tune", str(tiny), *FEW, "--out", str(out)) == 1
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loss", "status", "told"),
    [
        ("pseudo-huber", 0, "Use it: "),
        ("features", 2, "knows features of digits of 1x28x28, and not of pictures of (1, 4, 4)"),
        ("blurred", 2, "'blurred'"),
    ],
)
def test_what_near_means_is_the_users_choice(tiny, monkeypatch, capsys, loss, status, told):
    assert run(monkeypatch, "tune", str(tiny), *FEW, "--loss", loss) == status
    captured = capsys.readouterr()
    assert told in captured.out + captured.err
    assert (tiny / "plans" / "tuned-2.json").exists() is (status == 0)
