"""What a network costs: parameters, operations and memory of each of its parts, computed without computing.

The network is run on fake tensors, which have shapes and no values: seconds for any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fewstep.networks.base import Network, NetworkConfig
from fewstep.networks.registry import build


@dataclass(frozen=True)
class PartCost:
    """The cost of a part of a network.

    Args:
        name: The part, and the resolution at which its layers work where there are several.
        layers: How many layers are summed up in it.
        shape: Shape of what it returns for one image.
        parameters: Numbers that are learnt.
        flops: Floating-point operations of a forward pass, two for a multiplication and addition.
        memory: Bytes kept for the gradient, in float32, without parameters.
    """

    name: str
    layers: int
    shape: tuple[int, ...]
    parameters: int
    flops: int
    memory: int


@dataclass(frozen=True)
class NetworkCost:
    """The cost of a network for a batch of images.

    Args:
        batch_size: Images in the batch.
        shape: Channels, height and width of an image.
        parts: Its parts, in the order of the forward pass.
        parameters: Numbers that are learnt.
        flops: Floating-point operations of a forward pass, two for a multiplication and addition.
        training_flops: The same of a forward pass and its gradient.
        memory: Bytes kept for the gradient, in float32, without parameters.
        checkpointed_memory: The same when `Network.checkpointing` is on.
    """

    batch_size: int
    shape: tuple[int, int, int]
    parts: tuple[PartCost, ...]
    parameters: int
    flops: int
    training_flops: int
    memory: int
    checkpointed_memory: int


def cost(config: NetworkConfig, size: int, batch_size: int = 1) -> NetworkCost:
    """Work out what a network costs.

    Operations are those of convolutions and matrix products, attention's included. Memory is that
    of all tensors that autograd keeps between the passes, attention in its fused form.

    Args:
        config: The network.
        size: Height and width of the images, in pixels.
        batch_size: Images in a batch.

    Raises:
        InvalidInputError: The network cannot take images of this size.

    >>> from fewstep.networks import presets
    >>> cost(presets()["ddpm-cifar10"].config, size=32).parameters
    35746307
    """
    with FakeTensorMode():
        network = build(config).train()
        inputs = _inputs(config, size, batch_size)
        meter = _Meter(network)
        training = _flop_counter()
        with training:
            output = meter.run(inputs)
            output.sum().backward()
        network.checkpointing = True
        checkpointed = _Meter(network)
        checkpointed.run(inputs)
    return NetworkCost(
        batch_size=batch_size,
        shape=(config.in_channels, size, size),
        parts=tuple(meter.parts()),
        parameters=_parameters(network),
        flops=meter.flops,
        training_flops=training.get_total_flops(),
        memory=meter.memory,
        checkpointed_memory=checkpointed.memory,
    )


def _inputs(config: NetworkConfig, size: int, batch: int) -> dict[str, Tensor]:
    inputs = {"x": torch.zeros(batch, config.in_channels, size, size), "t": torch.zeros(batch)}
    if config.context_width:
        inputs["context"] = torch.zeros(batch, 1, config.context_width)
    return inputs


class _Meter:
    """Runs a network once and notes what each part, a layer of the outermost level, does."""

    def __init__(self, network: Network[Any]) -> None:
        self.network = network
        self.memory = 0
        self.flops = 0
        self._memory: dict[str, int] = {}
        self._flops: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._at = ""
        # Storages are told apart by their address; they must live for it to be theirs alone.
        self._kept = {p.untyped_storage()._cdata: p.untyped_storage() for p in _weights(network)}

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        handles = []
        for name, layer in _layers(self.network):
            handles.append(layer.register_forward_pre_hook(self._enter(name)))
            handles.append(layer.register_forward_hook(self._leave(name)))
        with (
            _flop_counter() as counter,
            torch.autograd.graph.saved_tensors_hooks(self._keep, _same),
        ):
            output = self.network(**inputs)
        for handle in handles:
            handle.remove()
        self.flops = counter.get_total_flops()
        root = type(self.network).__name__
        counts = counter.get_flop_counts()
        self._flops = {
            name: sum(counts.get(f"{root}.{name}", {}).values())
            for name, _ in _layers(self.network)
        }
        return output

    def parts(self) -> Iterator[PartCost]:
        """Sum up layers that follow one another in one list and return one resolution."""
        groups: list[tuple[str, list[str]]] = []
        for name, _ in _layers(self.network):
            path, _, index = name.partition(".")
            shape = self._shapes[name]
            title = f"{path} {shape[1]}x{shape[2]}" if index and len(shape) == 3 else path
            if groups and groups[-1][0] == title:
                groups[-1][1].append(name)
            else:
                groups.append((title, [name]))
        layers = dict(_layers(self.network))
        for title, names in groups:
            yield PartCost(
                name=title,
                layers=len(names),
                shape=self._shapes[names[-1]],
                parameters=sum(_parameters(layers[name]) for name in names),
                flops=sum(self._flops[name] for name in names),
                memory=sum(self._memory.get(name, 0) for name in names),
            )

    def _enter(self, name: str) -> Any:
        def enter(layer: nn.Module, inputs: Any) -> None:
            self._at = name

        return enter

    def _leave(self, name: str) -> Any:
        def leave(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            self._at, self._shapes[name] = "", tuple(output.shape[1:])

        return leave

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._kept:
            self._kept[storage._cdata] = storage
            self.memory += storage.nbytes()
            self._memory[self._at] = self._memory.get(self._at, 0) + storage.nbytes()
        return tensor


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of the outermost level in the order of the forward pass; a list gives its members."""
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", layer) for index, layer in enumerate(child))
        else:
            yield name, child


def _weights(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters())


def _parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in _weights(module))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _flop_counter() -> FlopCounterMode:
    """Return a counter that knows the processor's kernel of attention as well."""

    def forward(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(
        upstream: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any
    ) -> int:
        return sdpa_backward_flop_count(upstream, query, key, value)

    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )
