"""Gradients of a batch, computed in equal parts on several threads of the processor.

The operations of a small network are short. When torch shares each of them out over its own threads, these spend
much of their time waiting for one another, hundreds of times in a step; worse so on a busy machine. Here each
thread takes its part of the batch through the whole network, and they meet once.

Several workers meet once as well, after their own gradients are complete. The gradients come from
`torch.autograd.grad`, so that threads do not write to the same ``.grad``; the hooks by which
`DistributedDataParallel` starts to send each gradient as soon as it is there never fire then. One sum of a flat
buffer takes their place: its time is hidden behind nothing, but it is one message a step instead of one a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from fewstep.team import Group
from fewstep.training.batches import Batch

MOST_WEIGHTS = 500_000
"""Weights for each image of a batch, above which handling all weights once more costs more than waiting threads do."""


def usual_parts(network: nn.Module, images: int) -> int:
    """Return how many parts a batch is cut into by default; it does not depend on the machine, as rounding does on it.

    Args:
        network: The network.
        images: Images in the batch.

    >>> network = nn.Linear(2000, 1000, bias=False)
    >>> usual_parts(network, 4), usual_parts(network, 3)
    (2, 1)
    """
    weights = sum(parameter.numel() for parameter in network.parameters())
    return 1 if weights > MOST_WEIGHTS * images else 2


class Gradients:
    """Puts the gradient of the mean loss over a batch into ``.grad`` of a network's parameters.

    The parts are added in their order, so the result does not depend on which thread is done first. Within
    a ``with`` block each part has a thread, and torch's own threads are shared out evenly among them;
    outside, the parts are computed one after the other.

    Args:
        network: The network.
        loss_of: Mean loss over a batch; must be fit to be called from several threads at once.
        parts: How many parts to cut each batch into, 1 or more.
        threaded: False: one after the other within the block as well.
        accumulate: Pieces of a batch that follow one another, each cut into parts; memory is needed for one alone.
        group: The workers that have a share of each batch; a team of one if left out.
    """

    def __init__(
        self,
        network: nn.Module,
        loss_of: Callable[[Batch], Tensor],
        parts: int,
        *,
        threaded: bool,
        accumulate: int = 1,
        group: Group | None = None,
    ) -> None:
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.loss_of, self.parts, self.threaded = loss_of, parts, threaded and parts > 1
        self.accumulate, self.group = accumulate, group or Group()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.threaded:
            self._all_threads = torch.get_num_threads()
            each = max(1, self._all_threads // self.parts)
            torch.set_num_threads(each)
            self._pool = ThreadPoolExecutor(
                self.parts, "gradients", initializer=torch.set_num_threads, initargs=(each,)
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            torch.set_num_threads(self._all_threads)

    def __call__(self, batch: Batch, whole: int | None = None) -> Tensor:
        """Set the gradients; return the mean loss, shape ().

        Args:
            batch: What this worker computes.
            whole: Images in the batches of all workers together; None: those of this one.
        """
        losses: list[Tensor] = []
        total: list[Tensor] = []
        for piece in batch.split(self.accumulate):
            parts = piece.split(self.parts)
            shares = [len(part.x0) / (whole or len(batch.x0)) for part in parts]
            each = map if self._pool is None else self._pool.map
            for loss, gradients in each(self._gradient, parts, shares):
                losses.append(loss)
                if not total:
                    total = list(gradients)
                    continue
                for gradient, addend in zip(total, gradients, strict=True):
                    gradient.add_(addend)
        loss = self._over_all_workers(torch.stack(losses).sum(), total)
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = _ordered_as(parameter, gradient)
        return loss

    def _over_all_workers(self, loss: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        """Add up losses and gradients of all workers, in place; each has been given the weight of its share."""
        if self.group.size == 1:
            return loss
        flat = self.group.sum(torch.cat([loss.reshape(1), *(g.reshape(-1) for g in gradients)]))
        sizes = [1, *(gradient.numel() for gradient in gradients)]
        loss, *sums = flat.split(sizes)
        for gradient, summed in zip(gradients, sums, strict=True):
            gradient.copy_(summed.view_as(gradient))
        return loss.reshape(())

    def _gradient(self, piece: Batch, share: float) -> tuple[Tensor, Sequence[Tensor]]:
        loss = share * self.loss_of(piece)
        return loss.detach(), torch.autograd.grad(loss, self.parameters, materialize_grads=True)


def _ordered_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the memory order of its parameter, which the fused optimiser takes for granted."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
