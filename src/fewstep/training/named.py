"""Settings that name one entry of a list and give its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.errors import unknown_name
from fewstep.registry import Entry, Registry


def full_form(registry: Registry[Entry], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name and all options, checked and with the defaults filled in.

    Args:
        registry: The entries.
        settings: A name and some options, ``{"name": "min_snr", "gamma": 5}``.

    Raises:
        UnknownNameError: There is no such entry or option.
        InvalidInputError: An option is out of range.
    """
    options = dict(settings)
    name = options.pop("name", None)
    if name not in registry.names():
        raise unknown_name(registry.kind, name, registry.names())
    return {"name": name, **registry.find(name).resolve(options)}
