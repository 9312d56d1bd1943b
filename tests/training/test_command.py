"""The command `fewstep train`, run in this process and in processes that are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep.cli.train as command
from fewstep.checkpoints import load_tensors
from fewstep.cli import main
from fewstep.models import checkpoints_of
from fewstep.training import trainer
from tiny_model import tiny_model

OPTIONS = {
    "channels": [8, 8],
    "blocks": 1,
    "attention": [],
    "group_width": 4,
    "head_width": 8,
}
ARGUMENTS = [
    *("--network-options", json.dumps(OPTIONS)),
    *("--batch-size", "8", "--warmup-steps", "2", "--learning-rate", "0.01"),
    *("--precision", "float32", "--sample-every", "0", "--checkpoint-every", "4"),
    *("--device", "cpu"),
]
NO_SIGNALS = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


@pytest.fixture
def data(images, tmp_path) -> str:
    path = tmp_path / "halves.npz"
    np.savez(path, images=images.images.numpy(), labels=images.labels.numpy())
    return str(path)


@pytest.fixture
def train(monkeypatch):
    """Run `fewstep train`; return the exit status."""

    def run(*arguments: object) -> int:
        line = ["fewstep", "train", *map(str, arguments[:1]), *ARGUMENTS, *map(str, arguments[1:])]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    return run


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_weights(one: Path, two: Path) -> None:
    for file in ("model.safetensors", "raw.safetensors", "optimiser.safetensors"):
        first, second = (load_tensors(checkpoints_of(run)[-1] / file) for run in (one, two))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_train_then_go_on(train, data, tmp_path, capsys):
    assert train(data, "--out", tmp_path / "run", "--steps", 6, "--sample-every", 6) == 0
    output = capsys.readouterr().out
    assert re.search(
        r"20 images of 8x8, 1 channel, 2 classes; network of [\d,]+ parameters", output
    )
    assert re.search(r"step 6/6  loss 0\.\d+  \d+ images/s  0:00:00 left", output)
    assert re.search(r"samples in .*step-00000006\.png", output)
    assert "still expected to be noise" in output
    assert train(data, "--out", tmp_path / "run", "--steps", 6, "--sample-every", 6) == 0
    assert "All 6 steps are done" in capsys.readouterr().out
    assert train(data, "--out", tmp_path / "run", "--steps", 8) == 0
    assert "Going on after step 6 of 8" in capsys.readouterr().out


def test_few_images_are_a_warning(train, data, tmp_path, capsys):
    assert train(data, "--out", tmp_path / "run", "--steps", 1) == 0
    assert "Warning: 20 images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning-rate", -1], "learning_rate = -1.0"),
        (["--network", "smal"], "did you mean 'small'"),
        (["--process", "vp_liner"], "did you mean 'vp_linear'"),
        (["--process", '{"name": "flow", "t_mim": 1}'], "t_min"),
        (["--network-options", "{"], "--network-options '{' is not JSON"),
        (["--network-options", "[1]"], "is not a JSON object"),
        (["--size", 7], "multiples of 2"),
        (["--device", "gpu"], "device 'gpu'"),
        (["--process", "flow"], "--predicts flow"),
        (["--network-options", '{"in_channels": 4}'], "in_channels = 4"),
    ],
)
def test_wrong_options_are_one_line(train, data, tmp_path, capsys, arguments, words):
    assert train(data, "--out", tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.global_rng
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("plain", "plain is a file, but a folder is needed there"),
        ("plain/a/b", "plain is a file, but a folder is needed there"),
        ("model", "--start-from"),
        ("photos", "give an --out outside it"),
        ("photos/runs/a", "give an --out outside it"),
    ],
)
def test_places_where_no_run_can_be_are_refused_before_images_are_loaded(
    train, tmp_path, capsys, monkeypatch, out, words
):
    def load(*_args, **_kwargs):
        pytest.fail("images were loaded")

    monkeypatch.setattr(trainer, "load_images", load)
    (tmp_path / "plain").write_text("")
    tiny_model().save(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert train(tmp_path / "photos", "--out", tmp_path / out) in (1, 2)
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_data(train, tmp_path, capsys):
    assert train(tmp_path / "nothing", "--out", tmp_path / "run") == 2
    assert "nothing" in capsys.readouterr().err


def test_overfit_reports_and_saves_nothing(train, data, tmp_path, capsys):
    assert train(data, "--out", tmp_path / "run", "--overfit", "--steps", 80) == 0
    assert "falls as it should" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_overfit_finds_a_loss_that_does_not_fall(train, data, tmp_path, capsys):
    arguments = ("--overfit", "--steps", 20, "--learning-rate", 1e-9)
    assert train(data, "--out", tmp_path / "run", *arguments) == 1
    assert "something does not fit" in capsys.readouterr().out


@NO_SIGNALS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_says_how_to_go_on(train, data, tmp_path, capsys, monkeypatch, number):
    before = signal.getsignal(number)
    once = iter([number])

    def interrupt(*_):
        for signal_number in once:
            os.kill(os.getpid(), signal_number)

    with monkeypatch.context() as patch:
        patch.setattr(command, "_report", interrupt)
        assert train(data, "--out", tmp_path / "cut", "--steps", 9) == 130
    assert signal.getsignal(number) == before
    output = capsys.readouterr().out
    assert f"fewstep train {data}" in output
    assert [path.name for path in checkpoints_of(tmp_path / "cut")] == [
        "step-00000004",
        "step-00000005",
    ]
    assert train(data, "--out", tmp_path / "cut", "--steps", 9) == 0
    assert train(data, "--out", tmp_path / "straight", "--steps", 9) == 0
    assert_same_weights(tmp_path / "cut", tmp_path / "straight")


KILLED = """
import os, signal, sys
import fewstep.checkpoints as checkpoints
from fewstep.cli import main

renames, save_file = 0, checkpoints.save_file

def save_then_die(tensors, path):
    global renames
    renames += 1
    save_file(tensors, path)
    if renames == 5:  # the second of the three files of the second checkpoint
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints.save_file = save_then_die
main()
"""


@NO_SIGNALS
def test_kill_while_a_checkpoint_is_written(train, data, tmp_path):
    arguments = ["train", data, *ARGUMENTS, "--out", str(tmp_path / "killed"), "--steps", "9"]
    result = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    names = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert [name.startswith(".tmp-") for name in names] == [True, False]
    assert names[1] == "step-00000004"
    assert train(data, "--out", tmp_path / "killed", "--steps", 9) == 0
    assert train(data, "--out", tmp_path / "straight", "--steps", 9) == 0
    assert_same_weights(tmp_path / "killed", tmp_path / "straight")
    assert steps_of(tmp_path / "killed") == [4, 8, 9]
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == ["step-00000008", "step-00000009"]


@NO_SIGNALS
def test_kill_at_any_moment(train, data, tmp_path):
    """SIGKILL from outside, while steps are running, wherever that happens to be."""
    steps = 5000  # far more than are done before the kill
    arguments = ["train", data, *ARGUMENTS, "--out", str(tmp_path / "killed")]
    arguments += ["--decay", "constant"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from fewstep.cli import main; main()",
            *arguments,
            "--steps",
            str(steps),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.kill()
    process.communicate()
    reached = int(checkpoints_of(tmp_path / "killed")[-1].name.removeprefix("step-"))
    assert 4 <= reached < steps
    end = ("--decay", "constant", "--steps", reached + 6)
    assert train(data, "--out", tmp_path / "killed", *end) == 0
    assert train(data, "--out", tmp_path / "straight", *end) == 0
    assert_same_weights(tmp_path / "killed", tmp_path / "straight")
