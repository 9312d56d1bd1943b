"""What a network is said to cost, against counts by hand and published ones."""

from __future__ import annotations

import pytest
import torch

from fewstep.errors import InvalidInputError
from fewstep.networks import DiTConfig, UNetConfig, build, presets
from fewstep.networks.cost import cost


def test_a_convolution_and_an_attention_by_hand() -> None:
    width, edge = 16, 8
    config = UNetConfig(channels=(width,), blocks=1, groups=4)
    pixels = edge * edge
    with_attention = {part.name: part for part in cost(config, edge).parts}
    assert with_attention["conv_out"].flops == 2 * 9 * width * 3 * pixels
    without = {
        part.name: part for part in cost(config.replace(middle_attention=False), edge).parts
    }
    projections = 2 * 4 * width * width * pixels
    products = 2 * 2 * pixels * pixels * width
    name = f"middle {edge}x{edge}"
    assert with_attention[name].flops - without[name].flops == projections + products


def test_published_counts() -> None:
    ddpm = cost(presets()["ddpm-cifar10"].config, 32)
    assert ddpm.parameters == 35_746_307
    assert ddpm.flops == pytest.approx(12.4e9, rel=0.01)
    xl = presets()["dit-xl/2"].config.replace(in_channels=4, out_channels=8, num_classes=1000)
    # Peebles and Xie 2023, table 4, counts a multiplication and an addition as one.
    assert cost(xl, 32).flops / 2 == pytest.approx(118.6e9, rel=0.001)


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(channels=(16, 32), groups=4, num_classes=3),
        DiTConfig(width=32, heads=2, depth=2),
    ],
)
def test_totals_are_those_of_a_network_that_runs(config: UNetConfig | DiTConfig) -> None:
    told = cost(config, size=8, batch_size=3)
    with torch.random.fork_rng():
        net = build(config)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.zeros(3, 3, 8, 8), torch.zeros(3))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert told.memory == pytest.approx(measured, rel=0.02)
    assert told.parameters == sum(p.numel() for p in net.parameters())
    # An embedding of classes that nothing asked for is in the total alone.
    assert told.parameters - sum(part.parameters for part in told.parts) == 0
    assert told.flops == sum(part.flops for part in told.parts)
    assert 2.5 < told.training_flops / told.flops < 3.5
    assert told.checkpointed_memory < 0.6 * told.memory


def test_a_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="cannot be halved"):
        cost(presets()["small"].config, 27)
