"""Many pictures in shards: the files follow from the numbers alone."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep as fs
from command_line import run
from fewstep.bulk import formats, making
from fewstep.errors import DataError, InvalidInputError, UnknownNameError
from fewstep.team import Team
from folders import files_of
from tiny_model import tiny_model

HOW = {"steps": 2, "shard_size": 4}


@pytest.fixture(scope="module")
def model():
    return tiny_model(shape=(1, 8, 8))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(shape=(1, 8, 8)).save(folder)
    return str(folder)


def images_of(folder: Path) -> dict[str, np.ndarray]:
    shards = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    return {
        name: np.concatenate([shard[name] for shard in shards])
        for name in ("images", "labels", "seeds")
    }


def test_a_picture_is_the_one_of_its_seed_and_its_label(model, tmp_path):
    shards = fs.sample_many(model, 10, tmp_path, seed=5, **HOW)
    assert (len(shards), list(shards.missing())) == (3, [])
    assert sorted(files_of(tmp_path)) == ["00000.npz", "00001.npz", "00002.npz", "shards.json"]
    made = images_of(tmp_path)
    assert made["seeds"].tolist() == list(range(5, 15))
    assert made["labels"].tolist() == [k % 3 for k in range(10)]
    assert made["images"].shape == (10, 8, 8, 1) and made["images"].dtype == np.uint8
    for k in (0, 3, 9):
        alone = fs.sample(model, seed=5 + k, labels=k % 3, steps=2).uint8()[0]
        assert np.array_equal(made["images"][k], alone.permute(1, 2, 0).numpy())


def test_a_shard_is_a_data_set(model, tmp_path):
    fs.sample_many(model, 6, tmp_path, **HOW)
    read = fs.data.load_images(tmp_path / "00001.npz")
    assert (read.shape, read.class_names) == ((1, 8, 8), ("ant", "bee", "cat"))
    assert read.labels is not None and read.labels.tolist() == [1, 2]


@pytest.mark.parametrize("format", formats.FORMATS)
def test_files_are_the_same_whoever_makes_them(model, tmp_path, format, monkeypatch):
    fs.sample_many(model, 11, tmp_path / "one", format=format, **HOW)
    moments = itertools.count(2_000_000_000)
    monkeypatch.setattr("time.time", lambda: float(next(moments)))
    for rank in (2, 0, 1):
        fs.sample_many(model, 11, tmp_path / "three", format=format, team=Team(rank, 3), **HOW)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")


@pytest.mark.parametrize("format", formats.FORMATS)
def test_stopped_anywhere_it_goes_on_to_the_same_files(model, tmp_path, format):
    fs.sample_many(model, 11, tmp_path / "whole", format=format, **HOW)
    for batches in (1, 2, 2, 9):
        count = itertools.count(1)
        fs.sample_many(
            model,
            11,
            tmp_path / "cut",
            format=format,
            batch_size=8,
            stop=lambda count=count, batches=batches: next(count) > batches,
            **HOW,
        )
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("format", formats.FORMATS)
def test_a_larger_n_extends_the_folder(model, tmp_path, format):
    fs.sample_many(model, 13, tmp_path / "whole", format=format, **HOW)
    for n in (1, 6, 13):
        fs.sample_many(model, n, tmp_path / "grown", format=format, **HOW)
    assert files_of(tmp_path / "grown") == files_of(tmp_path / "whole")
    with pytest.raises(InvalidInputError, match="begun for 13 pictures"):
        fs.sample_many(model, 12, tmp_path / "grown", format=format, **HOW)


def test_complete_shards_are_not_made_again_and_broken_ones_are(model, tmp_path):
    fs.sample_many(model, 12, tmp_path, **HOW)
    before = files_of(tmp_path)
    (tmp_path / "00001.npz").write_bytes(before["00001.npz"][:100])
    (tmp_path / ".tmp-00001.npz").write_bytes(b"left by a kill")
    made = []
    fs.sample_many(model, 12, tmp_path, on_batch=made.append, **HOW)
    assert sum(made) == 4
    assert files_of(tmp_path) == before


def test_tar_has_the_layout_of_webdataset(model, tmp_path):
    fs.sample_many(model, 5, tmp_path, seed=3, format="tar", **HOW)
    with tarfile.open(tmp_path / "00001.tar") as archive:
        names = archive.getnames()
        facts, label = (archive.extractfile(name).read() for name in (names[2], names[1]))
    assert names == ["000004.png", "000004.cls", "000004.json"]
    assert json.loads(facts) == {"number": 4, "seed": 7, "label": 1} and label == b"1"


def test_png_files_carry_their_record(model, tmp_path):
    fs.sample_many(model, 5, tmp_path, seed=3, format="png", **HOW)
    record = fs.data.read_metadata(tmp_path / "00001" / "000004.png")
    assert (record["seeds"], record["labels"]) == ([7], [1])


@pytest.mark.parametrize(
    "sampler", ["ddpm", "dpm_adaptive", "euler_ancestral", "restart", "supreme"]
)
def test_samplers_of_every_kind_give_the_picture_of_the_seed(model, tmp_path, sampler):
    how = {"sampler": sampler, "steps": 3}
    fs.sample_many(model, 3, tmp_path, shard_size=2, labels=1, **how)
    alone = fs.sample(model, seed=2, labels=1, **how).uint8()[0]
    assert np.array_equal(images_of(tmp_path)["images"][2], alone.permute(1, 2, 0).numpy())


def test_a_batch_must_not_share_the_steps_of_an_adaptive_sampler(model, tmp_path):
    with pytest.raises(InvalidInputError, match="leave batch_size out"):
        fs.sample_many(model, 3, tmp_path, sampler="dpm_adaptive", batch_size=2)


def test_labels(model, tmp_path):
    fs.sample_many(model, 5, tmp_path / "two", labels=[2, 0], **HOW)
    assert images_of(tmp_path / "two")["labels"].tolist() == [2, 0, 2, 0, 2]
    fs.sample_many(model, 2, tmp_path / "none", labels=None, **HOW)
    assert sorted(np.load(tmp_path / "none" / "00000.npz").files) == ["images", "seeds"]
    for labels in (3, [], "bee"):
        with pytest.raises(InvalidInputError, match="label"):
            fs.sample_many(model, 2, tmp_path / "bad", labels=labels, **HOW)


def test_other_settings_are_refused_by_name(model, tmp_path):
    fs.sample_many(model, 2, tmp_path, **HOW)
    before = files_of(tmp_path)
    with pytest.raises(InvalidInputError) as error:
        fs.sample_many(model, 2, tmp_path, seed=1, guidance=2.0, steps=2, shard_size=8)
    for words in ("seed: 1, not 0", "guidance: 2.0, not 1.0", "shard_size: 8, not 4"):
        assert words in str(error.value)
    further = copy.deepcopy(model)
    with torch.no_grad():
        next(further.network.parameters()).add_(1e-3)
    with pytest.raises(InvalidInputError, match=r"model\.digest"):
        fs.sample_many(further, 2, tmp_path, **HOW)
    assert files_of(tmp_path) == before


def test_a_folder_of_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"me")
    with pytest.raises(InvalidInputError, match=r"holiday\.jpg but no shards\.json"):
        fs.sample_many(model, 2, tmp_path, **HOW)
    assert files_of(tmp_path) == {"holiday.jpg": b"me"}
    (tmp_path / "shards.json").write_text('{"format": "other"}')
    with pytest.raises(InvalidInputError, match="not an index of shards"):
        fs.sample_many(model, 2, tmp_path, **HOW)


def test_a_full_disk_is_said_and_keeps_what_is_complete(model, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    fs.sample_many(model, 4, tmp_path, **HOW)
    before = files_of(tmp_path)["00000.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(formats.os, "fsync", full)
        with pytest.raises(DataError, match="No space left on device"):
            fs.sample_many(model, 8, tmp_path, **HOW)
    assert sorted(files_of(tmp_path)) == ["00000.npz", "shards.json"]
    assert files_of(tmp_path)["00000.npz"] == before


def test_numbers_and_names_out_of_range(model, tmp_path):
    for changes in ({"n": 0}, {"shard_size": 0}, {"batch_size": -1}, {"n": 2.5}):
        arguments = {"n": 2, **changes}
        with pytest.raises(InvalidInputError, match=next(iter(changes))):
            fs.sample_many(model, folder=tmp_path / "new", **arguments)
    with pytest.raises(UnknownNameError, match="did you mean 'npz'"):
        fs.sample_many(model, 2, tmp_path / "new", format="nps")
    points = fs.exact.GaussianMixture(torch.zeros(1, 2), 1.0, process=fs.process.vp_linear())
    with pytest.raises(InvalidInputError, match="use fewstep"):
        fs.sample_many(points, 2, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command(tiny, tmp_path, monkeypatch, capsys):
    words = ["sample", tiny, "--steps", "2", "--out", str(tmp_path / "shards")]
    assert run(monkeypatch, *words, "--n", "3", "--label", "cat") == 0
    assert "3 images with dpmpp_2m/trailing" in capsys.readouterr().out
    assert images_of(tmp_path / "shards")["labels"].tolist() == [2, 2, 2]
    assert run(monkeypatch, *words, "--n", "3") == 2
    assert "labels: [0, 1, 2], not [2]" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--n", "0") == 2
    assert run(monkeypatch, *words[:-1], str(tmp_path / "x.png"), "--format", "tar") == 2
    assert "need a folder" in capsys.readouterr().err


def test_the_command_says_how_to_go_on(tiny, tmp_path, monkeypatch, capsys):
    whole = making.sample

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return whole(*arguments, **options)

    words = [
        "sample",
        tiny,
        "--steps",
        "2",
        "--out",
        str(tmp_path / "s"),
        "--n",
        "5",
        "--shard-size",
        "2",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(making, "sample", interrupted)
        assert run(monkeypatch, *words) == 130
    told = capsys.readouterr()
    assert "Stopping after this batch" in told.err
    assert "0 of 3 shards" in told.out and f"fewstep sample {tiny}" in told.out
    assert run(monkeypatch, *words) == 0
    assert len(images_of(tmp_path / "s")["seeds"]) == 5
