"""Steps whose loss or gradient is not finite: skipped, then a lower rate, then an end with a reason."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from fewstep.checkpoints import load_tensors
from fewstep.errors import InvalidInputError, NonFiniteError
from fewstep.models import checkpoints_of
from fewstep.training import Trainer, run
from fewstep.training.guard import HALVINGS, SKIPS, STRETCH, Guard, follow
from fewstep.training.log import Log


@pytest.fixture
def poison(monkeypatch):
    """Make the loss NaN in some steps, by a function of the step alone."""
    sound = Trainer._loss

    def make(is_poisoned, value=math.nan):
        def loss(self, batch):
            factor = value if is_poisoned(self.state.step) else 1.0
            return sound(self, batch) * factor

        monkeypatch.setattr(Trainer, "_loss", loss)

    return make


def train(config, folder, images, stop_after=None, **more):
    count = itertools.count(1)
    stop = (lambda: False) if stop_after is None else (lambda: next(count) >= stop_after)
    return list(run(config, folder, images=images, device="cpu", stop=stop, **more))


def tensors_of(folder):
    newest = checkpoints_of(folder)[-1]
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(newest.glob("*.safetensors"))
        for name, tensor in load_tensors(file).items()
    }


def assert_equal(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_skipped_step_changes_nothing_but_the_count(
    images, make_config, tmp_path, poison, value
):
    poison(lambda step: step == 4, value)
    config = make_config(steps=9, checkpoint_every=1)
    saved, facts = {}, {}
    for fact in run(config, tmp_path, images=images, device="cpu"):
        saved[fact.step], facts[fact.step] = tensors_of(tmp_path), fact
    assert_equal(saved[4], saved[5])
    assert not torch.equal(*(next(iter(saved[k].values())) for k in (5, 6)))
    assert [facts[k].skipped for k in (4, 5, 6)] == [0, 1, 0]
    assert math.isnan(facts[5].loss)
    lines = list(Log(tmp_path / "log.jsonl").entries())
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert lines[4]["loss"] is None


def test_the_first_step_may_be_skipped(images, make_config, tmp_path, poison):
    poison(lambda step: step == 0)
    train(make_config(steps=3), tmp_path, images)
    assert all(tensor.isfinite().all() for tensor in tensors_of(tmp_path).values())


@pytest.mark.parametrize("cut", [5, 6, 21, 30], ids=str)
def test_resuming_across_skips_and_a_halving_is_bit_exact(
    images, make_config, tmp_path, poison, cut
):
    poison(lambda step: step in (4, 5, 9, 25))
    config = make_config(steps=34, checkpoint_every=99, log_every=7)
    straight = train(config, tmp_path / "straight", images)
    train(config, tmp_path / "cut", images, stop_after=cut)
    train(config, tmp_path / "cut", images)
    assert_equal(tensors_of(tmp_path / "straight"), tensors_of(tmp_path / "cut"))
    record = json.loads((checkpoints_of(tmp_path / "cut")[-1] / "config.json").read_text())
    assert record["training"]["guard"] == {
        "halvings": 1, "skipped_before": 3, "skipped_in_stretch": 1,
    }  # fmt: skip
    assert sum(fact.skipped for fact in straight) == 4


def test_several_skips_halve_the_rate_from_the_end_of_their_stretch(
    images, make_config, tmp_path, poison
):
    poison(lambda step: step in range(6, 6 + SKIPS))
    config = make_config(steps=2 * STRETCH, decay="constant", checkpoint_every=99)
    rates = [fact.learning_rate for fact in train(config, tmp_path, images)]
    assert rates[2:STRETCH] == [1e-2] * (STRETCH - 2)
    assert rates[STRETCH:] == [0.5e-2] * STRETCH


def test_fewer_skips_leave_the_rate(images, make_config, tmp_path, poison):
    poison(lambda step: step in range(6, 6 + SKIPS - 1))
    config = make_config(steps=STRETCH + 1, decay="constant", checkpoint_every=99)
    assert train(config, tmp_path, images)[-1].learning_rate == 1e-2


def test_a_run_that_cannot_be_saved_ends_with_reason_and_sound_weights(
    images, make_config, tmp_path, poison
):
    poison(lambda step: step >= 2)
    config = make_config(steps=999, checkpoint_every=999, log_every=50)
    last = STRETCH * (HALVINGS + 1)
    with pytest.raises(NonFiniteError, match=rf"step {last}, {last - 2} steps.*lower learning"):
        train(config, tmp_path, images)
    assert [path.name for path in checkpoints_of(tmp_path)] == [f"step-{last:08d}"]
    assert all(tensor.isfinite().all() for tensor in tensors_of(tmp_path).values())
    with pytest.raises(NonFiniteError):  # at once, nothing has changed
        train(config, tmp_path, images)
    poison(lambda step: False)
    lower = make_config(steps=last + 3, learning_rate=1e-3, decay="constant", checkpoint_every=999)
    with pytest.raises(InvalidInputError, match="--force"):
        train(lower, tmp_path, images)
    assert train(lower, tmp_path, images, force=True)[-1].learning_rate == 1e-3


def test_following_without_a_wait_is_the_same(monkeypatch):
    """The way of accelerators, taken on the meta device's behalf: shares come from a tensor."""
    average, values = [torch.tensor([1.0, -2.0])], [torch.tensor([3.0, 6.0])]

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    for skip, expected in ((0.0, [1.5, 0.0]), (1.0, [1.5, 0.0])):
        follow(average, values, 0.25, torch.tensor(skip).as_subclass(Elsewhere))
        assert average[0].tolist() == expected


def test_a_loss_alone_or_a_norm_alone_is_enough():
    guard = Guard()
    one, nan = torch.tensor(1.0), torch.tensor(math.nan)
    judged = [float(guard.judge(*pair)) for pair in ((one, one), (nan, one), (one, nan))]
    assert judged == [0.0, 1.0, 1.0]
    assert guard.record()["skipped_in_stretch"] == 2
