"""Work shared out over threads of the processor, each with one of torch's own.

The operations of a small network are short. When torch shares each of them out over its threads, these spend much of
their time waiting for one another, hundreds of times in a network call; worse so on a busy machine. Whole network calls
side by side wait for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device | None
) -> Iterator[Result]:
    """Yield ``function(item) for item in items``, in order, worked out on as many threads as torch has.

    Gradients are recorded as where it is called. One item alone, and what lies on an accelerator, takes no threads.

    Args:
        function: Must be fit to be called from several threads at once. What it raises is raised here, in its turn;
            items that are not begun then are left out.
        items: What it is called with.
        device: Where it computes; None: a processor.

    >>> list(spread(lambda x: x * x, range(4), None))
    [0, 1, 4, 9]
    """
    work, threads, recording = list(items), torch.get_num_threads(), torch.is_grad_enabled()
    workers = min(threads, len(work))
    if workers < 2 or (device is not None and device.type != "cpu"):
        yield from map(function, work)
        return

    def prepare() -> None:
        torch.set_num_threads(max(1, threads // workers))
        torch.set_grad_enabled(recording)

    pool = ThreadPoolExecutor(workers, "spread", initializer=prepare)
    try:
        yield from pool.map(function, work)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
