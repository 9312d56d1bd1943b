"""`fewstep info`, `fewstep export` and the default `--sampler auto`, as a user meets them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fewstep as fs
from command_line import run
from fewstep.data import read_metadata
from fewstep.models import Model
from fewstep.tuned import OPTION, Purpose
from tiny_model import tiny_model

VP = fs.process.vp_linear()
RATIOS = [120.0, 6.0, 0.9, 0.0]
PURPOSE = Purpose("tiny", 1.0, "search", 0.1, "ddim/simple-3", 0.25)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal so wide that no table is folded."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with an untrained class-conditional model, and a plan tuned to it."""
    model = tiny_model(
        shape=(1, 4, 8),
        recommended={"steps": 3},
        training={"step": 1200, "images_seen": 76800, "data": {"source": "insects.npz"}},
    )
    folder = tmp_path / "tiny"
    model.save(folder)
    keep(folder, "tuned-3.json", PURPOSE)
    return folder


def keep(folder: Path, name: str, purpose: Purpose | None, sampler: str = "ddim") -> Path:
    plan: Any = fs.plan(sampler, fs.Grid.from_ratios(VP, RATIOS))
    (folder / "plans").mkdir(exist_ok=True)
    file = folder / "plans" / name
    (plan if purpose is None else purpose.signed(plan)).to_json(file)
    return file


# ---- sample ----------------------------------------------------------------------------------


def test_the_closing_line_and_the_picture_tell_of_the_tuned_plan(
    tiny, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "x.png"
    words = ["sample", str(tiny), "--n", "2", "--out", str(out)]
    assert run(monkeypatch, *words, "--steps", "3") == 0
    told = capsys.readouterr()
    assert f"2 images with the plan tuned for tiny, 3 network calls each: {out}" in told.out
    assert not told.err.strip()
    assert read_metadata(out)["sampler_options"][OPTION]["model"] == "tiny"
    assert run(monkeypatch, *words, "--steps", "4", "--sampler", "auto") == 0
    assert "2 images with dpmpp_2m/trailing, 4 network calls" in capsys.readouterr().out
    assert run(monkeypatch, *words, "--steps", "3", "--scheduler", "karras") == 0
    assert "2 images with dpmpp_2m/karras, 3 network calls" in capsys.readouterr().out
    assert run(monkeypatch, *words, "--sigmas", "9,1,0.1,0") == 0
    assert "2 images with dpmpp_2m/custom, 3 network calls" in capsys.readouterr().out


def test_a_plan_by_hand_goes_with_auto_and_with_no_other_name(tiny, tmp_path, monkeypatch, capsys):
    file = keep(tiny, "mine.json", None, "heun")
    words = ["sample", str(tiny), "--plan", str(file), "--out", str(tmp_path / "x.png")]
    assert run(monkeypatch, *words, "--sampler", "auto", "--scheduler", "auto") == 0
    assert "heun/custom, 5 network calls" in capsys.readouterr().out
    assert run(monkeypatch, *words, "--sampler", "ddim") == 2
    assert "--plan holds sampler and levels" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_a_broken_plan_is_one_line_of_warning(tiny, tmp_path, monkeypatch, capsys):
    (tiny / "plans" / "tuned-9.json").write_text("garbage", encoding="utf-8")
    words = ["sample", str(tiny), "--steps", "3", "--out", str(tmp_path / "x.png")]
    assert run(monkeypatch, *words) == 0
    told = capsys.readouterr()
    assert "the plan tuned for tiny" in told.out
    (line,) = told.err.strip().splitlines()
    assert line.startswith("Warning: ") and "tuned-9.json is not used: not JSON" in line


def test_the_help_says_what_auto_is(monkeypatch, capsys):
    assert run(monkeypatch, "sample", "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "auto: the plan tuned to the model" in text and "else dpmpp_2m" in text


# ---- info ------------------------------------------------------------------------------------


def test_info_tells_everything(tiny, monkeypatch, capsys):
    keep(tiny, "tuned-3-guidance-2.5.json", replace(PURPOSE, guidance=2.5, method="learn"))
    (tiny / "plans" / "broken.json").write_text("garbage", encoding="utf-8")
    assert run(monkeypatch, "info", str(tiny)) == 0
    told = capsys.readouterr().out
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in told.splitlines()]
    facts = {row[0]: row[1] for row in rows if len(row) == 2}
    assert facts["name"] == "tiny" and facts["folder"] == str(tiny)
    assert facts["images"].startswith("1 x 4 x 8")
    assert facts["classes"] == "3: ant, bee, cat" and facts["predicts"] == "noise"
    assert facts["process"].startswith("vp_linear (steps=1000, beta_start=0.0001")
    assert facts["sigma / alpha"] == "0.0100005 .. 157.407"
    count = sum(w.numel() for w in fs.load(tiny).network.parameters())
    assert facts["network"] == f"unet, {count:,} parameters"
    assert facts["training"] == "step 1,200, 76,800 images seen, on insects.npz"
    assert facts["recommended"] == "steps=3"
    plans = [row for row in rows if len(row) == 7]
    assert f"Plans tuned to it, in {tiny / 'plans'}:" in told
    start = "0.2500 ddim/simple-3"
    assert plans[0] == ["3", "1", "search", "0.1000", start, "2.50", "tuned-3.json"]
    assert plans[1][:3] == ["3", "2.5", "learn"]
    assert f"not used: {tiny / 'plans' / 'broken.json'}: not JSON" in told


def test_nothing_is_cut_off_on_a_narrow_terminal(tiny, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "info", str(tiny)) == 0
    told = capsys.readouterr().out
    tables = [line for line in told.splitlines() if line[0] in "│┃┌┏└"]
    assert "…" not in told and max(map(len, tables)) <= 80


def test_info_as_json_tells_the_same(tiny, monkeypatch, capsys):
    keep(tiny, "giant.json", replace(PURPOSE, model="giant"))
    assert run(monkeypatch, "info", str(tiny), "--json") == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert facts["shape"] == [1, 4, 8] and facts["class_names"] == ["ant", "bee", "cat"]
    assert facts["process"] == VP.to_dict()
    assert facts["sigma_over_alpha"] == [VP.least_noisy.ratio, VP.noisiest.ratio]
    assert facts["training"]["step"] == 1200
    assert facts["bytes"] == (tiny / "model.safetensors").stat().st_size
    mine, other = facts["plans"]
    assert mine == {
        "calls": 3,
        "guidance": 1.0,
        "method": "search",
        "error": 0.1,
        "start": "ddim/simple-3",
        "start_error": 0.25,
        "gain": 2.5,
        "file": str(tiny / "plans" / "tuned-3.json"),
        "fault": "",
    }
    assert (other["calls"], other["guidance"]) == (3, None) and "'giant'" in other["fault"]


def test_info_of_other_processes_and_records(tiny, monkeypatch, capsys):
    """A process that reaches pure noise, a table of betas, and a record that holds anything."""
    for process, shown in (
        (fs.process.flow(), ".. inf"),
        (fs.process.vp_from_betas([0.01] * 300, zero_terminal_snr=True), "vp_from_betas"),
    ):
        model = fs.load(tiny)
        config = replace(
            model.config,
            process=process.to_dict(),
            training={"data": "by hand", "step": "many"},
            class_names=(),
            recommended={},
        )
        Model(model.network, config).save(tiny)  # type: ignore[arg-type]
        assert run(monkeypatch, "info", str(tiny)) == 0
        told = capsys.readouterr().out
        assert shown in told and "step many" in told and "No plan is tuned to it" in told
        assert max(map(len, told.splitlines())) < 300
        assert run(monkeypatch, "info", str(tiny), "--json") == 0
        json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_info_of_the_bundled_model_and_of_a_run(tiny, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "info", "digits") == 0
    assert "60000" not in (told := capsys.readouterr().out) and "mnist.npz" in told
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    tiny.rename(checkpoints / "step-00000100")
    (checkpoints / "step-00000100" / "plans").rename(tmp_path / "run" / "plans")
    assert run(monkeypatch, "info", str(tmp_path / "run"), "--json") == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["file"] == str(tmp_path / "run" / "plans" / "tuned-3.json")


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("digitz", 2, "did you mean 'digits'"),
        ("empty", 1, "is not a model"),
        ("file", 1, "is not a model"),
        ("broken", 1, "cannot read"),
    ],
)
def test_info_on_what_is_no_model_is_one_line(
    tmp_path, monkeypatch, capsys, name, status, message
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("x", encoding="utf-8")
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{", encoding="utf-8")
    assert run(monkeypatch, "info", name) == status
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0


# ---- export ----------------------------------------------------------------------------------


def test_export_prints_json_and_notes_apart(tiny, monkeypatch, capsys):
    file = keep(tiny, "unipc.json", None, "unipc")
    for program in ("comfyui", "diffusers"):
        assert run(monkeypatch, "export", str(file), "--to", program) == 0
        told = capsys.readouterr()
        data = json.loads(told.out)
        assert data["program"] == program
        assert told.err.count("Note: ") == len(data["notes"]) > 0
    searched = str(tiny / "plans" / "tuned-3.json")
    assert run(monkeypatch, "export", searched, "--to", "k-diffusion") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["function"] == "sample_euler" and data["sigmas"] == pytest.approx(RATIOS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.json", "--to", "comfyui"], "cannot read a plan from 'missing.json'"),
        (["garbage.json", "--to", "comfyui"], "not JSON"),
        (["noisy.json", "--to", "comfyui"], "draws noise"),
        (["heun.json", "--to", "diffusers"], "no sampler that makes the picture"),
        (["heun.json", "--to", "comfy"], "comfyui"),
    ],
)
def test_export_of_what_cannot_be_is_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("garbage.json").write_text("garbage", encoding="utf-8")
    for name, sampler in (("noisy", "euler_ancestral"), ("heun", "heun")):
        plan: Any = fs.plan(sampler, fs.Grid.from_ratios(VP, RATIOS))
        plan.to_json(f"{name}.json")
    assert run(monkeypatch, "export", *words) == 2
    told = capsys.readouterr()
    assert message in told.err and "Traceback" not in told.err and not told.out
