"""SIGKILL at any moment, also within the writing of a checkpoint: nothing is half-written, nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.checkpoints import load_tensors
from fewstep.models import checkpoints_of, load
from fewstep.training import TrainingConfig, run

TINY = {"channels": [8, 8], "blocks": 1, "attention": [], "group_width": 4, "head_width": 8}
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")

SETTINGS = {
    "network_options": TINY,
    "batch_size": 8,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
    "precision": "float32",
    "decay": "constant",
    "checkpoint_every": 2,
    "sample_every": 0,
    "log_every": 1,
    "parts": 1,
}

CHILD = """
import json, os, signal, sys
import fewstep.checkpoints as checkpoints
from fewstep.training import TrainingConfig, run

data, folder, steps, hook = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
place, _, count = hook.partition(":")
calls = 0

def dying(function):
    def call(*arguments):
        global calls
        calls += 1
        last = calls == int(count)
        if last and place == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if place in ("save_file", "save_json", "_flush", "_rename_over"):
    setattr(checkpoints, place, dying(getattr(checkpoints, place)))
if place == "before":
    checkpoints._rename_over = dying(checkpoints._rename_over)
config = TrainingConfig(data=data, steps=steps, **json.loads(sys.argv[5]))
print("ready", flush=True)
for fact in run(config, folder, device="cpu"):
    pass
"""


@pytest.fixture
def data(images, tmp_path) -> str:
    path = tmp_path / "halves.npz"
    np.savez(path, images=images.images.numpy(), labels=images.labels.numpy())
    return str(path)


def start(data: str, folder: Path, steps: int, hook: str = "none") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, data, str(folder), str(steps), hook]
    command.append(json.dumps(SETTINGS))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_complete(folder: Path) -> int:
    """Every checkpoint that can be seen is whole; returns the newest step."""
    newest = 0
    for path in checkpoints_of(folder):
        for weights in ("ema", "raw"):
            load(path, weights=weights)
        load_tensors(path / "optimiser.safetensors")
        newest = json.loads((path / "config.json").read_text())["training"]["step"]
        assert path.name == f"step-{newest:08d}"
    return newest


def assert_same_end(one: Path, two: Path) -> None:
    for file in ("model.safetensors", "raw.safetensors", "optimiser.safetensors"):
        first, second = (load_tensors(checkpoints_of(run)[-1] / file) for run in (one, two))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    texts = [(run / "log.jsonl").read_text() for run in (one, two)]
    logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [line["step"] for line in logs[0]] == list(range(1, len(logs[1]) + 1))
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


def kill_at_random(data: str, folder: Path, steps: int, kills: int, seed: int) -> None:
    """Kill so often, each time after a random while past the start, then let the run end."""
    moments = random.Random(seed)
    reached = 0
    for _ in range(kills):
        process = start(data, folder, steps)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.0, 0.6))
        process.kill()
        output, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"{output}{errors}"
        step = assert_complete(folder)
        assert step >= reached
        reached = step
    assert reached < steps


def finish(data: str, folder: Path, steps: int) -> None:
    for _ in run(TrainingConfig(data=data, steps=steps, **SETTINGS), folder, device="cpu"):
        pass


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param("save_file:5", id="between-two-files", marks=pytest.mark.slow),
        pytest.param("before:2", id="before-the-rename"),
        pytest.param("_flush:8", id="while-flushing", marks=pytest.mark.slow),
        pytest.param("_rename_over:2", id="after-the-rename", marks=pytest.mark.slow),
    ],
)
def test_kill_within_the_writing_of_a_checkpoint(data, tmp_path, hook):
    process = start(data, tmp_path / "killed", 6, hook)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    assert assert_complete(tmp_path / "killed") == (4 if hook == "_rename_over:2" else 2)
    finish(data, tmp_path / "killed", 6)
    finish(data, tmp_path / "straight", 6)
    assert_same_end(tmp_path / "killed", tmp_path / "straight")


def test_a_few_kills_at_random(data, tmp_path):
    kill_at_random(data, tmp_path / "killed", 4000, kills=2, seed=1)
    steps = assert_complete(tmp_path / "killed") + 4
    finish(data, tmp_path / "killed", steps)
    finish(data, tmp_path / "straight", steps)
    assert_same_end(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.slow
def test_thirty_kills_at_random(data, tmp_path):
    kill_at_random(data, tmp_path / "killed", 4000, kills=30, seed=2)
    steps = assert_complete(tmp_path / "killed") + 4
    finish(data, tmp_path / "killed", steps)
    finish(data, tmp_path / "straight", steps)
    assert_same_end(tmp_path / "killed", tmp_path / "straight")
