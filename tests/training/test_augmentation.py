"""Augmentation against closed forms; images kept from training."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.data import ImageSet
from fewstep.errors import InvalidInputError
from fewstep.networks import DiTConfig, UNetConfig, build
from fewstep.training import Trainer
from fewstep.training.augmentation import apply_augmentations, draw_augmentations
from fewstep.training.held_out import split_rows
from fewstep.training.log import Log


def pictures(count: int = 3, channels: int = 2, height: int = 8, width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, channels, height, width, generator=generator) * 2 - 1


def numbers(count: int = 3, **changed: float) -> torch.Tensor:
    names = ("x", "y", "scale", "cos", "sin", "cos2", "sin2", "right", "down")
    return torch.tensor([[changed.get(name, 0.0) for name in names]]).repeat(count, 1)


def test_probability_zero_changes_nothing():
    x = pictures()
    conditions = draw_augmentations(3, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(conditions, torch.zeros(3, 9))
    assert torch.equal(apply_augmentations(x, conditions), x)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"x": 1}, lambda x: x.flip(-1)),
        ({"y": 1}, lambda x: x.flip(-2)),
        ({"cos": -1, "sin": 1}, lambda x: torch.rot90(x, 1, (-2, -1))),  # rot90 is anticlockwise
        ({"cos": -1, "sin": -1}, lambda x: torch.rot90(x, -1, (-2, -1))),
        ({"cos": -2}, lambda x: torch.rot90(x, 2, (-2, -1))),
        ({"x": 1, "cos": -1, "sin": 1}, lambda x: torch.rot90(x.flip(-1), 1, (-2, -1))),
        ({"right": 2}, lambda x: torch.cat([x[..., :2].flip(-1), x[..., :-2]], -1)),
        ({"down": -1}, lambda x: torch.cat([x[..., 1:, :], x[..., -1:, :]], -2)),
    ],
    ids=["mirror-x", "mirror-y", "turn-90", "turn-270", "turn-180", "both", "right", "up"],
)
def test_transforms_that_map_pixels_on_pixels(changed, expected):
    x = pictures()
    torch.testing.assert_close(
        apply_augmentations(x, numbers(**changed)), expected(x), atol=2e-5, rtol=0
    )


def blob(x0: float, y0: float, var_x: float, var_y: float, size: int = 64) -> torch.Tensor:
    place = torch.arange(size) - (size - 1) / 2
    across = torch.exp(-((place - x0) ** 2) / (2 * var_x))
    down = torch.exp(-((place - y0) ** 2) / (2 * var_y))
    return (down[:, None] * across).reshape(1, 1, size, size)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"scale": 2.5}, (2**0.5 * 4, 2**0.5 * 2, 2 * 9, 2 * 9)),
        ({"cos2": 2.5}, (2**0.5 * 4, 2**-0.5 * 2, 2 * 9, 9 / 2)),
        ({"cos2": -2.5}, (2**-0.5 * 4, 2**0.5 * 2, 9 / 2, 2 * 9)),
        ({"right": 0.3, "down": 0.1}, (4 + 0.3 * 8, 2 + 0.1 * 8, 9, 9)),
        ({"cos": math.cos(0.7) - 1, "sin": math.sin(0.7)}, None),
    ],
    ids=["scale", "stretch-x", "stretch-y", "shift", "turn"],
)
def test_transforms_of_a_smooth_blob(changed, expected):
    """A Gaussian's place and variances follow the transform; where it shrinks, the blur adds a known variance."""
    if expected is None:  # anticlockwise with y down
        c, s = math.cos(0.7), math.sin(0.7)
        expected = (c * 4 + s * 2, -s * 4 + c * 2, 9, 9)
    moved = apply_augmentations(blob(4, 2, 9, 9), numbers(1, **changed))[0, 0].double()
    place = torch.arange(64, dtype=torch.float64) - 31.5
    weight = moved / moved.sum()
    mean = ((weight * place).sum(), (weight * place[:, None]).sum())
    variance = [
        (weight * (place - mean[0]) ** 2).sum().item(),
        (weight * (place[:, None] - mean[1]) ** 2).sum().item(),
    ]
    # Across a stretch by sqrt(2) the image shrinks by as much: the blur has the variance (2 - 1) / 4 old pixels^2.
    if "cos2" in changed:
        variance[0] -= expected[2] / 9 / 4
        variance[1] -= expected[3] / 9 / 4
    assert [float(m) for m in mean] == pytest.approx(
        expected[:2], abs=0.06
    )  # torch's bicubic kernel is off by up to 0.05 pixels
    assert variance == pytest.approx(expected[2:], rel=0.02)


def test_shrinking_does_not_alias():
    """Stripes too fine for the smaller image become grey, and not coarse stripes."""
    stripes = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0).expand(1, 1, 64, 64)
    shrunk = apply_augmentations(stripes, numbers(1, scale=-5.0))  # to one half
    assert shrunk[..., 20:44, 20:44].abs().max() < 0.05


def test_a_stretch_and_its_opposite_have_different_numbers():
    """The transform is a function of the numbers: the same numbers, the same image."""
    x = pictures()
    along, across = (apply_augmentations(x, numbers(cos2=sign * 2.0)) for sign in (1, -1))
    assert (along - across).abs().max() > 0.1
    torch.testing.assert_close(
        across, apply_augmentations(x.mT, numbers(cos2=2.0)).mT, atol=1e-4, rtol=0
    )


def test_images_that_are_not_square_turn_in_pixels():
    x = torch.full((1, 1, 8, 16), -1.0)
    x[..., 4, 8:11] = 1.0  # from the centre to the right
    turned = apply_augmentations(x, numbers(1, cos=-1, sin=1))
    assert (turned[0, 0, 1:4, 8] > 0.9).all() and (turned[..., 4:12] > 0.9).sum() == 3


def test_distribution_of_the_numbers():
    count, p = 40_000, 0.3
    drawn = draw_augmentations(count, p, torch.Generator().manual_seed(0)).double()
    error = 4 * (p / count) ** 0.5
    for column in (0, 1):
        assert drawn[:, column].mean() == pytest.approx(p / 2, abs=error)
    for column in (2, 7, 8):
        assert drawn[:, column].mean() == pytest.approx(0, abs=error)
        assert drawn[:, column].square().mean() == pytest.approx(p, rel=0.08)
    for pair in (slice(3, 5), slice(5, 7), slice(7, 9)):
        on = (drawn[:, pair] != 0).any(1)
        assert on.double().mean() == pytest.approx(p, abs=error)
    turned = drawn[drawn[:, 4] != 0]
    angle = torch.atan2(turned[:, 4], turned[:, 3] + 1)
    assert torch.hypot(turned[:, 4], turned[:, 3] + 1) == pytest.approx(1, abs=1e-6)
    assert angle.square().mean() == pytest.approx(math.pi**2 / 3, rel=0.05)
    assert drawn[:, 5:7].square().sum(1).mean() == pytest.approx(p, rel=0.08)
    # Independent: each pair of transforms coincides by chance alone.
    both = (drawn[:, 2] != 0) & (drawn[:, 4] != 0)
    assert both.double().mean() == pytest.approx(p * p, abs=error)


@pytest.mark.global_rng
@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(in_channels=1, channels=(8, 8), groups=4, blocks=1, augment_width=9),
        DiTConfig(in_channels=1, width=16, depth=2, heads=2, augment_width=9),
    ],
    ids=["unet", "dit"],
)
def test_the_network_without_augmentation_is_that_with_zeros(config):
    net = build(config)
    for name, weight in net.named_parameters():
        if not name.startswith("augment"):
            torch.nn.init.normal_(weight, std=0.3)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    told = torch.ones(2, 9)
    assert torch.equal(net(x, t, augment=told), net(x, t))  # the map starts at zero
    torch.nn.init.normal_(net.augment.weight)
    assert torch.equal(net(x, t), net(x, t, augment=torch.zeros(2, 9)))
    assert (net(x, t) - net(x, t, augment=told)).abs().max() > 1e-3
    with pytest.raises(InvalidInputError, match=r"shape \(2, 9\)"):
        net(x, t, augment=torch.ones(2, 8))
    with pytest.raises(InvalidInputError, match="augment_width"):
        build(config.replace(augment_width=0))(x, t, augment=told)


def test_the_network_learns_from_the_numbers(images, make_config, tmp_path):
    trainer = Trainer(make_config(augment=0.5), tmp_path, images=images, device="cpu")
    list(trainer.steps())
    assert trainer.state.network.augment.weight.abs().max() > 0


def test_rows_are_split_by_the_seed():
    seen, unseen = split_rows(20, 0.25, seed=0)
    assert len(unseen) == 5 and sorted([*seen.tolist(), *unseen.tolist()]) == list(range(20))
    assert torch.equal(split_rows(20, 0.25, seed=0)[1], unseen)
    assert not torch.equal(split_rows(20, 0.25, seed=1)[1], unseen)
    assert len(split_rows(20, 0.0, seed=0)[1]) == 0 and len(split_rows(20, 0.001, seed=0)[1]) == 1
    with pytest.raises(InvalidInputError, match="leaves 1 of 2"):
        split_rows(2, 0.5, seed=0)


def test_held_out_images_are_never_trained_on(images, make_config, tmp_path):
    """The run is that of the remaining images alone, whatever the others are."""
    config = make_config(held_out=0.3, sample_every=7)
    one = Trainer(config, tmp_path / "one", images=images, device="cpu")
    pixels = images.images.clone()
    pixels[one.held_out_rows] = 255 - pixels[one.held_out_rows]
    changed = ImageSet(pixels, images.labels, images.class_names)
    two = Trainer(config, tmp_path / "two", images=changed, device="cpu")
    facts = [list(trainer.steps()) for trainer in (one, two)]
    assert [f.loss for f in facts[0]] == [f.loss for f in facts[1]]
    (first, second) = (run[-1].held_out for run in facts)
    assert first.seen == second.seen and first.unseen != second.unseen
    last = list(Log(tmp_path / "one" / "log.jsonl").entries())[-1]
    assert (last["error_seen"], last["error_unseen"]) == first
