"""Measured order of convergence, on every path, against an adaptive solver of order eight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fewstep as fs
from exact_problems import PROCESSES, START, grid, guided_mixture, run, truth
from fewstep.samplers import SAMPLERS
from sampler_cases import CASES, TRACED, Case, corrected, draws_noise

FIRST, COUNTS = 100.0, (96, 192)
"""Steps are multiples of 6, as dpm_fast needs: it ends with steps of another order for every other number."""

STATED = [
    *((Case(e), e.order) for e in TRACED if not e.stochastic and e.order),
    *((corrected(e), e.corrected_order) for e in TRACED if not e.stochastic and e.corrected_order),
    (Case(SAMPLERS.find("ddim"), {"eta": 0.0}), 1),
    (Case(SAMPLERS.find("euler_ancestral"), {"eta": 0.0}), 1),
    *(
        (Case(SAMPLERS.find("unipc"), {"order": p, "variant": v}), p + 1)
        for p in (1, 3)
        for v in ("bh1", "bh2")
    ),
]
DETERMINISTIC = [case for case in CASES if case.is_path_invariant and not draws_noise(case)]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("case", "order"), STATED, ids=str)
def test_order_is_as_stated(case: Case, order: int, process: str) -> None:
    ends = (run(case.name, case.options, PROCESSES[process], n, FIRST) for n in COUNTS)
    errors = [float((end - truth(FIRST)).abs().max()) for end in ends]
    assert errors[-1] > 1e-11, "too near rounding to tell"
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert measured[-1] == pytest.approx(order, abs=0.2), measured


def end(case: Case, process: str, steps: int) -> Tensor:
    """The end of the guided path in the coordinates of alpha = 1."""
    levels = grid(PROCESSES[process], steps)
    plan = fs.plan(case.name, levels, **case.options)
    first, last = levels.levels[0], levels.levels[-1]
    return plan.run(guided_mixture(levels.process), first.alpha * START) / last.alpha


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_every_path_is_the_same_path(case: Case) -> None:
    """In `x / alpha` over `sigma / alpha` all processes have the same ODE, so all give the same points."""
    on_edm, *others = (end(case, process, 12) for process in ("edm", "vp", "flow"))
    for other in others:
        torch.testing.assert_close(other, on_edm, rtol=1e-10, atol=1e-10)


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
