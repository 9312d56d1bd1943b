"""What to say when a batch needs more memory than there is: measured, not guessed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.errors import MemoryLimitError
from fewstep.training.batches import Batch
from fewstep.training.config import TrainingConfig
from fewstep.training.settings import settings_of

USABLE = 0.8
"""Share of the free memory to count on; the rest is for gradients on their way and for gaps."""

_CPU_MESSAGES = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that no memory was left, on an accelerator or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_MESSAGES)


def saved_bytes(network: nn.Module, loss_of: Callable[[Batch], Tensor], batch: Batch) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, weights not counted.

    Args:
        network: Its weights are left out.
        loss_of: Mean loss over a batch.
        batch: What to measure on.
    """
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(batch)
    return sum(kept.values())


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that a new batch could have, or None where that cannot be known."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        known = [b for b in (_available(), _left_in_group()) if b is not None]
        return min(known, default=None)
    return None


def batch_that_fits(each: int, free: int) -> int:
    """Return how many images fit, each keeping so many bytes; 0: none.

    >>> batch_that_fits(each=100, free=1000)
    8
    """
    return math.floor(USABLE * free / each)


def memory_error(
    config: TrainingConfig,
    network: nn.Module,
    loss_of: Callable[[Batch], Tensor],
    batch: Batch,
    device: torch.device,
) -> MemoryLimitError:
    """Return the error that says which batch size fits into the memory that is free.

    Args:
        config: The settings.
        network: The network in training.
        loss_of: Mean loss over a batch.
        batch: The batch that did not fit.
        device: Where it did not fit.
    """
    size = config.batch_size
    nothing_fits = MemoryLimitError(
        f"not even a batch of one image fits into the memory of {device}; take a smaller --network or --size"
    )
    try:
        one = batch.split(len(batch.x0))[0]
        each = saved_bytes(network, loss_of, one)
        free = free_bytes(device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return nothing_fits
    need = f"a batch of {size} images does not fit into the memory of {device}: each keeps {_size(each)}"
    if free is None:
        return MemoryLimitError(f"{need}; try --batch-size {max(1, size // 2)}")
    # That it did not fit is known better than any estimate.
    fitting = min(batch_that_fits(each, free), size - 1)
    if fitting < 1:
        return nothing_fits
    pieces = ""
    if "accumulate" in settings_of(TrainingConfig):
        before = getattr(config, "accumulate", 1)
        pieces = (
            f", or the same batch in pieces: --accumulate {before * math.ceil(size / fitting)}"
        )
    return MemoryLimitError(
        f"{need}, and {_size(free)} are free; give --batch-size {fitting}{pieces}"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _available() -> int | None:
    """What Linux says it could give to a new process; elsewhere unused pages, where they can be asked for."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _left_in_group() -> int | None:
    """What the control group (a container) still allows, if it has a limit."""
    try:
        limit, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip()
            for name in ("max", "current")
        )
        return None if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return None
