"""The transformer against published sizes, an independent implementation and its own symmetries."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import InvalidInputError, UnknownNameError
from fewstep.networks import DiT, DiTConfig
from fewstep.networks.dit import patchify, position_embedding, unpatchify

TINY = DiTConfig(in_channels=2, patch=2, width=32, depth=2, heads=4, num_classes=3)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _build(config: DiTConfig = TINY) -> DiT:
    with torch.random.fork_rng():
        net = DiT(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.normal_(0.0, spread, generator=generator)
    return net


def _inputs(batch: int = 3, height: int = 8, width: int = 8) -> dict[str, Tensor]:
    return {
        "x": _randn(batch, 2, height, width, seed=1),
        "t": torch.linspace(0.0, 999.0, batch, dtype=torch.float64),
        "labels": torch.arange(batch) % 4,
    }


@pytest.mark.parametrize(
    ("name", "millions"), [("s", 33), ("b", 130), ("l", 458), ("xl", 675)], ids=str
)
def test_published_numbers_of_parameters(name: str, millions: int) -> None:
    """Of latents of 32x32x4, with 1000 classes and a learned variance: table 1 of the paper."""
    with torch.device("meta"):
        net = DiT.from_preset(f"dit-{name}/2", in_channels=4, out_channels=8, num_classes=1000)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize("out_channels", [None, 4])
def test_a_new_network_returns_zero(out_channels: int | None) -> None:
    with torch.random.fork_rng():
        net = DiT(TINY.replace(out_channels=out_channels)).double()
    y = net(**_inputs(height=4, width=12))
    assert y.shape == (3, out_channels or 2, 4, 12) and not y.any()


def test_patches_are_cut_and_put_together_again() -> None:
    x = _randn(2, 3, 6, 9)
    tokens = patchify(x, 3)
    torch.testing.assert_close(tokens[1, 4], x[1, :, 3:6, 3:6].permute(1, 2, 0).flatten())
    torch.testing.assert_close(unpatchify(tokens, 2, 3, 3), x, rtol=0, atol=0)


def test_positions_are_sines_and_cosines_of_column_then_row() -> None:
    table = position_embedding(3, 5, 8, torch.device("cpu")).double()
    frequencies = torch.tensor([1.0, 0.01], dtype=torch.float64)
    for row in range(3):
        for column in range(5):
            a, b = column * frequencies, row * frequencies
            expected = torch.cat([a.sin(), a.cos(), b.sin(), b.cos()])
            torch.testing.assert_close(table[row * 5 + column], expected, rtol=1e-6, atol=1e-6)


def test_without_positions_patches_may_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = _build(), _inputs()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def shuffled(x: Tensor) -> Tensor:
        return unpatchify(patchify(x, 2)[:, order], 4, 4, 2)

    moved = inputs | {"x": shuffled(inputs["x"])}
    assert not torch.allclose(net(**moved), shuffled(net(**inputs)), rtol=1e-2)
    monkeypatch.setattr(
        "fewstep.networks.dit.position_embedding", lambda *_: torch.zeros(1, 32).double()
    )
    torch.testing.assert_close(net(**moved), shuffled(net(**inputs)))


def test_agrees_with_the_transformer_of_diffusers() -> None:
    module = pytest.importorskip("diffusers.models.transformers.dit_transformer_2d")
    with torch.random.fork_rng():
        twin = module.DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=2,
            out_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=3,
        )
    twin = twin.double().eval()
    net = _build(TINY.replace(out_channels=4))
    assert net.classes is not None
    own = net.state_dict()
    weights: dict[str, Tensor] = {
        "pos_embed.proj.weight": own["patches.weight"].reshape(32, 2, 2, 2).permute(0, 3, 1, 2),
        "pos_embed.proj.bias": own["patches.bias"],
        "proj_out_1.weight": own["last.modulation.weight"],
        "proj_out_1.bias": own["last.modulation.bias"],
        "proj_out_2.weight": own["last.out.weight"],
        "proj_out_2.bias": own["last.out.bias"],
    }
    names = {
        "out": "attn1.to_out.0",
        "widen": "ff.net.0.proj",
        "narrow": "ff.net.2",
        "modulation": "norm1.linear",
    }
    for index in range(2):
        prefix, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
        for kind in ("weight", "bias"):
            for name, other in names.items():
                weights[f"{theirs}.{other}.{kind}"] = own[f"{prefix}.{name}.{kind}"]
            parts = own[f"{prefix}.query_key_value.{kind}"].chunk(3)
            for part, value in zip("qkv", parts, strict=True):
                weights[f"{theirs}.attn1.to_{part}.{kind}"] = value
            embedding = f"{theirs}.norm1.emb"
            weights[f"{embedding}.timestep_embedder.linear_1.{kind}"] = own[f"time.lift.{kind}"]
            weights[f"{embedding}.timestep_embedder.linear_2.{kind}"] = own[f"time.mix.{kind}"]
        table = own["classes.weight"]
        weights[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = table
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and all("pos_embed" in name for name in missing)
    for block in twin.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as in the paper's own code
    inputs = _inputs()
    expected = twin(inputs["x"], timestep=inputs["t"].long(), class_labels=inputs["labels"]).sample
    inputs["t"] = inputs["t"].long()
    torch.testing.assert_close(net(**inputs), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter() -> None:
    net = _build()
    net(**_inputs(4)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_every_image_is_computed_alone_and_conditions_matter() -> None:
    net, inputs = _build(), _inputs()
    together = net(**inputs)
    for k in range(3):
        alone = net(**{name: value[k : k + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone, together[k : k + 1])
    for name in ("t", "labels"):
        changed = net(**inputs | {name: (inputs[name] + 1) % 4})
        assert (changed - together).abs().amax((1, 2, 3)).min() > 1e-3
    null = net(**inputs | {"labels": torch.full((3,), 3)})
    torch.testing.assert_close(net(inputs["x"], inputs["t"]), null, rtol=0, atol=0)


def test_formats_and_types_do_not_change_the_result() -> None:
    net, inputs = _build(), _inputs()
    expected = net(**inputs)
    y = net(**inputs | {"x": inputs["x"].to(memory_format=torch.channels_last)})
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    single = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    narrow = net.bfloat16()(**single)
    assert narrow.dtype == torch.float32
    error = (narrow - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-5 < error < 0.05


def test_time_scale_turns_unit_times_into_steps() -> None:
    net, inputs = _build(), _inputs()
    scaled = _build(TINY.replace(time_scale=1000.0))
    torch.testing.assert_close(scaled(**inputs | {"t": inputs["t"] / 1000}), net(**inputs))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 0}, "patch = 0 is not allowed; give a whole number of at least 1"),
        ({"width": 30, "heads": 3}, "width = 30 is not a multiple of 4"),
        ({"heads": 5}, "heads = 5 does not divide width = 384"),
        ({"mlp_ratio": 0}, "mlp_ratio = 0; give a number above 0"),
        ({"context_width": 8}, "context_width = 8, but a DiT has no cross-attention"),
        ({"dept": 8}, "unknown DiT option 'dept'; did you mean 'depth'"),
    ],
)
def test_impossible_configurations_name_value_and_remedy(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        DiTConfig.from_dict(fields)


def test_impossible_inputs_name_value_and_remedy() -> None:
    net, inputs = _build(), _inputs()
    with pytest.raises(InvalidInputError, match="8x7 pixels cannot be cut into patches of 2x2"):
        net(**inputs | {"x": torch.zeros(3, 2, 8, 7)})
    with pytest.raises(InvalidInputError, match="a context was given to a network without"):
        net(**inputs, context=F.one_hot(torch.zeros(3, 1, dtype=torch.long)))
    with pytest.raises(UnknownNameError, match="unknown DiT preset 'small'"):
        DiT.from_preset("small")
