from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import logging
import math
from unittest import mock

import pytest
import torch

import fewstep.checkpoints
from fewstep.checkpoints import load_tensors
from fewstep.data import ImageSet, read_metadata
from fewstep.errors import CheckpointError, DataError, InvalidInputError
from fewstep.models import checkpoints_of, load
from fewstep.training import Trainer, gradients, run
from fewstep.training.log import Log

FILES = ("model.safetensors", "raw.safetensors", "optimiser.safetensors")


def train(config, folder, images, steps=None):
    """Run to the end, or stop after so many steps."""
    count = itertools.count(1)
    stop = (lambda: False) if steps is None else (lambda: next(count) >= steps)
    return list(run(config, folder, images=images, device="cpu", stop=stop))


def assert_same_checkpoint(one, two):
    for file in FILES:
        first, second = load_tensors(one / file), load_tensors(two / file)
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), f"{file}: {name}"


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": 1},
        {"parts": 2},
        {"network_options": {"dropout": 0.3}},
        {
            "horizontal_flip": True,
            "label_dropout": 0.5,
            "process": {"name": "flow"},
            "predicts": "flow",
        },
        {"precision": "bfloat16"},
        {"augment": 0.5, "held_out": 0.2, "sample_every": 3},
    ],
    ids=str,
)
def test_resumed_run_is_bit_identical(images, make_config, tmp_path, changes):
    config = make_config(**changes)
    straight = train(config, tmp_path / "straight", images)
    first = train(config, tmp_path / "resumed", images, steps=2)
    second = train(config, tmp_path / "resumed", images, steps=3)
    third = train(config, tmp_path / "resumed", images)
    assert [fact.step for fact in first + second + third] == list(range(1, 8))
    assert [f.loss for f in first + second + third] == [f.loss for f in straight]
    assert_same_checkpoint(
        checkpoints_of(tmp_path / "straight")[-1], checkpoints_of(tmp_path / "resumed")[-1]
    )


def test_raised_steps_equal_a_longer_run(images, make_config, tmp_path):
    train(make_config(steps=4, decay="constant"), tmp_path / "raised", images)
    train(make_config(steps=7, decay="constant"), tmp_path / "raised", images)
    train(make_config(steps=7, decay="constant"), tmp_path / "long", images)
    assert_same_checkpoint(
        checkpoints_of(tmp_path / "raised")[-1], checkpoints_of(tmp_path / "long")[-1]
    )


def test_steps_tell_completed_facts(images, make_config, tmp_path):
    """What a step announces is on the disk when it is announced."""
    facts = []
    for fact in run(make_config(), tmp_path, images=images, device="cpu"):
        facts.append(fact)
        last = list(Log(tmp_path / "log.jsonl").entries())[-1]
        assert last["step"] == fact.step
        if fact.checkpoint is not None:
            assert fact.checkpoint.is_dir()
            record = json.loads((fact.checkpoint / "config.json").read_text())["training"]
            assert record["step"] == fact.step
            assert record["random"]["seed"] == 0
            assert record["settings"] == make_config().to_dict()
    assert [fact.step for fact in facts] == [1, 2, 3, 4, 5, 6, 7]
    assert [fact.checkpoint is not None for fact in facts] == [
        False, False, True, False, False, True, True,
    ]  # fmt: skip
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-00000006", "step-00000007"]


def test_losses_are_averaged_between_lines(images, make_config, tmp_path):
    each = [f.loss for f in train(make_config(), tmp_path / "one", images)]
    every_two = train(make_config(log_every=2, checkpoint_every=99), tmp_path / "two", images)
    assert [fact.step for fact in every_two] == [2, 4, 6, 7]
    means = [sum(each[0:2]) / 2, sum(each[2:4]) / 2, sum(each[4:6]) / 2, each[6]]
    assert [fact.loss for fact in every_two] == pytest.approx(means)


def test_the_loss_falls(images, make_config, tmp_path):
    config = make_config(steps=60, batch_size=20, log_every=10, checkpoint_every=100)
    losses = [fact.loss for fact in train(config, tmp_path, images)]
    assert losses[-1] < 0.6 * losses[0]


def test_log_has_each_step_once_after_a_resume(images, make_config, tmp_path):
    config = make_config()
    facts = run(config, tmp_path, images=images, device="cpu")
    for fact in facts:
        if fact.step == 5:
            break
    facts.close()  # what a kill leaves behind: lines of steps 4 and 5, the checkpoint of step 3
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    train(config, tmp_path, images)
    steps = [entry["step"] for entry in Log(tmp_path / "log.jsonl").entries()]
    assert steps == [1, 2, 3, 4, 5, 6, 7]


def test_a_batch_is_cut_unless_the_network_is_large_for_it(images, make_config, tmp_path):
    def parts(**settings):
        trainer = Trainer(make_config(**settings), tmp_path, images=images, device="cpu")
        return trainer._gradients.parts

    weights = sum(
        parameter.numel()
        for parameter in Trainer(
            make_config(), tmp_path, images=images, device="cpu"
        ).state.network.parameters()
    )
    with mock.patch.object(gradients, "MOST_WEIGHTS", weights / 16):
        assert parts(batch_size=16) == 2
        assert parts(batch_size=15) == parts(batch_size=30, accumulate=2) == 1
        assert parts(batch_size=15, parts=3) == 3


def test_parts_give_the_same_gradient(images, make_config, tmp_path):
    def gradients(parts):
        trainer = Trainer(make_config(parts=parts), tmp_path, images=images, device="cpu")
        batch = trainer._batches[0]
        with trainer._gradients:
            loss = trainer._gradients(batch)
        return loss, [p.grad.clone() for p in trainer.state.network.parameters()]

    loss, reference = gradients(1)
    for parts in (2, 3):
        other_loss, other = gradients(parts)
        torch.testing.assert_close(other_loss, loss)
        for a, b in zip(other, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_threads_are_given_back(images, make_config, tmp_path):
    before = torch.get_num_threads()
    facts = run(make_config(), tmp_path, images=images, device="cpu")
    next(facts)
    facts.close()
    assert torch.get_num_threads() == before


def test_other_settings_are_refused_by_name(images, make_config, tmp_path):
    train(make_config(), tmp_path, images, steps=1)
    with pytest.raises(
        InvalidInputError, match=r"learning_rate: 0.01 before, 0.02 now.*--force.*another folder"
    ):
        train(make_config(learning_rate=0.02), tmp_path, images)


def test_other_images_are_refused(images, make_config, tmp_path):
    train(make_config(), tmp_path, images, steps=1)
    other = dataclasses.replace(images, images=images.images.flip(0))
    with pytest.raises(InvalidInputError, match="not those"):
        train(make_config(), tmp_path, other)


def test_a_finished_run_has_nothing_to_do(images, make_config, tmp_path):
    train(make_config(), tmp_path, images)
    assert Trainer(make_config(), tmp_path, images=images, device="cpu").is_complete
    assert train(make_config(), tmp_path, images) == []


def test_the_network_of_the_checkpoint_counts_not_the_preset(
    images, make_config, tmp_path, monkeypatch
):
    train(make_config(), tmp_path, images, steps=2)
    before = type(make_config()).network_config

    def renewed(self, channels, num_classes):
        return before(self, channels, num_classes).replace(channels=(16, 8))

    monkeypatch.setattr(type(make_config()), "network_config", renewed)
    train(make_config(), tmp_path, images)
    assert load(tmp_path).config.network.channels == (8, 8)


@pytest.mark.parametrize("file", [*FILES, "config.json"])
def test_a_damaged_checkpoint_is_passed_over(images, make_config, tmp_path, caplog, file):
    train(make_config(), tmp_path / "straight", images)
    train(make_config(), tmp_path / "damaged", images)
    newest = checkpoints_of(tmp_path / "damaged")[-1] / file
    newest.write_bytes(newest.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        facts = train(make_config(), tmp_path / "damaged", images)
    assert str(newest) in caplog.text
    assert [fact.step for fact in facts] == [7]  # once more, from the checkpoint of step 6
    assert_same_checkpoint(
        checkpoints_of(tmp_path / "straight")[-1], checkpoints_of(tmp_path / "damaged")[-1]
    )


def test_when_no_checkpoint_can_be_read_nothing_is_overwritten(images, make_config, tmp_path):
    train(make_config(), tmp_path, images)
    for path in checkpoints_of(tmp_path):
        (path / "raw.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"raw\.safetensors.*another folder"):
        train(make_config(), tmp_path, images)
    assert len(checkpoints_of(tmp_path)) == 2


def test_a_full_disk_leaves_the_last_checkpoint(images, make_config, tmp_path, monkeypatch):
    facts = run(make_config(), tmp_path, images=images, device="cpu")
    for fact in facts:
        if fact.checkpoint is not None:
            break

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fewstep.checkpoints, "save_file", full)
        with pytest.raises(CheckpointError, match="No space left"):
            list(facts)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert [fact.step for fact in train(make_config(), tmp_path, images)] == [4, 5, 6, 7]


def test_a_folder_that_cannot_be_made(images, make_config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file"):
        train(make_config(), tmp_path / "file" / "run", images)


def test_two_runs_cannot_share_a_folder(images, make_config, tmp_path):
    facts = run(make_config(), tmp_path, images=images, device="cpu")
    next(facts)
    with pytest.raises(CheckpointError, match="another process"):
        train(make_config(), tmp_path, images)
    assert len(list(facts)) == 6


def test_images_that_cannot_be_trained_on(images, make_config, tmp_path):
    flat = ImageSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match="identical"):
        train(make_config(), tmp_path, flat)
    odd = dataclasses.replace(images, images=images.images[..., :7, :7])
    with pytest.raises(InvalidInputError, match="7x7.*multiples of 2"):
        train(make_config(), tmp_path, odd)
    assert list(tmp_path.iterdir()) == []


def test_images_of_another_kind_are_refused(images, make_config, tmp_path):
    with pytest.raises(DataError, match=r"images are a Tensor; give a fewstep\.data\.ImageSet"):
        Trainer(make_config(), tmp_path / "run", images=images.images)
    with pytest.raises(DataError, match="labels are a list"):
        ImageSet(images.images, labels=[0] * 20, class_names=("a",))


def test_images_without_labels(images, make_config, tmp_path):
    plain = ImageSet(images.images, source="plain")
    train(make_config(sample_every=7), tmp_path, plain)
    assert load(tmp_path).num_classes == 0


def test_overfitting_one_batch_saves_nothing(images, make_config, tmp_path):
    trainer = Trainer(make_config(), tmp_path / "run", images=images, device="cpu", resume=False)
    losses = [fact.loss for fact in trainer.overfit(80)]
    assert losses[-1] < 0.5 * losses[0]
    assert not (tmp_path / "run").exists()


def test_previews_show_raw_and_averaged_weights(images, make_config, tmp_path):
    quiet = train(make_config(), tmp_path / "quiet", images)
    facts = train(make_config(sample_every=4), tmp_path / "shown", images)
    assert [f.step for f in facts if f.preview] == [4, 7]
    sheets = sorted((tmp_path / "shown" / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-00000004.png", "step-00000007.png"]
    assert read_metadata(sheets[0])["step"] == 4
    assert [f.loss for f in facts] == [f.loss for f in quiet]  # looking does not change the run


def test_pixelwise_loss_uses_the_variance_of_the_data(images, make_config, tmp_path):
    trainer = Trainer(make_config(), tmp_path, images=images, device="cpu")
    x = images.images.double() / 127.5 - 1
    variance = x.var(0, correction=0)
    times = torch.arange(1000, dtype=torch.float64)
    a, s = (f(times)[:, None] for f in (trainer.process.alpha, trainer.process.sigma))
    v = variance.reshape(1, -1)
    assert math.isclose(trainer.pixelwise_loss, float((a**2 * v / (a**2 * v + s**2)).mean()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from its compiler
def test_a_compiled_network_learns_the_same_and_is_saved_under_the_same_names(
    images, make_config, tmp_path
):
    """Compiling takes most of a minute and rounds differently, so losses are near and not equal."""
    losses = {}
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        config = make_config(compile=compiled, steps=3, sample_every=3)
        losses[compiled] = [fact.loss for fact in run(config, folder, images=images)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    names = [
        set(load_tensors(checkpoints_of(tmp_path / str(compiled))[-1] / "raw.safetensors"))
        for compiled in (False, True)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("error", [DataError("no space"), torch.OutOfMemoryError("no memory")])
@pytest.mark.parametrize("look", ["save_preview", "held_out_error", "Ruler"])
def test_a_look_that_fails_does_not_end_a_run(
    images, make_config, tmp_path, monkeypatch, caplog, look, error
):
    def fail(*_args, **_kwargs):
        raise error

    config = make_config(sample_every=2, measure_every=2, measure_images=4, held_out=0.2)
    *_, whole = list(run(config, tmp_path / "whole", images=images))
    monkeypatch.setattr(f"fewstep.training.trainer.{look}", fail)
    *_, last = list(run(config, tmp_path / "run", images=images))
    assert last.checkpoint is not None and last.loss == whole.loss
    assert f"step 7: no {NAMES[look]}: {error}" in caplog.text
    saved = {"save_preview": last.preview, "held_out_error": last.held_out}
    assert saved.get(look, last.measurement) is None


NAMES = {
    "save_preview": "samples",
    "held_out_error": "error on held-out images",
    "Ruler": "distance",
}


def test_a_fault_in_a_look_is_not_hidden(images, make_config, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("fewstep.training.trainer.save_preview", fail)
    with pytest.raises(RuntimeError, match="of ours"):
        list(run(make_config(sample_every=2), tmp_path / "run", images=images))


def test_averages_can_be_added_to_a_run_and_taken_away(images, make_config, tmp_path):
    list(run(make_config(), tmp_path / "run", images=images))
    more = make_config(steps=9, ema_more=(0.9,), ema_widths=(0.1,))
    trainer = Trainer(more, tmp_path / "run", images=images, force=True)
    assert trainer.state.step == 7
    for network in trainer.state.more.values():  # they start from the main average
        for own, main in zip(
            network.parameters(), trainer.state.average.parameters(), strict=True
        ):
            assert torch.equal(own, main)
    list(trainer.steps())
    held = load_tensors(checkpoints_of(tmp_path / "run")[-1] / "ema-0.9.safetensors")
    again = Trainer(
        more.__class__.from_dict({**more.to_dict(), "steps": 11}), tmp_path / "run", images=images
    )
    assert all(
        torch.equal(weight, held[name])
        for name, weight in again.state.more["ema-0.9"].state_dict().items()
    )
    list(run(make_config(steps=11), tmp_path / "run", images=images, force=True))
    assert not (checkpoints_of(tmp_path / "run")[-1] / "ema-0.9.safetensors").exists()


def test_a_lost_average_is_a_damaged_checkpoint(images, make_config, tmp_path, caplog):
    config = make_config(ema_more=(0.9,))
    list(run(config, tmp_path / "run", images=images))
    (checkpoints_of(tmp_path / "run")[-1] / "ema-0.9.safetensors").unlink()
    assert Trainer(config, tmp_path / "run", images=images).state.step == 6
    assert "ema-0.9.safetensors does not exist" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"learning_rate": "fast"}, "learning_rate = 'fast'"), ({"of_later": 1}, "'of_later'")],
)
def test_settings_that_cannot_be_understood_are_named_with_their_file(
    images, make_config, tmp_path, changes, words
):
    list(run(make_config(), tmp_path / "run", images=images))
    for checkpoint in checkpoints_of(tmp_path / "run"):
        content = json.loads((checkpoint / "config.json").read_text())
        content["training"]["settings"].update(changes)
        (checkpoint / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        Trainer(make_config(), tmp_path / "run", images=images)
    assert "step-00000007/config.json cannot be used" in str(caught.value)
    assert words in str(caught.value) and "another version of Fewstep" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("in_channels", 4),
        ("out_channels", 2),
        ("num_classes", 5),
        ("context_width", 8),
        ("augment_width", 9),
    ],
)
def test_what_the_images_decide_cannot_be_set_otherwise(
    images, make_config, tmp_path, option, value
):
    config = make_config(network_options={option: value})
    with pytest.raises(InvalidInputError, match=f"{option} = {value} in network_options"):
        Trainer(config, tmp_path / "run", images=images)
    assert not (tmp_path / "run").exists()
