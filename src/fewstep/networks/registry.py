"""Every class of network, by the name that saved models know it by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.errors import unknown_name
from fewstep.networks.base import Network, NetworkConfig
from fewstep.networks.dit import DiT
from fewstep.networks.dit_config import DiTConfig
from fewstep.networks.unet import UNet
from fewstep.networks.unet_config import UNetConfig

NETWORKS: dict[str, tuple[type[UNet] | type[DiT], type[NetworkConfig]]] = {
    "unet": (UNet, UNetConfig),
    "dit": (DiT, DiTConfig),
}


def class_of(config: NetworkConfig) -> str:
    """Return the name of the class of network that a configuration is for.

    >>> class_of(DiTConfig())
    'dit'
    """
    return next(name for name, (_, kind) in NETWORKS.items() if type(config) is kind)


def build(config: Any) -> Network[Any]:
    """Return a network with new weights, drawn from torch's global generator."""
    network, _ = NETWORKS[class_of(config)]
    return network(config)


def config_from_dict(fields: Mapping[str, Any]) -> NetworkConfig:
    """Build a configuration from its fields and, as ``class``, the name of its class.

    Raises:
        KeyError: There is no ``class``.
        InvalidInputError: An unknown class or field, or a value out of range.

    >>> config_from_dict({"class": "dit", "depth": 3}).to_dict()["depth"]
    3
    """
    options = dict(fields)
    name = options.pop("class")
    if name not in NETWORKS:
        raise unknown_name("network class", name, NETWORKS)
    return NETWORKS[name][1].from_dict(options)


def config_to_dict(config: NetworkConfig) -> dict[str, Any]:
    """Return what `config_from_dict` reads, ready for JSON."""
    return {"class": class_of(config), **config.to_dict()}
