"""The options of the U-Net: against diffusers where it has them, else against their formulas."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import InvalidInputError
from fewstep.integrations.unet_names import DIFFUSERS, to_theirs
from fewstep.networks import UNet, UNetConfig, sinusoidal_embedding
from fewstep.networks.blocks import Stage

SMALL: dict[str, Any] = {
    "channels": (16, 32, 32),
    "blocks": 2,
    "attention": (1,),
    "head_width": 8,
    "groups": 8,
}
NEW = {
    "scale-shift": {"condition": "scale-shift"},
    "residual": {"resample": "residual"},
    "plain": {"resample": "plain"},
    "pad_after": {"pad_after": True},
    "residual_scale": {"residual_scale": 0.5**0.5},
    "skip_scale": {"skip_scale": 0.5**0.5},
    "no middle": {"middle_attention": False},
    "original": {"frequency_shift": 1.0, "norm_epsilon": 1e-6},
}


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _build(**options: Any) -> UNet:
    with torch.random.fork_rng():
        net = UNet(UNetConfig(**{**SMALL, **options})).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(0.0, spread, generator=generator)
    return net


def _twin(**options: Any) -> Any:
    unet_2d = pytest.importorskip("diffusers.models.unets.unet_2d")
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    with torch.random.fork_rng():
        return unet_2d.UNet2DModel(**{**settings, **options}).double().eval()


RESIDUAL_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            {"condition": "scale-shift"},
            {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
        ),
        ({"pad_after": True}, {"downsample_padding": 0}),
        ({"resample": "residual"}, RESIDUAL_BLOCKS),
        ({"frequency_shift": 1.0}, {"freq_shift": 1}),
        ({"norm_epsilon": 0.1}, {"norm_eps": 0.1}),
        ({"middle_attention": False}, {"add_attention": False}),
        ({"head_width": 0, "heads": 1}, {"attention_head_dim": None}),
        (
            {"pad_after": True, "frequency_shift": 1.0, "norm_epsilon": 1e-6, "head_width": 0},
            {
                "downsample_padding": 0,
                "freq_shift": 1,
                "norm_eps": 1e-6,
                "attention_head_dim": None,
            },
        ),
    ],
    ids=lambda options: "+".join(options),
)
def test_agrees_with_diffusers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    net, twin = _build(**ours), _twin(**theirs)
    twin.load_state_dict(to_theirs(net, DIFFUSERS))
    x, t = _randn(2, 3, 8, 8), torch.tensor([0, 999])
    # Both embed whole times in float32, but round the angles in a different order.
    torch.testing.assert_close(net(x, t), twin(x, t).sample, rtol=1e-4, atol=1e-5)


def test_residual_scale_agrees_with_diffusers() -> None:
    net, twin = _build(residual_scale=0.5**0.5, resample="residual"), _twin(**RESIDUAL_BLOCKS)
    twin.load_state_dict(to_theirs(net, DIFFUSERS))
    for module in twin.modules():
        if hasattr(module, "output_scale_factor"):
            module.output_scale_factor = math.sqrt(2)
        if hasattr(module, "rescale_output_factor"):
            module.rescale_output_factor = math.sqrt(2)
    x, t = _randn(2, 3, 8, 8), torch.tensor([0, 999])
    torch.testing.assert_close(net(x, t), twin(x, t).sample, rtol=1e-4, atol=1e-5)


def test_skip_scale_is_a_factor_on_what_joins_from_the_way_down() -> None:
    net = _build(skip_scale=0.25)
    skips: list[Tensor] = []
    joined: list[Tensor] = []

    def note(kept: list[Tensor], which: str) -> Any:
        return lambda layer, inputs, output: kept.append(output if which == "out" else inputs[0])

    net.conv_in.register_forward_hook(note(skips, "out"))
    for layer in net.down:
        layer.register_forward_hook(note(skips, "out"))
    for layer in net.up:
        if isinstance(layer, Stage):
            layer.register_forward_hook(note(joined, "in"))
    net(_randn(2, 3, 8, 8), torch.tensor(5))
    assert len(joined) == len(skips) == 9
    for skip, both in zip(reversed(skips), joined, strict=True):
        torch.testing.assert_close(both[:, -skip.shape[1] :], skip / 4)


def test_plain_resampling_is_means_and_repetition() -> None:
    net = _build(resample="plain", channels=(8, 8), attention=(), head_width=8, groups=4)
    x = _randn(1, 8, 4, 4)
    halved = x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
    torch.testing.assert_close(net.down[2](x), halved)
    doubled = next(layer for layer in net.up if not isinstance(layer, Stage))(halved)
    torch.testing.assert_close(F.avg_pool2d(doubled, 2), halved)
    torch.testing.assert_close(doubled[..., ::2, ::2], doubled[..., 1::2, 1::2])


def test_frequencies_of_the_original_ddpm() -> None:
    t = torch.tensor([3.0, 999.0], dtype=torch.float64)
    embedding = sinusoidal_embedding(t, 8, shift=1)
    angles = t[:, None] * 10_000 ** (-torch.arange(4, dtype=torch.float64) / 3)
    torch.testing.assert_close(embedding, torch.cat([angles.cos(), angles.sin()], 1))


@pytest.mark.parametrize("options", NEW.values(), ids=NEW)
def test_a_new_network_returns_zero_and_trains(options: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        net = UNet(UNetConfig(**SMALL, **options))
    x, t = _randn(2, 3, 8, 8).float(), torch.tensor([1.0, 500.0])
    assert not net(x, t).any()
    net = _build(**options)
    net(x.double(), t).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("options", NEW.values(), ids=NEW)
def test_formats_and_types_do_not_change_the_result(options: dict[str, Any]) -> None:
    net = _build(**options)
    x, t = _randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    expected = net(x, t)
    last = net.to(memory_format=torch.channels_last)
    y = last(x.to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    narrow = last.bfloat16()(x.float(), t)
    error = (narrow - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"condition": "scale"}, "unknown condition 'scale'; did you mean 'scale-shift'"),
        ({"resample": "pool"}, "unknown resample 'pool'; Known: conv, plain, residual"),
        ({"pad_after": 1}, "pad_after = 1; give true or false"),
        ({"pad_after": True, "resample": "plain"}, "pad_after is about the convolution of stride"),
        ({"residual_scale": 0.0}, "residual_scale = 0.0; give a finite number above 0"),
        ({"skip_scale": math.inf}, "skip_scale = inf; give a finite number above 0"),
        ({"norm_epsilon": -1}, "norm_epsilon = -1; give a finite number above 0"),
        ({"frequency_shift": 32}, "frequency_shift = 32; give a number in [0, 32)"),
        ({"context_width": 4, "middle_attention": False}, "context_width needs a level with"),
    ],
)
def test_impossible_options_name_value_and_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        UNetConfig.from_dict(fields)
