"""A strict environment for every test: fixed threads, and no trace left in global state."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable

import hypothesis
import numpy as np
import pytest
import torch

# A property must not fail because the machine is busy, and CI must not find by luck what the
# developer cannot repeat.
hypothesis.settings.register_profile("fewstep", deadline=None, print_blob=True)
hypothesis.settings.register_profile(
    "fewstep-ci", hypothesis.settings.get_profile("fewstep"), derandomize=True
)
hypothesis.settings.load_profile("fewstep-ci" if os.environ.get("CI") else "fewstep")


def pytest_configure(config: pytest.Config) -> None:
    # Each xdist worker computes with one thread, and so do the processes that tests start; this
    # also keeps the order of floating-point sums the same on every machine.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # Fixtures may build networks, whose initial weights come from the global generator: they get
    # the same weights whatever ran before.
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that changed global state; `@pytest.mark.global_rng` allows the generators."""
    threads = torch.get_num_threads()
    before = _generator_states()
    try:
        result = yield
        changed = [name for name, state in _generator_states().items() if state != before[name]]
        if changed and not item.get_closest_marker("global_rng"):
            pytest.fail(
                f"the test changed the global generator of {' and '.join(changed)}; use a "
                "torch.Generator or fewstep.Noise, or mark it @pytest.mark.global_rng"
            )
        if torch.get_default_dtype() != torch.float32:
            pytest.fail(f"the test left torch's default dtype at {torch.get_default_dtype()}")
        return result
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


def _generator_states() -> dict[str, bytes]:
    name, keys, position, *_ = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": f"{name}:{position}:".encode() + np.asarray(keys).tobytes(),
    }
