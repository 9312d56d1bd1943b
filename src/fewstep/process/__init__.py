"""Forward processes: how data turns into noise, `x_t = alpha(t) x_0 + sigma(t) noise`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fewstep.errors import InvalidInputError, unknown_name
from fewstep.process.base import Process
from fewstep.process.continuous import edm, flow, ve, vp_continuous
from fewstep.process.discrete import (
    DiscreteVP,
    vp_cosine,
    vp_from_betas,
    vp_linear,
    vp_scaled_linear,
    vp_sigmoid,
    vp_sigmoid_beta,
)
from fewstep.process.level import Kernel, Level, Posterior, forward_kernel, log_snr_step, posterior

PROCESSES: dict[str, Callable[..., Process]] = {
    make.__name__: make
    for make in (
        vp_linear,
        vp_scaled_linear,
        vp_cosine,
        vp_sigmoid,
        vp_sigmoid_beta,
        vp_from_betas,
        vp_continuous,
        ve,
        edm,
        flow,
    )
}


def from_dict(config: Mapping[str, Any]) -> Process:
    """Make a process from `Process.to_dict()`.

    Raises:
        UnknownNameError: If no process has that name.
        InvalidInputError: If an option is unknown or out of range.

    >>> from_dict({"name": "flow", "t_min": 0.01})
    flow(t_min=0.01)
    """
    options = dict(config)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in PROCESSES:
        raise unknown_name("process", name, PROCESSES)
    known = inspect.signature(PROCESSES[name]).parameters
    for option in options:
        if option not in known:
            raise unknown_name(f"option of process {name}", option, known)
    try:
        return PROCESSES[name](**options)
    except InvalidInputError:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"process {name}: {error}") from error


__all__ = [
    "PROCESSES",
    "DiscreteVP",
    "Kernel",
    "Level",
    "Posterior",
    "Process",
    "edm",
    "flow",
    "forward_kernel",
    "from_dict",
    "log_snr_step",
    "posterior",
    "ve",
    "vp_continuous",
    "vp_cosine",
    "vp_from_betas",
    "vp_linear",
    "vp_scaled_linear",
    "vp_sigmoid",
    "vp_sigmoid_beta",
]
