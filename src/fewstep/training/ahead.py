"""The next batch made while the network is busy with this one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from fewstep.training.batches import Batch, Batches


class Ahead:
    """Batches by step, as from `Batches`; within a ``with`` block a thread makes the next one in advance.

    A batch is a function of its step alone, so nothing changes but the time.

    Args:
        batches: Makes them.
        last: The step before which to stop.
    """

    def __init__(self, batches: Batches, last: int) -> None:
        self._batches, self._last = batches, last
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(1, "batches", torch.set_num_threads, (1,))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = self._next = None

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step."""
        if self._pool is None:
            return self._batches[step]
        ready, self._next = self._next, None
        if ready is None or ready[0] != step:
            ready = step, self._pool.submit(self._batches.__getitem__, step)
        batch = ready[1].result()
        if step + 1 < self._last:
            self._next = step + 1, self._pool.submit(self._batches.__getitem__, step + 1)
        return batch
