"""Several workers of one training run: one decodes the images, and all read what it left on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import launch

ARGUMENTS = [
    "--network-options",
    '{"channels": [8, 8], "blocks": 1, "attention": [], "group_width": 4, "head_width": 8}',
    *(
        "--batch-size",
        "4",
        "--steps",
        "1",
        "--sample-every",
        "0",
        "--device",
        "cpu",
        "--size",
        "8",
    ),
]

SCRIPT = """
import sys, time
from pathlib import Path
from fewstep.data import load_images
from fewstep.team import join, leave

data, cache, seen = map(Path, sys.argv[1:])
group = join("cpu")

def load():
    told = []
    images = load_images(data, cache=cache, on_progress=lambda what, *_: told.append(what))
    with seen.open("a") as file:
        file.write(f"{group.rank} {'decoding' in told} {images.digest} {len(list(cache.iterdir()))}\\n")
    time.sleep(0.5 if group.is_main else 0)

group.first_on_machine(load)
leave()
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for k in range(300):
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{k}.png")
    return folder


def test_the_first_worker_decodes_and_the_second_finds_the_cache(
    data: Path, tmp_path: Path
) -> None:
    script, seen = tmp_path / "script.py", tmp_path / "seen"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, script, data, tmp_path / "cache", seen],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    first, second = map(str.split, seen.read_text().splitlines())
    assert first[:2] == ["0", "True"] and second[:2] == ["1", "False"]
    assert first[2:] == second[2:] and first[3] == "1"


def test_two_workers_train_on_one_cache(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    words = [*ARGUMENTS, "--cache", cache, "--out", tmp_path / "run"]
    status, output, errors = launch(2, "train", data, *words)
    assert status == 0, errors
    assert "2 workers" in output and len(list(cache.iterdir())) == 1


def test_images_that_cannot_be_used_end_all_workers_with_one_message(
    data: Path, tmp_path: Path
) -> None:
    for path in data.iterdir():
        path.write_text("no picture")
    words = [*ARGUMENTS, "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    status, _, errors = launch(2, "train", data, *words)
    assert status != 0
    assert errors.count("none of the 300 images") == 1
    assert errors.count("another worker could not go on") <= 1  # the launcher may end it first
    assert list((tmp_path / "cache").iterdir()) == []
