"""Which worker this is, and what a team of one does without accelerate."""

from __future__ import annotations

import sys

import pytest
import torch

from fewstep.errors import InvalidInputError
from fewstep.team import Group, Team, join


def test_without_a_launcher_there_is_one_worker(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Team.launched() == Team()
    group = join("cpu")
    flat = torch.ones(3)
    assert (group.size, group.is_main, group.sum(flat) is flat) == (1, True, True)
    assert group.any(True) and not group.any(False)
    assert group.main_does(lambda: 5, 6) == 5
    with pytest.raises(ZeroDivisionError):
        group.main_does(lambda: 1 / 0, 6)


def test_the_launcher_says_who_this_is(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Team.launched() == Team(5, 8, 1)


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("one", "2"), ("0", "two")])
def test_an_environment_that_makes_no_sense(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InvalidInputError, match="torchrun or accelerate"):
        Team.launched()


def test_without_accelerate_the_remedy_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InvalidInputError, match=r"pip install 'fewstep\[train\]'"):
        join("cpu")


def test_devices(monkeypatch):
    assert Team().device("cuda:1") == "cuda:1"
    assert Team(1, 2, 1).device("cpu") == "cpu"
    with pytest.raises(InvalidInputError, match="one device for 2 workers; give 'cuda'"):
        Team(1, 2, 1).device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert Team(6, 8, 2).device(None) == Team(6, 8, 2).device("cuda") == "cuda:2"


def test_a_group_is_a_team():
    assert Group(1, 2, 1) != Team() and not Group(1, 2).is_main
