"""Work on several threads is that work, in order."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from fewstep.threads import spread


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_several_threads(two_threads):
    def slow(k: int) -> tuple[int, int, int]:
        time.sleep(0.05 if k == 0 else 0.0)
        return k, threading.get_ident(), torch.get_num_threads()

    found = list(spread(slow, range(6), None))
    assert [k for k, _, _ in found] == list(range(6))
    assert len({thread for _, thread, _ in found}) == 2
    assert {threads for _, _, threads in found} == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("recording", [True, False])
def test_gradients_are_recorded_as_outside(two_threads, recording):
    weight = torch.ones(1, requires_grad=True)
    with torch.set_grad_enabled(recording):
        found = list(spread(lambda k: weight * k, range(3), None))
    assert [x.requires_grad for x in found] == [recording] * 3


def test_what_is_raised_comes_through_and_the_rest_is_left_out(two_threads):
    begun = []

    def fail(k: int) -> int:
        begun.append(k)
        time.sleep(0.02)
        if k == 1:
            raise ValueError("one")
        return k

    with pytest.raises(ValueError, match="one"):
        list(spread(fail, range(100), None))
    assert len(begun) < 20
    assert torch.get_num_threads() == 2


def test_one_item_is_worked_out_where_it_is_asked_for(two_threads):
    assert list(spread(lambda _: threading.get_ident(), [0], None)) == [threading.get_ident()]
