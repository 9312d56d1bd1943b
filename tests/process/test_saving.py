"""Processes as plain data, and options that make no process."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fewstep import process as fp
from fewstep.errors import InvalidInputError, UnknownNameError
from fewstep.process import Process

EVERY = [
    fp.vp_linear(),
    fp.vp_linear(steps=30, beta_start=1e-3, beta_end=0.2, zero_terminal_snr=True),
    fp.vp_scaled_linear(beta_end=0.018),
    fp.vp_cosine(offset=0.01, max_beta=0.99),
    fp.vp_sigmoid(start=0, tau=0.7),
    fp.vp_sigmoid_beta(steps=12),
    fp.vp_from_betas(np.linspace(0.01, 0.1, 7)),
    fp.vp_from_betas(torch.tensor([0.1, 0.25]), zero_terminal_snr=True),
    fp.vp_continuous(0.2, 15.0, 1e-4),
    fp.ve(0.02, 378.0),
    fp.edm(0.01, 700.0),
    fp.flow(0.01),
]


def test_every_process_is_listed_here() -> None:
    assert {process.name for process in EVERY} == set(fp.PROCESSES)


@pytest.mark.parametrize("process", EVERY, ids=lambda p: repr(p)[:50])
def test_round_trip_through_json(process: Process) -> None:
    text = json.dumps(process.to_dict(), allow_nan=False)
    again = fp.from_dict(json.loads(text))
    assert again == process
    assert hash(again) == hash(process)
    assert again.to_dict() == process.to_dict()
    times = [process.table_time(i) for i in range(process.training_steps)]
    assert again.levels(times) == process.levels(times)


@pytest.mark.parametrize("process", EVERY, ids=lambda p: repr(p)[:50])
def test_repr_makes_the_process_again(process: Process) -> None:
    assert eval(repr(process), dict(vars(fp))) == process


def test_other_options_make_another_process() -> None:
    assert fp.flow() != fp.flow(0.01)
    assert fp.edm() != fp.ve(0.002, 80.0)
    assert fp.vp_linear() != fp.vp_linear(zero_terminal_snr=True)
    assert len(set(EVERY)) == len(EVERY)


def test_to_dict_does_not_hand_out_the_inside() -> None:
    process = fp.flow()
    process.to_dict()["t_min"] = 0.5
    assert process.to_dict() == {"name": "flow", "t_min": 1e-3}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"name": "vp_linaer"}, ["process 'vp_linaer'", "did you mean 'vp_linear'", "flow"]),
        ({"t_min": 0.1}, ["process 'None'", "flow"]),
        ({"name": ["ve"]}, ["unknown process", "ve"]),
        ({"name": "ve", "sigma_mim": 1}, ["option of process ve", "'sigma_min'"]),
    ],
    ids=str,
)
def test_unknown_names(config: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        fp.from_dict(config)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"name": "ve", "sigma_min": "small"}, ["process ve"]),
        ({"name": "ve", "sigma_min": 3.0, "sigma_max": 2.0}, ["sigma_min < sigma_max", "3", "2"]),
        ({"name": "edm", "sigma_min": 0.0}, ["edm", "0 < sigma_min"]),
        ({"name": "edm", "sigma_max": math.inf}, ["edm", "inf"]),
        ({"name": "flow", "t_min": 1.0}, ["flow", "t_min < 1"]),
        ({"name": "flow", "t_min": math.nan}, ["flow", "nan"]),
        ({"name": "vp_continuous", "beta_min": -1.0}, ["vp_continuous", "-1"]),
        ({"name": "vp_continuous", "t_min": 0.0}, ["vp_continuous", "t_min"]),
        ({"name": "vp_linear", "steps": 1}, ["vp_linear", "steps", "whole number >= 2", "1"]),
        ({"name": "vp_linear", "steps": 10.5}, ["vp_linear", "steps", "10.5"]),
        ({"name": "vp_linear", "steps": "ten"}, ["vp_linear", "steps", "'ten'"]),
        ({"name": "vp_linear", "beta_start": 0.0}, ["vp_linear", "beta 0 is 0"]),
        ({"name": "vp_linear", "steps": 3, "beta_end": 1.5}, ["vp_linear", "beta 2 is 1.5"]),
        ({"name": "vp_linear", "beta_start": "x"}, ["vp_linear"]),
        ({"name": "vp_scaled_linear", "beta_start": -1.0}, ["vp_scaled_linear", "nan"]),
        ({"name": "vp_cosine", "offset": -1.0}, ["vp_cosine", "nan"]),
        ({"name": "vp_sigmoid", "tau": 0.0}, ["vp_sigmoid", "beta"]),
        ({"name": "vp_from_betas"}, ["vp_from_betas", "betas"]),
        ({"name": "vp_from_betas", "betas": "abc"}, ["vp_from_betas", "'abc'"]),
        ({"name": "vp_from_betas", "betas": [0.1]}, ["at least two", "(1,)"]),
        ({"name": "vp_from_betas", "betas": [[0.1], [0.2]]}, ["shape (2, 1)"]),
        ({"name": "vp_from_betas", "betas": [[0.1], [0.2, 0.3]]}, ["list of at least two"]),
        ({"name": "vp_from_betas", "betas": [0.1, 1.0, 0.2]}, ["only the last", "beta 1 is 1"]),
        ({"name": "vp_from_betas", "betas": [0.1, math.nan, 0.2]}, ["beta 1 is nan"]),
        ({"name": "vp_from_betas", "betas": [0.1, 0.2, 1.1]}, ["beta 2 is 1.1"]),
        ({"name": "vp_from_betas", "betas": []}, ["at least two"]),
    ],
    ids=str,
)
def test_options_out_of_range(config: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        fp.from_dict(config)
    for part in parts:
        assert part in str(caught.value)
