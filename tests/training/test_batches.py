from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.training.batches import Batches
from fewstep.training.randomness import BatchOrder, generator, seed_of


def _batches(images, config) -> Batches:
    return Batches(images, config.objective(), config, torch.device("cpu"))


def test_a_batch_depends_on_seed_and_step_alone(images, make_config):
    config = make_config(horizontal_flip=True, label_dropout=0.5, augment=0.5)
    forwards, backwards = _batches(images, config), _batches(images, config)
    first = [forwards[k] for k in range(6)]
    second = [backwards[k] for k in reversed(range(6))][::-1]
    for one, two in zip(first, second, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)


def test_steps_and_seeds_give_different_batches(images, make_config):
    one, two = _batches(images, make_config(seed=0)), _batches(images, make_config(seed=1))
    for a, b in ((one[0], one[1]), (one[0], two[0])):
        assert not torch.equal(a.noise, b.noise)
        assert not torch.equal(a.t, b.t)
        assert not torch.equal(a.x0, b.x0)


def test_purposes_do_not_share_their_numbers():
    draws = [torch.rand(4, generator=generator(0, name, 3)) for name in ("noise", "times")]
    assert not torch.equal(*draws)
    assert len({seed_of(s, p, k) for s in range(9) for p in "ab" for k in range(9)}) == 162


@given(count=st.integers(1, 12), batch_size=st.integers(1, 30), seed=st.integers(0, 99))
def test_every_epoch_shows_every_image_once(count, batch_size, seed):
    order = BatchOrder(count, batch_size, seed)
    batches = [order.batch(k) for k in range(2 + 3 * count // batch_size)]
    assert {len(batch) for batch in batches} == {batch_size}
    stream = torch.cat(batches)
    for epoch in range(len(stream) // count):
        shown = stream[epoch * count : (epoch + 1) * count]
        assert sorted(shown.tolist()) == list(range(count))


def test_epochs_are_shuffled_differently():
    order = BatchOrder(count=50, batch_size=50, seed=0)
    assert order.batch(0).tolist() != order.batch(1).tolist()


def test_flips_mirror_about_half_of_the_images(images, make_config):
    plain = _batches(images, make_config(batch_size=400))[0].x0
    flipped = _batches(images, make_config(batch_size=400, horizontal_flip=True))[0].x0
    mirrored = (flipped != plain).flatten(1).any(1)
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(-1))
    assert 160 < int(mirrored.sum()) < 240


def test_noise_is_standard_normal_and_images_lie_in_range(images, make_config):
    batch = _batches(images, make_config(batch_size=400))[0]
    assert abs(float(batch.noise.mean())) < 0.03
    assert abs(float(batch.noise.std()) - 1) < 0.03
    assert batch.x0.min() >= -1
    assert batch.x0.max() <= 1


def test_split_keeps_every_image_in_order(images, make_config):
    batch = _batches(images, make_config(batch_size=7, augment=0.5))[0]
    pieces = batch.split(3)
    assert [len(piece.x0) for piece in pieces] == [3, 2, 2]
    for whole, parts in zip(batch, zip(*pieces, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole)
    assert len(batch.split(100)) == 7


def test_split_without_labels(images, make_config):
    batch = _batches(images, make_config())[0]._replace(labels=None)
    assert [piece.labels for piece in batch.split(2)] == [None, None]


def test_the_shares_of_all_workers_make_up_the_batch(images, make_config):
    config = make_config(batch_size=7, horizontal_flip=True, augment=0.5, label_dropout=0.5)
    objective, device = config.objective(), torch.device("cpu")
    whole = Batches(images, objective, config, device)[3]
    shares = [Batches(images, objective, config, device, (k, 3))[3] for k in range(3)]
    assert [len(share.x0) for share in shares] == [3, 2, 2]
    for expected, parts in zip(whole, zip(*shares, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-6)
