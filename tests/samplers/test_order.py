"""Measured order of convergence, on every path, against an adaptive solver of order eight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from exact_problems import PROCESSES, run, truth
from fewstep.samplers import SAMPLERS

CASES: list[tuple[str, dict[str, Any], int]] = [
    *((e.name, {}, e.order) for e in SAMPLERS if not e.stochastic),
    ("ddim", {"eta": 0.0}, 1),
    ("euler_ancestral", {"eta": 0.0}, 1),
    *(("unipc", {"order": p, "variant": v}, p + 1) for p in (1, 2, 3) for v in ("bh1", "bh2")),
]


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("name", "options", "order"), CASES, ids=str)
def test_order_is_as_stated(
    name: str, options: dict[str, Any], order: int, process: fs.Process
) -> None:
    counts = (40, 80, 160)
    errors = [float((run(name, options, process, n) - truth()).abs().max()) for n in counts]
    assert errors[-1] > 1e-11, "too near rounding to tell"
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert measured[-1] == pytest.approx(order, abs=0.2)
    assert np.mean(measured) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("other", ["vp", "flow"])
@pytest.mark.parametrize(("name", "options"), [case[:2] for case in CASES], ids=str)
def test_every_path_is_the_same_path(name: str, options: dict[str, Any], other: str) -> None:
    """In `x / alpha` over `sigma / alpha` all processes have the same ODE, so all give the same points."""
    on_edm, on_other = (run(name, options, PROCESSES[process], 12) for process in ("edm", other))
    torch.testing.assert_close(on_other, on_edm, rtol=1e-10, atol=1e-10)


def test_more_orders_need_fewer_calls() -> None:
    """At equal network calls the error falls in the order that the metadata promises."""
    errors = [
        float((run(name, options, PROCESSES["edm"], 40) - truth()).abs().max())
        for name, options in (
            ("euler", {}),
            ("dpmpp_2m", {}),
            ("unipc", {}),
            ("unipc", {"order": 3}),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100
