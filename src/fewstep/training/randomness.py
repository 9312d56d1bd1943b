"""Every random number of a training run is a pure function of the seed, its purpose and the step.

Nothing is carried from step to step, so there is no generator whose state could be lost: a run that is
resumed at step k draws what it would have drawn had it never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor


def seed_of(seed: int, purpose: str, index: int) -> int:
    """Return 63 bits that depend on all three arguments and look random.

    >>> seed_of(0, "noise", 1) == seed_of(0, "noise", 1) != seed_of(0, "times", 1)
    True
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: str, index: int) -> Generator:
    """Return a fresh CPU generator; drawing on the CPU makes the numbers the same on every device."""
    return Generator().manual_seed(seed_of(seed, purpose, index))


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed torch's global generators within the block, and leave them as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


class BatchOrder:
    """Which images step k sees: shuffled epochs laid end to end, cut into batches of one size.

    Every image is seen once in an epoch; a batch may reach over the end of an epoch into the next.

    Args:
        count: Number of images.
        batch_size: Images in a batch.
        seed: Seed of the run.

    >>> order = BatchOrder(count=4, batch_size=2, seed=0)
    >>> sorted(torch.cat([order.batch(0), order.batch(1)]).tolist())
    [0, 1, 2, 3]
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def batch(self, step: int) -> Tensor:
        """Return the indices of the images of a step, int64, shape (batch_size,)."""
        first = step * self.batch_size
        pieces, position = [], first
        while position < first + self.batch_size:
            epoch, start = divmod(position, self.count)
            stop = min(self.count, start + first + self.batch_size - position)
            pieces.append(self._shuffled(epoch)[start:stop])
            position += stop - start
        return torch.cat(pieces)

    def _shuffled(self, epoch: int) -> Tensor:
        if epoch != self._epoch:  # the last permutation is kept only because making it takes time
            self._epoch = epoch
            self._permutation = torch.randperm(
                self.count, generator=generator(self.seed, "order", epoch)
            )
        return self._permutation
