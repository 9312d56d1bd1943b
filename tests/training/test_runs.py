"""What a run tells: TensorBoard, measured distances, the list of runs; what it says when something is in the way."""

from __future__ import annotations

import builtins
import dataclasses
import json
import math
import sys
import threading

import pytest
import torch

import fewstep.training.memory as memory
from command_line import run as command
from fewstep.checkpoints import load_tensors, only_writer
from fewstep.cli.train import _try_one_batch
from fewstep.data import ImageSet, load_images
from fewstep.errors import InvalidInputError, MemoryLimitError
from fewstep.metrics import frechet_distance
from fewstep.models import checkpoints_of
from fewstep.training import Trainer, run
from fewstep.training.measuring import Ruler, pixel_components
from fewstep.training.runs import find_runs


def train(config, folder, images, **more):
    return list(run(config, folder, images=images, device="cpu", **more))


def points(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    scalars = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    return scalars, [event.step for event in events.Images("samples")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_what_the_log_says_without_doubled_points(images, make_config, tmp_path):
    config = make_config(tensorboard=True, sample_every=4)
    facts = run(config, tmp_path, images=images, device="cpu")
    for fact in facts:
        if fact.step == 5:
            break
    facts.close()  # as a kill: points of steps 4 and 5, the checkpoint of step 3
    train(config, tmp_path, images)
    scalars, sheets = points(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "learning_rate", "gradient_norm", "skipped"):
        assert [step for step, _ in scalars[name]] == list(range(1, 8))
        assert [value for _, value in scalars[name]] == pytest.approx([e[name] for e in lines])
    assert sheets == [4, 7]


def test_tensorboard_that_is_missing_is_one_line(images, make_config, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    find = builtins.__import__

    def missing(name, *rest):
        if "tensorboard" in name:
            raise ImportError(name)
        return find(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InvalidInputError, match=r"pip install 'fewstep\[train\]'"):
        Trainer(make_config(tensorboard=True), tmp_path, images=images)


def test_components_are_those_of_the_covariance(images):
    rows = images.images.flatten(1).double() / 127.5 - 1
    values = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0)).flip(0)[:19]
    read = pixel_components(images)(images.images)
    variances = read.var(0, correction=0).flip(0)[:19]
    torch.testing.assert_close(variances, values / values.sum())
    assert float(read.mean(0).abs().max()) < 1e-9


def test_distance_of_data_is_the_floor_and_of_noise_far_more(images):
    ruler = Ruler(images, 20, "training images")
    assert ruler.name == "pixel PCA"
    assert ruler._floor < 1e-9
    noise = torch.randint(0, 256, images.images.shape, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(ruler.features(noise.byte()), ruler._target) > 0.05


def test_digits_are_read_and_other_grey_pictures_are_not():
    digits = load_images("mnist-1000")
    assert Ruler(digits, 50, "them").name == "digit classifier"
    assert digits.labels is not None
    scrambled = dataclasses.replace(digits, labels=digits.labels.flip(0))
    assert Ruler(scrambled, 50, "them").name == "pixel PCA"


def test_measuring_is_logged_and_does_not_change_the_run(images, make_config, tmp_path):
    quiet = train(make_config(), tmp_path / "quiet", images)
    config = make_config(measure_every=3, measure_images=6)
    facts = train(config, tmp_path / "measured", images)
    assert [f.loss for f in facts] == [f.loss for f in quiet]
    assert [f.step for f in facts if f.measurement] == [3, 6, 7]
    lines = [json.loads(x) for x in (tmp_path / "measured/log.jsonl").read_text().splitlines()]
    assert lines[2]["distance"] > lines[2]["distance_floor"] >= 0
    assert lines[2]["distance_in"] == "pixel PCA"
    assert lines[2]["distance_to"] == "6 samples to 20 training images"
    assert "distance" not in lines[3]


def test_distances_go_to_held_out_images_where_there_are_some(images, make_config, tmp_path):
    config = make_config(measure_every=7, measure_images=6, held_out=0.25)
    trainer = Trainer(config, tmp_path, images=images, device="cpu")
    measured = list(trainer.steps())[-1].measurement
    assert measured is not None and measured.reference == "5 held-out images"
    ruler = Ruler(images.subset(trainer.held_out_rows), 6, "held-out images")
    assert measured == ruler.measure(trainer.state.average, trainer.model)


def test_runs_are_found_whatever_else_lies_there(
    images, make_config, tmp_path, monkeypatch, capsys
):
    train(
        make_config(measure_every=7, measure_images=4, sample_every=7),
        tmp_path / "a/whole",
        images,
    )
    train(make_config(), tmp_path / "cut", images, stop=lambda: True)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/training.json").write_text('{"settings": ')
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/training.json").write_text('{"settings": {"steps": "many"}, "data": 3}')
    (tmp_path / "bare/log.jsonl").write_text('{"step": 3, "loss": null}\n{"st')
    (tmp_path / "foreign/samples").mkdir(parents=True)
    (tmp_path / "cut/log.jsonl").unlink()
    (tmp_path / "cut/log.jsonl").mkdir()  # like any log that cannot be read
    found = {run.name: run for run in find_runs(tmp_path)}
    assert {name: run.state for name, run in found.items()} == {
        "a/whole": "complete", "bare": "stopped", "cut": "stopped", "half": "unreadable",
    }  # fmt: skip
    whole = found["a/whole"]
    assert (whole.step, whole.steps, whole.data, whole.network) == (7, 7, "halves", "small")
    assert whole.loss and whole.distance and whole.images_per_second and whole.written
    assert whole.sheet == str(tmp_path / "a/whole/samples/step-00000007.png")
    assert found["cut"].step == 1
    with only_writer(tmp_path / "cut"):
        assert find_runs(tmp_path / "cut")[0].state == "running"
    assert command(monkeypatch, "runs", str(tmp_path), "--json", "--sort", "step") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)][:2] == ["a/whole", "cut"]
    assert command(monkeypatch, "runs", str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "7/7" in output and f"a/whole: {whole.sheet}" in output
    assert command(monkeypatch, "runs", str(tmp_path), "--sort", "los") == 2
    assert command(monkeypatch, "runs", str(tmp_path / "nothing")) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_force_goes_on_under_new_settings_and_lists_them(images, make_config, tmp_path):
    train(make_config(), tmp_path, images, stop=lambda: True)
    other = dataclasses.replace(images, images=images.images.flip(-1))
    config = make_config(learning_rate=0.02, predicts="velocity")
    with pytest.raises(
        InvalidInputError, match=r"predicts: 'noise' before, 'velocity' now.*images"
    ):
        train(config, tmp_path, other)
    trainer = Trainer(config, tmp_path, images=other, device="cpu", force=True)
    assert trainer.state.step == 1
    assert [change.partition(":")[0] for change in trainer.changes] == [
        "predicts", "learning_rate", "images",
    ]  # fmt: skip
    assert [fact.step for fact in trainer.steps()] == [2, 3, 4, 5, 6, 7]
    assert Trainer(config, tmp_path, images=other, device="cpu").changes == []


def test_force_cannot_change_the_shape_of_the_network(images, make_config, tmp_path):
    train(make_config(), tmp_path, images, stop=lambda: True)
    wider = make_config(network_options={"channels": [8, 16]})
    with pytest.raises(InvalidInputError, match=r"another shape \(channels.*--start-from"):
        Trainer(wider, tmp_path, images=images, device="cpu", force=True)


def test_start_from_takes_the_averaged_weights(images, make_config, tmp_path):
    train(make_config(), tmp_path / "first", images)
    config = make_config(start_from=str(tmp_path / "first"), seed=5)
    trainer = Trainer(config, tmp_path / "second", images=images, device="cpu")
    average = load_tensors(checkpoints_of(tmp_path / "first")[-1] / "model.safetensors")
    for network in (trainer.state.network, trainer.state.average):
        assert all(torch.equal(w, average[name]) for name, w in network.state_dict().items())
    assert trainer.state.step == 0
    assert not [finding for finding in trainer.findings if "fit" in finding.message]


def test_start_from_says_what_does_not_fit(images, make_config, tmp_path):
    train(make_config(), tmp_path / "first", images)
    source = str(tmp_path / "first")
    plain = ImageSet(images.images)
    config = make_config(start_from=source, predicts="velocity")
    trainer = Trainer(config, tmp_path / "x", images=plain, device="cpu")
    assert any("predicts noise on vp_linear" in f.message for f in trainer.findings)
    three = dataclasses.replace(images, class_names=("left", "right", "none"))
    trainer = Trainer(make_config(start_from=source), tmp_path / "x", images=three, device="cpu")
    message = next(f.message for f in trainer.findings if "do not fit" in f.message)
    assert "(3, " in message and "(4, " in message
    wider = make_config(start_from=source, network_options={"channels": [16, 16]})
    with pytest.raises(InvalidInputError, match=r"channels: .*there.*here"):
        Trainer(wider, tmp_path / "x", images=images, device="cpu")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError()],
    ids=["allocator", "python"],
)
def test_too_little_memory_names_a_batch_that_fits(
    images, make_config, tmp_path, monkeypatch, error
):
    sound = Trainer._loss

    def loss(self, batch):
        if len(batch.x0) > 3:
            raise error
        return sound(self, batch)

    monkeypatch.setattr(Trainer, "_loss", loss)
    trainer = Trainer(make_config(parts=1, batch_size=16), tmp_path, images=images, device="cpu")
    one = trainer._batches[0].split(16)[0]
    each = memory.saved_bytes(trainer.state.network, trainer._loss, one)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 * each)
    with pytest.raises(MemoryLimitError, match="a batch of 16 images.*give --batch-size 8"):
        next(trainer.steps())
    assert checkpoints_of(tmp_path) == []


@pytest.mark.global_rng
def test_saved_bytes_are_counted_without_the_weights():
    """`(w x)^2`: the product needs x for w's gradient, the square its input; the weights need no room of their own."""
    network = torch.nn.Linear(4, 1, bias=False)
    x = torch.ones(6, 4)
    counted = memory.saved_bytes(network, lambda _: network(x).square().mean(), None)  # pyright: ignore
    assert counted == 4 * (6 * 4 + 6)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    images, make_config, tmp_path, monkeypatch
):
    def loss(self, batch):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Trainer, "_loss", loss)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(make_config(), tmp_path, images)


def test_batches_made_ahead_are_the_same_and_their_thread_ends(images, make_config, tmp_path):
    trainer = Trainer(make_config(augment=0.5), tmp_path, images=images, device="cpu")
    with trainer._ahead as ahead:
        made = [ahead[k] for k in (0, 1, 2, 5, 6)]
    for k, batch in zip((0, 1, 2, 5, 6), made, strict=True):
        for a, b in zip(batch, trainer._batches[k], strict=True):
            assert torch.equal(a, b)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_a_loss_that_is_not_finite_does_not_pass_for_overfitting(
    images, make_config, tmp_path, monkeypatch
):
    sound = Trainer._loss
    monkeypatch.setattr(Trainer, "_loss", lambda self, batch: sound(self, batch) * math.nan)
    trainer = Trainer(make_config(), tmp_path, images=images, device="cpu", resume=False)
    with pytest.raises(BaseException) as end:
        _try_one_batch(trainer, 3)
    assert getattr(end.value, "exit_code", None) == 1
