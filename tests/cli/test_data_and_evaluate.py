"""`fewstep data` and `fewstep evaluate`, run as a user does; and what `train` says of its images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import run
from fewstep.cli.evaluate import BOUND_LEVELS
from fewstep.data import load_images
from fewstep.models import load
from fewstep.training import Trainer, TrainingConfig, variational_bound
from tiny_model import tiny_model

NETWORK = {"channels": [8, 8], "blocks": 1, "attention": [], "group_width": 4, "head_width": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty pictures of two classes, some captions, and four files that are no pictures."""
    generator = np.random.default_rng(0)
    for k in range(40):
        place = tmp_path / "photos" / ("cat" if k % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(place / f"{k:02d}.png")
    (tmp_path / "photos/cat/01.txt").write_text("a cat that sits")
    for k in range(4):
        (tmp_path / f"photos/dog/broken{k}.png").write_text("no picture")
    return tmp_path / "photos"


def test_report(folder, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "data", str(folder), "--out", str(tmp_path / "a.npz")) == 0
    said = capsys.readouterr()
    assert "40 images of 8x8, grey" in said.out and "2 classes: cat 20, dog 20" in said.out
    assert "1 captions, such as 'a cat that sits'" in said.out
    assert "39 of 40 images have no caption" in said.out and "4 files could not" in said.out
    assert said.err.count("skipped dog/broken") == 3
    again = load_images(tmp_path / "a.npz")
    assert again.digest == load_images(folder).digest and again.captions.count(None) == 39
    assert run(monkeypatch, "data", str(folder), "--out", str(tmp_path / "a.png")) == 0
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 10 * 64 and 2 * 64 < sheet.height < 3 * 64


@pytest.mark.parametrize(
    ("labels", "names"), [([-1, 0, 1], None), ([0, 1, 2], ["a", "b"]), ([-5, -5, -5], None)]
)
def test_labels_out_of_range_are_reported(tmp_path, monkeypatch, capsys, labels, names):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    given = {} if names is None else {"class_names": names}
    np.savez(tmp_path / "a.npz", images=images, labels=labels, **given)
    assert run(monkeypatch, "data", str(tmp_path / "a.npz")) == 1
    assert "labels lie outside" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/empty"], "no images in"),
        (["{}/photos", "--out", "x.txt"], "let the name end in .npz"),
        (["{}/photos", "--labels", "{}/bad.csv"], "does not match: 44 of 44 images"),
        (["{}/broken.tar"], "is cut short or damaged"),
        (["{}/photos", "--cache", "{}/bad.csv/x"], "cannot write the cache"),
        (["{}/photos", "--channels", "4"], "channels is 4"),
    ],
    ids=["empty", "ending", "labels", "tar", "cache", "channels"],
)
def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("file_name,label\nx.png,1\n")
    (tmp_path / "broken.tar").write_bytes(b"broken" * 200)
    assert run(monkeypatch, "data", *[word.format(tmp_path) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("fewstep: ") and message in said.err
    assert said.err.count("\n") == 1


def test_one_image_is_an_error_of_training(tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("L", (8, 8), 9).save(photos / "a.png")
    assert run(monkeypatch, "train", str(photos), "--out", str(tmp_path / "run")) == 2
    assert "training needs 2 or more" in capsys.readouterr().err
    assert run(monkeypatch, "data", str(photos)) == 1
    assert "Error: 1 images" in capsys.readouterr().out


def train(monkeypatch, folder, out, *words):
    settings = ["--batch-size", "4", "--steps", "2", "--precision", "float32", "--device", "cpu"]
    network = ["--network-options", json.dumps(NETWORK)]
    return run(monkeypatch, "train", str(folder), "--out", str(out), *settings, *network, *words)


def test_train_reports_and_lists_skipped_files(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    words = ("--held-out", "0.25", "--augment", "0.2", "--sample-every", "2")
    assert train(monkeypatch, folder, out, *words) == 0
    said = capsys.readouterr()
    assert "1 captions (not used in training)" in said.out
    assert "10 of the images are kept from training" in said.out
    assert "on images kept from training" in said.out
    assert f"all 4 of them: {out}/skipped.txt" in said.err
    lines = (out / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"dog/broken{k}.png" for k in range(4)]


def test_evaluate_uses_the_images_that_the_run_kept_away(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert train(monkeypatch, folder, out, "--held-out", "0.25", "--sample-every", "0") == 0
    capsys.readouterr()
    words = ("--data", str(folder), "--n", "12", "--steps", "3", "--levels", "4")
    results = tmp_path / "results"
    assert run(monkeypatch, "evaluate", str(out), *words, "--out", str(results)) == 0
    said = capsys.readouterr().out
    assert "10 images of each kind" in said and "pixel PCA" in said
    record = json.loads((results / "evaluation.json").read_text())
    assert record["images"] == 10 and record["copies"]["share of held-out images"] == 0
    losses = record["losses"]
    assert len(losses["training"]) == len(losses["held out"]) == 4
    assert losses["training"] != losses["held out"]
    assert record["distance"]["samples"] > record["distance"]["real images"] > 0
    with Image.open(results / "neighbours.png") as sheet:
        assert sheet.width > 64 * 10
    # The same figures as from the library, on the split of the run.
    config = TrainingConfig(data=str(folder), network_options=NETWORK, held_out=0.25)
    trainer = Trainer(config, tmp_path / "other", device="cpu")
    assert len(trainer.rows) == 30 and len(trainer.held_out_rows) == 10


def test_evaluate_digits(tmp_path, monkeypatch, capsys):
    words = ("--data", "mnist-1000", "--n", "2", "--steps", "1", "--levels", "1")
    assert run(monkeypatch, "evaluate", "digits", *words, "--out", str(tmp_path)) == 0
    assert "in digit classifier features" in capsys.readouterr().out
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(record["losses"]) == ["training"]
    x0, labels = load_images("mnist-1000").batch([0, 999])
    bound = variational_bound(load("digits"), x0, levels=BOUND_LEVELS, seed=0, labels=labels)
    assert record["bits per dimension"] == {"training": pytest.approx(bound.total, rel=1e-5)}


@pytest.mark.global_rng  # building a network draws its weights
def test_evaluate_refuses_other_shapes(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "a.npz", images=torch.zeros(3, 1, 4, 8).byte().numpy())
    model = tmp_path / "model"
    tiny_model(shape=(1, 4, 12)).save(model)
    words = ("--data", str(tmp_path / "a.npz"), "--out", str(tmp_path))
    assert run(monkeypatch, "evaluate", str(model), *words) == 2
    assert "8x4, the model's 12x4" in capsys.readouterr().err


def test_a_file_where_results_should_go_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    words = ("--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "file/results"))
    assert run(monkeypatch, "evaluate", "digits", *words) == 1
    assert "file is a file, but a folder is needed there" in capsys.readouterr().err
