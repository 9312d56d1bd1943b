"""Training on several workers, which are processes of their own here, is training on one."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import run as run_here
from fewstep.checkpoints import load_tensors
from fewstep.errors import InvalidInputError
from fewstep.models import checkpoints_of
from fewstep.training import Trainer
from fewstep.training.preparation import require_shares
from launch import launch, start, workers_of

WINDOWS = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="workers are found in /proc")
# AdamW moves a weight whose true gradient is zero, such as a bias before a normalisation, by the sign of a rounding
# error; the learning rate keeps that below the tolerance, while ten steps move weights by a thousand times as much.
ARGUMENTS = [
    "--network-options",
    '{"channels": [8, 8], "blocks": 1, "attention": [], "group_width": 4, "head_width": 8}',
    *("--batch-size", "7", "--warmup-steps", "2", "--learning-rate", "0.001", "--horizontal-flip"),
    *("--precision", "float32", "--decay", "constant", "--log-every", "1", "--device", "cpu"),
]


@pytest.fixture
def data(images, tmp_path) -> str:
    path = tmp_path / "halves.npz"
    np.savez(path, images=images.images.numpy(), labels=images.labels.numpy())
    return str(path)


def losses_of(folder: Path) -> list[float]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


def assert_equal_runs(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(losses_of(one), losses_of(other), rtol=0, atol=tolerance)
    for file in ("model.safetensors", "raw.safetensors"):
        first, second = (load_tensors(checkpoints_of(run)[-1] / file) for run in (one, other))
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


def trained(workers: int, data: str, folder: Path, *words: object) -> str:
    status, output, errors = launch(workers, "train", data, "--out", folder, *ARGUMENTS, *words)
    assert status == 0, errors
    return output


def test_two_workers_then_three_follow_the_curve_of_one(data, tmp_path, monkeypatch):
    """Uneven shares of 7 images: 4 + 3, then 3 + 2 + 2; the checkpoint of two is gone on with by three."""
    words = ["--steps", "10", "--sample-every", "0", "--out", str(tmp_path / "one")]
    assert run_here(monkeypatch, "train", data, *ARGUMENTS, *words) == 0
    many = tmp_path / "many"
    told = trained(2, data, many, "--steps", 6, "--sample-every", 6)
    assert told.count("2 workers") == told.count("samples in") == told.count("Done.") == 1
    told = trained(3, data, many, "--steps", 10, "--sample-every", 6)
    assert "Going on after step 6 of 10" in told
    assert_equal_runs(tmp_path / "one", many)
    assert sorted(p.name for p in (many / "samples").iterdir()) == [
        "step-00000006.png",
        "step-00000010.png",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_so_many_workers_follow_the_curve_of_one(data, tmp_path, workers):
    words = ("--steps", 12, "--sample-every", 0, "--accumulate", 2, "--label-dropout", 0.5)
    trained(1, data, tmp_path / "one", *words)
    trained(workers, data, tmp_path / "many", *words)
    assert_equal_runs(tmp_path / "one", tmp_path / "many")


@WINDOWS
@LINUX
def test_a_signal_to_one_worker_saves_once_and_ends_all(data, tmp_path):
    folder = tmp_path / "run"
    words = [
        *ARGUMENTS,
        "--steps",
        "100000",
        "--sample-every",
        "0",
        "--checkpoint-every",
        "100000",
    ]
    with start(2, "train", data, "--out", folder, *words) as launcher:
        try:
            wait_for(lambda: (folder / "log.jsonl").exists() and losses_of_any(folder) > 2)
            os.kill(workers_of(launcher.pid)[1], signal.SIGTERM)
            output, errors = launcher.communicate(timeout=240)
        finally:
            launcher.kill()
    assert launcher.returncode != 0
    assert output.count("a checkpoint is saved") == 1 and "Traceback" not in output
    (checkpoint,) = checkpoints_of(folder)
    record = json.loads((checkpoint / "config.json").read_text())["training"]
    assert record["step"] == len(losses_of(folder))


@pytest.mark.slow
@LINUX
def test_a_worker_that_dies_ends_all_with_a_message(data, tmp_path):
    folder = tmp_path / "run"
    words = [*ARGUMENTS, "--steps", "100000", "--sample-every", "0", "--checkpoint-every", "5"]
    with start(2, "train", data, "--out", folder, *words) as launcher:
        try:
            wait_for(lambda: bool(checkpoints_of(folder)))
            os.kill(workers_of(launcher.pid)[1], signal.SIGKILL)
            launcher.communicate(timeout=240)
        finally:
            launcher.kill()
    assert launcher.returncode != 0
    reached = int(checkpoints_of(folder)[-1].name.removeprefix("step-"))
    trained(1, data, folder, "--steps", reached + 2, "--sample-every", 0)


@pytest.mark.slow
def test_a_nan_ends_all_workers_with_the_step(data, tmp_path):
    words = [*ARGUMENTS, "--steps", "150", "--learning-rate", "1e30", "--gradient-clip", "0"]
    status, _, errors = launch(2, "train", data, "--out", tmp_path / "run", *words)
    assert status != 0
    assert "fewstep (worker 0): up to step 100" in errors
    assert "fewstep (worker 1): up to step 100" in errors


def test_more_workers_than_images_in_a_batch():
    require_shares(3, 3)
    with pytest.raises(InvalidInputError, match="4 workers; launch at most 3"):
        require_shares(3, 4)


@pytest.mark.parametrize("accumulate", [2, 3, 20])
def test_a_batch_in_pieces_gives_the_same_gradient(images, make_config, tmp_path, accumulate):
    def gradients(**changes):
        config = make_config(batch_size=7, **changes)
        trainer = Trainer(config, tmp_path, images=images, device="cpu")
        # A new network answers 0; after a step its gradients are all there.
        list(trainer.overfit(1))
        largest = []
        own = trainer._gradients.loss_of
        trainer._gradients.loss_of = lambda batch: largest.append(len(batch.x0)) or own(batch)
        loss = trainer._gradients(trainer._batches[1])
        return loss, [p.grad.clone() for p in trainer.state.network.parameters()], max(largest)

    loss, reference, whole = gradients(parts=1)
    other_loss, other, piece = gradients(parts=1, accumulate=accumulate)
    assert (whole, piece) == (7, -(-7 // accumulate))
    torch.testing.assert_close(other_loss, loss)
    for a, b in zip(other, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def losses_of_any(folder: Path) -> int:
    return (folder / "log.jsonl").read_text().count("\n")


def wait_for(condition, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the workers did not get so far"
        time.sleep(0.05)
