"""The U-Net against closed forms, an independent implementation and its own symmetries."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import InvalidInputError, UnknownNameError
from fewstep.networks import UNet, UNetConfig, presets, sinusoidal_embedding
from fewstep.networks.blocks import (
    Attention,
    Downsample,
    NormSiLU,
    ResidualBlock,
    Stage,
    Upsample,
    attend,
)

UNETS = {n: p for n, p in presets().items() if isinstance(p.config, UNetConfig)}
TINY = UNetConfig(
    in_channels=2,
    channels=(16, 32),
    blocks=(1, 2),
    attention=(1,),
    head_width=16,
    num_classes=3,
    context_width=5,
    groups=4,
)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _randomise(network: nn.Module, seed: int = 0) -> None:
    """Replace all weights, zero-initialised ones too, so that every part has its say."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(0.0, spread, generator=generator)
    network.eval()


def _build(config: UNetConfig) -> UNet:
    with torch.random.fork_rng():
        net = UNet(config)
    _randomise(net)
    return net


def _inputs(batch: int = 3, size: int = 8) -> dict[str, Tensor]:
    return {
        "x": _randn(batch, 2, size, size, seed=1),
        "t": torch.linspace(0.0, 999.0, batch),
        "labels": torch.arange(batch) % 4,
        "context": _randn(batch, 4, 5, seed=2),
    }


@pytest.fixture(scope="module")
def tiny() -> UNet:
    return _build(TINY)


# Embedding of time


def test_sinusoidal_embedding_is_the_closed_form() -> None:
    t = torch.tensor([0.0, 0.25, 17.0, 999.0], dtype=torch.float64)
    embedding = sinusoidal_embedding(t, 8)
    for row, time in zip(embedding.tolist(), t.tolist(), strict=True):
        angles = [time / 10_000 ** (i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row == pytest.approx(expected, abs=1e-12)


def test_neighbouring_times_stay_apart_in_a_bfloat16_network() -> None:
    early, late = sinusoidal_embedding(torch.tensor([998.0, 999.0]), 32).bfloat16()
    assert (early - late).abs().max() > 0.5


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sinusoidal_embedding_is_computed_in_float32_or_better(
    given: torch.dtype, computed: torch.dtype
) -> None:
    assert sinusoidal_embedding(torch.ones(1, dtype=given), 4).dtype == computed


def test_time_scale_turns_unit_times_into_steps(tiny: UNet) -> None:
    with torch.random.fork_rng():
        scaled = UNet(TINY.replace(time_scale=1000.0)).eval()
    scaled.load_state_dict(tiny.state_dict())
    inputs = _inputs()
    expected = tiny(**inputs)
    torch.testing.assert_close(scaled(**inputs | {"t": inputs["t"] / 1000}), expected)


def test_scalar_and_fractional_times(tiny: UNet) -> None:
    inputs = _inputs()
    at = {t: tiny(**inputs | {"t": torch.tensor(t)}) for t in (5.0, 5.25)}
    torch.testing.assert_close(at[5.25], tiny(**inputs | {"t": torch.full((3,), 5.25)}))
    assert not torch.allclose(at[5.0], at[5.25])
    integer = tiny(**inputs | {"t": torch.tensor(5)})
    torch.testing.assert_close(integer, at[5.0])


# Parts


@pytest.mark.parametrize("context_length", [None, 4])
def test_attention_is_the_explicit_softmax(context_length: int | None) -> None:
    heads, width, pixels = 2, 8, 6
    context = None if context_length is None else _randn(2, context_length, 5, seed=3).double()
    with torch.random.fork_rng():
        layer = Attention(width, heads, groups=4, context_width=0 if context is None else 5)
    _randomise(layer)
    layer.double()
    x = _randn(2, width, 2, 3).double()

    d = width // heads
    normalised = F.group_norm(x, 4, layer.norm.weight, layer.norm.bias).reshape(2, width, pixels)
    expected = x.clone()
    for image in range(2):
        rows = normalised[image].T
        source = rows if context is None else context[image]
        q = rows @ layer.query.weight.T + layer.query.bias
        k, v = (source @ layer.key_value.weight.T + layer.key_value.bias).split(width, dim=1)
        mixed = torch.empty(pixels, width, dtype=torch.float64)
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            weights = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(d))
            mixed[:, part] = weights @ v[:, part] / weights.sum(dim=1, keepdim=True)
        expected[image] += (mixed @ layer.out.weight.T + layer.out.bias).T.reshape(width, 2, 3)

    torch.testing.assert_close(layer(x, context), expected)


@pytest.mark.parametrize("length", [7, 600])
def test_attention_in_bfloat16_has_the_values_and_gradients_of_float32(length: int) -> None:
    exact = [_randn(2, 2, length, 16, seed=s).bfloat16().float() for s in range(3)]
    rounded = [tensor.bfloat16() for tensor in exact]
    upstream = _randn(2, 2, length, 16, seed=3)
    results = []
    for operands in (exact, rounded):
        leaves = [operand.requires_grad_() for operand in operands]
        mixed = attend(*leaves)
        assert mixed.dtype == leaves[0].dtype
        gradients = torch.autograd.grad(mixed, leaves, upstream.to(mixed.dtype))
        results.append([mixed.detach(), *gradients])
    for reference, value in zip(*results, strict=True):
        torch.testing.assert_close(value.float(), reference, rtol=0.05, atol=0.02)


def test_residual_block_is_the_formula_of_ddpm() -> None:
    with torch.random.fork_rng():
        block = ResidualBlock(8, 12, 6, groups=(2, 3), dropout=0.5)
    _randomise(block)
    block.double()
    x, embedding = _randn(2, 8, 5, 5).double(), _randn(2, 6, seed=1).double()

    def normalise(image: Tensor, norm: nn.GroupNorm) -> Tensor:
        grouped = image.reshape(2, norm.num_groups, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        return scaled.reshape(image.shape) * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    def activate(image: Tensor) -> Tensor:
        return image / (1 + torch.exp(-image))

    h = block.conv1(activate(normalise(x, block.norm1)))
    h = h + (embedding @ block.condition.weight.T + block.condition.bias)[..., None, None]
    expected = block.skip(x) + block.conv2(activate(normalise(h, block.norm2)))
    torch.testing.assert_close(block(x, embedding), expected)


def test_dropout_acts_in_training_alone() -> None:
    net = _build(TINY.replace(dropout=0.5))
    inputs = _inputs()
    torch.testing.assert_close(net(**inputs), net(**inputs), rtol=0, atol=0)
    net.train()
    with torch.random.fork_rng():
        assert not torch.allclose(net(**inputs), net(**inputs))


# The whole network


def test_ddpm_cifar10_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        net = UNet.from_preset("ddpm-cifar10")
    assert sum(parameter.numel() for parameter in net.parameters()) == 35_746_307


def test_small_fits_its_budget() -> None:
    with torch.device("meta"):
        net = UNet.from_preset("small", num_classes=10)
    assert sum(parameter.numel() for parameter in net.parameters()) <= 3_500_000


@pytest.mark.parametrize("name", sorted(UNETS))
@pytest.mark.parametrize("times", [1, 2])
def test_presets_map_images_to_images(name: str, times: int) -> None:
    preset = UNETS[name]
    channels = preset.config.in_channels
    with torch.device("meta"):
        net = UNet.from_preset(name, out_channels=times * channels)
        y = net(torch.zeros(2, channels, preset.size, preset.size), torch.zeros(2))
    assert y.shape == (2, times * channels, preset.size, preset.size)
    assert preset.name == name and preset.title and preset.description


def test_a_new_network_returns_zero() -> None:
    with torch.random.fork_rng():
        net = UNet(TINY)
    assert not net(**_inputs()).any()


def _diffusers_names(config: UNetConfig, net: UNet) -> Iterator[tuple[nn.Module, str]]:
    """Pair every layer with the name of its twin in diffusers' UNet2DModel."""

    def stage(layer: Stage, path: str, index: int) -> Iterator[tuple[nn.Module, str]]:
        residual, attention = layer.residual, layer.attention
        prefix = f"{path}.resnets.{index}"
        yield residual.norm1, f"{prefix}.norm1"
        yield residual.conv1, f"{prefix}.conv1"
        yield residual.condition, f"{prefix}.time_emb_proj"
        yield residual.norm2, f"{prefix}.norm2"
        yield residual.conv2, f"{prefix}.conv2"
        if isinstance(residual.skip, nn.Conv2d):
            yield residual.skip, f"{prefix}.conv_shortcut"
        if attention is not None:
            prefix = f"{path}.attentions.{index}"
            yield attention.norm, f"{prefix}.group_norm"
            yield attention.query, f"{prefix}.to_q"
            yield attention.key_value, f"{prefix}.to_k+to_v"
            yield attention.out, f"{prefix}.to_out.0"

    def path(layers: nn.ModuleList, name: str, counts: list[int]) -> Iterator[Any]:
        remaining = iter(layers)
        for block, count in enumerate(counts):
            for index in range(count):
                yield from stage(next(remaining), f"{name}.{block}", index)
            if block + 1 < len(counts):
                kind = "downsamplers" if name == "down_blocks" else "upsamplers"
                yield next(remaining), f"{name}.{block}.{kind}.0.conv"

    levels = range(len(config.channels))
    yield net.conv_in, "conv_in"
    yield net.time.lift, "time_embedding.linear_1"
    yield net.time.mix, "time_embedding.linear_2"
    if net.classes is not None:
        yield net.classes, "class_embedding"
    yield from path(net.down, "down_blocks", [config.blocks_at(i) for i in levels])
    for index, layer in enumerate(net.middle):
        yield from stage(layer, "mid_block", index)
    yield from path(net.up, "up_blocks", [config.blocks_at(i) + 1 for i in reversed(levels)])
    yield net.norm_out, "conv_norm_out"
    yield net.conv_out, "conv_out"


def test_agrees_with_the_unet_of_diffusers() -> None:
    unet_2d = pytest.importorskip("diffusers.models.unets.unet_2d")
    config = UNetConfig(
        channels=(16, 32, 32), blocks=2, attention=(1,), head_width=8, num_classes=4, groups=8
    )
    net = _build(config).double()
    with torch.random.fork_rng():
        twin = unet_2d.UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32, 32),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
            num_class_embeds=5,
        )
    weights: dict[str, Tensor] = {}
    for layer, name in _diffusers_names(config, net):
        for kind, value in layer.state_dict().items():
            prefix, _, last = name.rpartition(".")
            parts = last.split("+")
            for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
                weights[f"{prefix}.{part}.{kind}".lstrip(".")] = piece
    twin.double().eval().load_state_dict(weights)

    x, t, labels = _randn(3, 3, 8, 8).double(), torch.tensor([0, 10, 999]), torch.tensor([0, 4, 2])
    expected = twin(x, t, class_labels=labels).sample
    # Both embed whole times in float32, but round the angles in a different order.
    torch.testing.assert_close(net(x, t, labels), expected, rtol=1e-4, atol=1e-5)


def test_every_image_is_computed_alone() -> None:
    net = _build(TINY).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in _inputs(5).items()}
    together = net(**inputs)
    for k in range(5):
        alone = net(**{name: value[k : k + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone, together[k : k + 1], rtol=1e-10, atol=1e-10)


def test_labels_context_and_time_all_change_the_output(tiny: UNet) -> None:
    inputs = _inputs()
    before = tiny(**inputs)
    changes = {
        "labels": (inputs["labels"] + 1) % 4,
        "context": inputs["context"] + 1,
        "t": inputs["t"] + 1,
    }
    for name, value in changes.items():
        difference = (tiny(**inputs | {name: value}) - before).abs().amax(dim=(1, 2, 3))
        assert difference.min() > 1e-3, name


def test_null_label_is_no_label(tiny: UNet) -> None:
    inputs = _inputs()
    null = tiny(**inputs | {"labels": torch.full((3,), 3)})
    del inputs["labels"]
    torch.testing.assert_close(tiny(**inputs), null, rtol=0, atol=0)


def test_gradients_reach_every_parameter() -> None:
    net = _build(TINY)
    net(**_inputs(4)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_analytic_gradient_is_the_slope() -> None:
    net = _build(TINY).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in _inputs(2, 4).items()}
    x, direction = inputs.pop("x"), _randn(2, 2, 4, 4, seed=9).double()
    weights, step = _randn(2, 2, 4, 4, seed=10).double(), 1e-6

    def loss(x: Tensor) -> Tensor:
        return (weights * net(x, **inputs)).sum()

    slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-6)


# Memory formats and floating types


def test_channels_last_gives_what_contiguous_gives(tiny: UNet) -> None:
    inputs = _inputs(size=16)
    expected = tiny(**inputs)
    twin = _build(TINY).to(memory_format=torch.channels_last)
    inputs["x"] = inputs["x"].to(memory_format=torch.channels_last)
    torch.testing.assert_close(twin(**inputs), expected, rtol=1e-4, atol=1e-4)


def _formats(net: UNet) -> list[tuple[str, torch.dtype, bool]]:
    """Record type and memory format of what every part returns; fills as the network runs."""
    records: list[tuple[str, torch.dtype, bool]] = []
    parts = (NormSiLU, ResidualBlock, Attention, Downsample, Upsample)
    for name, part in net.named_modules():
        if isinstance(part, parts):

            def record(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                last = output.is_contiguous(memory_format=torch.channels_last)
                records.append((name, output.dtype, last))

            part.register_forward_hook(record)
    return records


@pytest.mark.parametrize("how", ["float32", "autocast", "bfloat16"])
def test_channels_last_and_type_are_kept_from_end_to_end(how: str) -> None:
    net = _build(TINY).to(memory_format=torch.channels_last)
    net = net.bfloat16() if how == "bfloat16" else net
    records = _formats(net)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        net(**_inputs(size=16))
    expected = torch.float32 if how == "float32" else torch.bfloat16
    assert records
    assert all(dtype == expected and last for _, dtype, last in records), records


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_bfloat16_is_close_to_float32(how: str, tiny: UNet) -> None:
    inputs = _inputs(size=16)
    expected = tiny(**inputs)
    net = _build(TINY)
    net = net.bfloat16() if how == "bfloat16" else net
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        y = net(**inputs)
    assert y.dtype == inputs["x"].dtype
    error = (y - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-5 < error < 0.03


def test_output_has_the_type_of_the_images() -> None:
    inputs = _inputs()
    double = inputs | {"x": inputs["x"].double()}
    assert _build(TINY)(**double).dtype == torch.float64
    assert _build(TINY).bfloat16()(**inputs).dtype == torch.float32
    half = inputs | {"x": inputs["x"].bfloat16()}
    assert _build(TINY).bfloat16()(**half).dtype == torch.bfloat16


def test_float64_is_float64_throughout() -> None:
    net, inputs = _build(TINY), _inputs()
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    single, double = net(**inputs), net.double()(**doubles)
    error = (single - double).abs().max()
    assert double.dtype == torch.float64 and 1e-9 < error < 1e-3


@pytest.mark.slow
def test_compiles_into_one_graph(tiny: UNet) -> None:
    inputs = _inputs()
    compiled = torch.compile(tiny, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), tiny(**inputs))


# Configuration


@pytest.mark.parametrize("config", [TINY, *(preset.config for preset in UNETS.values())])
def test_configuration_survives_json(config: UNetConfig) -> None:
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_attention_as_bools_and_as_levels_are_the_same() -> None:
    bools = UNetConfig(channels=(32, 64, 96), attention=(True, False, True))
    assert bools == UNetConfig(channels=(32, 64, 96), attention=(2, 0))


def test_attention_stands_where_it_is_asked_for() -> None:
    with torch.device("meta"):
        net = UNet(UNetConfig(channels=(32, 64, 96), blocks=(2, 1, 3), attention=(0, 2)))
    attended = [
        [layer.attention is not None for layer in path if isinstance(layer, Stage)]
        for path in (net.down, net.middle, net.up)
    ]
    assert attended == [
        [True, True, False, True, True, True],
        [True, False],
        [True, True, True, True, False, False, True, True, True],
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_channels": 0}, "in_channels = 0 is not allowed; give a whole number of at least 1"),
        ({"in_channels": 1.5}, "in_channels = 1.5 is not allowed"),
        ({"out_channels": 0}, "out_channels = 0 is not allowed"),
        ({"heads": True}, "heads = True is not allowed"),
        (
            {"num_classes": -1},
            "num_classes = -1 is not allowed; give a whole number of at least 0",
        ),
        ({"context_width": "5"}, "context_width = '5' is not allowed"),
        ({"channels": ()}, "channels = (); give one width per resolution, such as (64, 128)"),
        ({"channels": 64}, "channels = 64; give one width per resolution"),
        ({"channels": (32, 0)}, "a width in channels = 0 is not allowed"),
        ({"channels": (33,), "groups": 3}, "channels[0] = 33 is odd"),
        ({"blocks": 0}, "blocks = 0 is not allowed"),
        ({"blocks": (1, 2)}, "blocks = (1, 2) has 2 entries for 3 resolutions; give one number"),
        ({"attention": 1}, "attention = 1 is not a tuple; give indices from 0 (finest) to 2"),
        ({"attention": (3,)}, "attention = (3,) does not fit 3 resolutions; give indices"),
        ({"attention": (True,)}, "attention = (True,) does not fit 3 resolutions"),
        ({"attention": (True, 1, 2)}, "attention = (True, 1, 2) does not fit 3 resolutions"),
        ({"dropout": 1.0}, "dropout = 1.0; give a number in [0, 1)"),
        ({"dropout": "much"}, "dropout = 'much'; give a number in [0, 1)"),
        ({"time_scale": 0.0}, "time_scale = 0.0; give a finite number above 0"),
        ({"time_scale": math.nan}, "time_scale = nan; give a finite number above 0"),
        ({"groups": 48}, "groups = 48 does not divide all the widths (64, 128, 256)"),
        ({"group_width": 24}, "group_width = 24 does not divide all the widths"),
        ({"head_width": 96}, "head_width = 96 does not divide all the widths (256,)"),
        ({"heads": 3}, "heads = 3 does not divide all the widths (256,) that it has to share out"),
    ],
)
def test_impossible_configurations_name_value_and_remedy(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        UNetConfig.from_dict(fields)


def test_unknown_names_propose_the_nearest() -> None:
    with pytest.raises(
        UnknownNameError, match="unknown U-Net preset 'smal'; did you mean 'small'"
    ):
        UNet.from_preset("smal")
    with pytest.raises(InvalidInputError, match="unknown U-Net option 'chanels'; .* 'channels'"):
        UNetConfig.from_dict({"chanels": (32,)})
    with pytest.raises(InvalidInputError, match="unknown U-Net option 'chanels'"):
        UNet.from_preset("small", chanels=(32,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": torch.zeros(3, 1, 8, 8)},
            "shape (3, 1, 8, 8) do not fit a network for (B, 2, H, W)",
        ),
        ({"x": torch.zeros(2, 8, 8)}, "shape (2, 8, 8) do not fit"),
        ({"x": torch.zeros(3, 2, 8, 8, dtype=torch.uint8)}, "scale them to [-1, 1] first"),
        ({"x": torch.zeros(3, 2, 8, 7)}, "8x7 pixels cannot be halved 1 times; height and width"),
        ({"t": torch.zeros(2)}, "times of shape (2,) do not fit 3 images; give one time for all"),
        ({"t": torch.zeros(3, 1)}, "times of shape (3, 1) do not fit 3 images"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels of shape (2,) and type"),
        ({"labels": torch.zeros(3)}, "type torch.float32 do not fit 3 images; give integers"),
        ({"labels": torch.tensor([0, 4, 1])}, "label 4 is not a class of this network; allowed"),
        ({"labels": torch.tensor([0, -1, 9])}, "label -1 is not a class of this network; allowed"),
        ({"context": None}, "give context of shape (3, L, 5)"),
        ({"context": torch.zeros(3, 4, 6)}, "context of shape (3, 4, 6) does not fit; give shape"),
        ({"context": torch.zeros(3, 5)}, "context of shape (3, 5) does not fit"),
    ],
)
def test_impossible_inputs_name_value_and_remedy(
    tiny: UNet, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        tiny(**_inputs() | changes)


@pytest.mark.parametrize("name", ["labels", "context"])
def test_conditions_that_the_network_does_not_have_are_refused(name: str) -> None:
    with torch.device("meta"):
        net = UNet(TINY.replace(num_classes=0, context_width=0))
    inputs = _inputs()
    with pytest.raises(InvalidInputError, match="leave (it|them) out, or build the network with"):
        net(inputs["x"], inputs["t"], **{name: inputs[name]})
