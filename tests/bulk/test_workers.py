"""Many pictures by several workers, one of which is killed."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from folders import files_of
from launch import launch, start, workers_of
from tiny_model import tiny_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are found in /proc")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(shape=(1, 8, 8)).save(folder)
    return str(folder)


def words(model: str, n: int) -> list[object]:
    return ["sample", model, "--images", n, "--steps", 4, "--shard-size", 8, "--sampler", "ddpm"]


def killed_then_completed(model: str, tmp_path, first: int, then: int, n: int = 640) -> None:
    import fewstep as fs

    folder = tmp_path / f"{first}-{then}"
    with start(first, *words(model, n), "--out", f"{folder}/") as launcher:
        try:
            end = time.monotonic() + 240
            while len(list(folder.glob("*.npz"))) < 5:
                assert time.monotonic() < end and launcher.poll() is None
                time.sleep(0.005)
            os.kill(workers_of(launcher.pid)[-1], signal.SIGKILL)
            launcher.communicate(timeout=240)
        finally:
            launcher.kill()
    assert 5 <= len(list(folder.glob("*.npz"))) < n // 8
    status, output, errors = launch(then, *words(model, n), "--out", f"{folder}/")
    assert status == 0, errors
    assert f"{n} images" in output
    fs.sample_many(fs.load(model), n, tmp_path / "one", steps=4, sampler="ddpm", shard_size=8)
    assert files_of(folder) == files_of(tmp_path / "one")


def test_a_killed_worker_costs_nothing_but_time(tiny, tmp_path):
    killed_then_completed(tiny, tmp_path, first=3, then=2)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 3), (2, 1), (3, 3)])
def test_whatever_the_numbers_of_workers(tiny, tmp_path, first, then):
    killed_then_completed(tiny, tmp_path, first, then)
