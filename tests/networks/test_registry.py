"""What holds for every class of network: the table, and checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.errors import InvalidInputError, UnknownNameError
from fewstep.networks import (
    NETWORKS,
    DiTConfig,
    NetworkConfig,
    UNetConfig,
    build,
    class_of,
    config_from_dict,
    config_to_dict,
    presets,
)

SMALL: dict[str, NetworkConfig] = {
    "unet": UNetConfig(
        channels=(16, 32), attention=(1,), groups=4, num_classes=3, resample="residual"
    ),
    "dit": DiTConfig(width=32, depth=3, heads=2, num_classes=3),
}


def _gradients(config: NetworkConfig, how: str, checkpointing: bool) -> tuple[list[Tensor], int]:
    """Gradients of a loss, and bytes kept for them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(config).train()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(0.0, 0.1)
        net.checkpointing = checkpointing
        x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
        kept: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "bfloat16"),
        ):
            loss = net(x, torch.arange(4), torch.arange(4)).float().square().mean()
        gradients = torch.autograd.grad(loss, list(net.parameters()))
    return list(gradients), sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("how", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_keeps_less_and_gives_the_same_gradients(
    name: str, dropout: float, how: str
) -> None:
    config = SMALL[name]
    if dropout:
        if not isinstance(config, UNetConfig):
            pytest.skip("a DiT has no dropout")
        config = config.replace(dropout=dropout)
    plain, much = _gradients(config, how, checkpointing=False)
    again, little = _gradients(config, how, checkpointing=True)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)
    assert little < 0.6 * much


@pytest.mark.parametrize("name", NETWORKS)
def test_configurations_name_their_class(name: str) -> None:
    config = SMALL[name]
    assert class_of(config) == name
    assert config_from_dict(config_to_dict(config)) == config
    with torch.device("meta"):
        assert isinstance(build(config), NETWORKS[name][0])


def test_an_unknown_class_names_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="unknown network class 'unett'; .* dit, unet"):
        config_from_dict({"class": "unett"})
    with pytest.raises(InvalidInputError, match="unknown DiT option"):
        config_from_dict({"class": "dit", "channels": [8]})


@pytest.mark.parametrize("name", presets())
def test_presets_map_images_to_images(name: str) -> None:
    preset = presets()[name]
    with torch.device("meta"):
        net = build(preset.config)
        images = torch.zeros(2, preset.config.in_channels, preset.size, preset.size)
        assert net(images, torch.zeros(2)).shape == images.shape
    assert preset.name == name and preset.title and preset.description
