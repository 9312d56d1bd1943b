"""The command line as a user meets it: exit codes, files, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep as fs
from command_line import run
from fewstep.data import read_metadata
from tiny_model import tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a class-conditional model of 8x8 pictures."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(shape=(1, 8, 8)).save(folder)
    return str(folder)


def test_sample_writes_a_picture_with_its_settings(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "grid.png"
    words = ["--n", "3", "--label", "bee", "--steps", "4", "--seed", "5", "--out", str(out)]
    assert run(monkeypatch, "sample", tiny, *words) == 0
    settings = read_metadata(out)
    assert settings["seeds"] == [5, 6, 7]
    assert settings["labels"] == [1, 1, 1]
    assert settings["network_calls"] == 4
    assert "4 network calls" in capsys.readouterr().out


def test_sample_writes_single_files_that_equal_the_seed_alone(tiny, tmp_path, monkeypatch):
    common = ["--steps", "3", "--format", "png", "--label", "none"]
    words = [*common, "--n", "3", "--out", f"{tmp_path}/all/"]
    assert run(monkeypatch, "sample", tiny, *words) == 0
    words = [*common, "--seed", "2", "--out", f"{tmp_path}/one/"]
    assert run(monkeypatch, "sample", tiny, *words) == 0
    third, alone = (
        np.asarray(Image.open(tmp_path / name))
        for name in ("all/00000/000002.png", "one/00000/000000.png")
    )
    assert np.array_equal(third, alone)
    assert read_metadata(tmp_path / "all/00000/000002.png")["seeds"] == [2]


def test_hand_written_levels_are_run_as_given_and_recorded(tiny, tmp_path, monkeypatch):
    out = tmp_path / "x.png"
    assert run(monkeypatch, "sample", tiny, "--sigmas", "80,5,0.25,0", "--out", str(out)) == 0
    assert read_metadata(out)["sigma_over_alpha"] == pytest.approx([80, 5, 0.25, 0], rel=1e-14)
    assert run(monkeypatch, "sample", tiny, "--times", "900,300.5", "--out", str(out)) == 0
    assert read_metadata(out)["times"] == [900, 300.5, -1]


def test_options_of_sampler_and_scheduler_reach_the_plan(tiny, tmp_path, monkeypatch):
    out = tmp_path / "x.png"
    words = ["--sampler", "DDIM", "--sampler-option", "eta=0.5", "--scheduler", "karras"]
    words += ["--scheduler-option", "rho=5", "--steps", "3", "--label", "0,2", "--guidance", "2"]
    assert run(monkeypatch, "sample", tiny, *words, "--out", str(out)) == 0
    settings = read_metadata(out)
    assert settings["sampler_options"] == {"eta": 0.5}
    assert settings["scheduler_options"] == {"rho": 5.0, "tail": "zero"}
    assert (settings["labels"], settings["guidance"]) == ([0, 2], 2.0)


def test_a_sampler_that_chooses_its_steps_says_how_many_calls(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.png"
    words = ["--sampler", "dpm_adaptive", "--n", "2", "--steps", "4", "--out", str(out)]
    assert run(monkeypatch, "sample", tiny, *words) == 0
    calls = read_metadata(out)["network_calls"]
    low, high = min(calls), max(calls)
    shown = str(low) if low == high else f"{low} to {high}"
    assert f" {shown} network calls each: " in capsys.readouterr().out
    limit = ["--sampler-option", "max_calls=4"]
    assert run(monkeypatch, "sample", tiny, *words, *limit) == 1
    assert "after 4 network calls" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampler", "amed", "--sampler-option", "predictor=f"], "'f' is not a function"),
        (["--sampler", "dpm_solver_v3"], "make them with fewstep statistics MODEL"),
        (["--sampler", "dpmp_2m"], "did you mean 'dpmpp_2m'"),
        (["--scheduler", "karas"], "did you mean 'karras'"),
        (["--sampler", "ddim", "--sampler-option", "etta=1"], "did you mean 'eta'"),
        (["--sampler", "ddim", "--sampler-option", "eta=-1"], "number in 0..10"),
        (["--sampler", "ddim", "--sampler-option", "eta"], "write name=value"),
        (["--scheduler", "gits", "--scheduler-option", "coefficient=3"], "a number in 0.8..1.5"),
        (["--label", "9"], "classes 0..2"),
        (["--label", "dog"], "label 'dog'"),
        (["--guidance", "3"], "needs labels"),
        (["--sigmas", "1,2,0"], "fall strictly"),
        (["--sigmas", "1,x"], "sigma 'x'"),
        (["--sigmas", "1,0", "--times", "5"], "not both"),
        (["--times", "1200,5"], "outside"),
        (["--weights", "raw"], "no raw weights"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(
    tiny, tmp_path, monkeypatch, capsys, words, message
):
    out = tmp_path / "never.png"
    status = run(monkeypatch, "sample", tiny, *words, "--out", str(out))
    error = capsys.readouterr().err
    assert status == (1 if words[0] == "--weights" else 2)
    assert message in error
    assert error.strip().count("\n") == 0
    assert not out.exists()


def test_unknown_model_names_the_bundled_ones(monkeypatch, capsys):
    assert run(monkeypatch, "sample", "digitz") == 2
    assert "did you mean 'digits'" in capsys.readouterr().err


def test_truncated_weights_are_named(tiny, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(tiny).iterdir():
        (broken / file.name).write_bytes(
            file.read_bytes()[: 200 if "safetensors" in file.name else None]
        )
    assert run(monkeypatch, "sample", str(broken)) == 1
    assert "model.safetensors" in capsys.readouterr().err


def test_steps_below_one_are_refused(tiny, monkeypatch, capsys):
    assert run(monkeypatch, "sample", tiny, "--steps", "0") == 2
    assert "steps" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["samplers", "schedulers"])
def test_listings_come_from_the_registry(monkeypatch, capsys, command):
    registry = getattr(fs, command)
    entries = registry.SAMPLERS if command == "samplers" else registry.SCHEDULERS
    assert run(monkeypatch, command, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == entries.names()
    assert [len(row["options"]) for row in rows] == [len(entry.options) for entry in entries]
    assert run(monkeypatch, command) == 0
    assert all(name[:8] in capsys.readouterr().out for name in entries.names()[:1])
    assert run(monkeypatch, command, rows[0]["name"]) == 0
    assert rows[0]["paper"] in capsys.readouterr().out
    assert run(monkeypatch, command, "no such thing") == 0
    assert "No entry" in capsys.readouterr().out


def listed(monkeypatch, capsys, *words: str) -> list[dict]:
    assert run(monkeypatch, "samplers", "--json", *words) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_the_json_of_samplers_tells_everything(monkeypatch, capsys):
    rows = {row["name"]: row for row in listed(monkeypatch, capsys)}
    for entry in fs.samplers.SAMPLERS:
        row = rows[entry.name]
        assert row["presets"] == {name: dict(given) for name, given in entry.presets.items()}
        assert (row["mistake"], row["corrected_order"]) == (entry.mistake, entry.corrected_order)
        assert (row["family"], row["order"], row["needs"]) == (
            entry.family,
            entry.order,
            list(entry.needs),
        )
        assert [o["name"] for o in row["options"]] == [o.name for o in entry.options]
    order, variant, lower = rows["unipc"]["options"][:3]
    assert (order["type"], order["low"], order["high"]) == ("int", 1, 6)
    assert (variant["type"], variant["choices"]) == ("str", ["bh1", "bh2"])
    assert (lower["type"], lower["default"]) == ("bool", True)


def test_samplers_are_filtered(monkeypatch, capsys):
    every = {e.name: e for e in fs.samplers.SAMPLERS}

    def names(*words: str) -> set[str]:
        return {row["name"] for row in listed(monkeypatch, capsys, *words)}

    assert names("--family", "sde") == {n for n, e in every.items() if e.family == "SDE"}
    assert names("--order", "2") == {n for n, e in every.items() if e.order == 2}
    assert names("--stochastic") == {n for n, e in every.items() if e.stochastic}
    assert names("--deterministic") == {n for n, e in every.items() if not e.stochastic}
    assert names("--deterministic", "--order", "2", "heun") >= {"heun"}
    assert names("--order", "99") == set()


def test_the_table_of_samplers_shows_metadata_and_presets(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "samplers") == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if " dpmpp_2m " in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["dpmpp_2m", "DPM++ 2M", "ODE", "2", "1", "no", ""]
    assert all(any(entry.name in line for line in lines) for entry in fs.samplers.SAMPLERS)
    entry, (preset, given) = next(
        (e, item) for e in fs.samplers.SAMPLERS for item in e.presets.items()
    )
    values = " ".join(f"{name}={value}" for name, value in given.items())
    assert f"{preset} = {entry.name} {values}" in lines
    assert run(monkeypatch, "samplers", preset) == 0
    assert f"preset {preset} = {entry.name}" in capsys.readouterr().out


def test_an_unknown_family_is_refused_with_all_there_are(monkeypatch, capsys):
    assert run(monkeypatch, "samplers", "--family", "OD") == 2
    error = capsys.readouterr().err
    assert "unknown family 'OD'" in error
    assert "ODE, SDE, adaptive, distilled, implicit, momentum" in error


def test_a_mistake_is_told_in_the_details(monkeypatch, capsys):
    for entry in fs.samplers.SAMPLERS:
        if entry.mistake:
            assert run(monkeypatch, "samplers", entry.name) == 0
            assert f"mistake: {entry.mistake}" in capsys.readouterr().out


def test_doctor_names_versions_and_devices(monkeypatch, capsys):
    assert run(monkeypatch, "doctor") == 0
    text = capsys.readouterr().out
    assert fs.__version__ in text
    assert torch.__version__.split("+")[0] in text


def test_version_and_help(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == f"fewstep {fs.__version__}"
    assert run(monkeypatch, "--help") == 0
    assert all(name in capsys.readouterr().out for name in ("train",))
