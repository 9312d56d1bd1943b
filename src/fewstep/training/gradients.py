"""Gradients of a batch, computed in equal parts on several threads of the processor.

The operations of a small network are short. When torch shares each of them out over its own threads, these spend
much of their time waiting for one another, hundreds of times in a step; worse so on a busy machine. Here each
thread takes its part of the batch through the whole network, and they meet once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from fewstep.training.batches import Batch


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
    """

    def __init__(
        self, network: nn.Module, loss_of: Callable[[Batch], Tensor], parts: int, *, threaded: bool
    ) -> None:
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.loss_of, self.parts, self.threaded = loss_of, parts, threaded and parts > 1
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

    def __call__(self, batch: Batch) -> Tensor:
        """Set the gradients; return the mean loss, shape ()."""
        pieces = batch.split(self.parts)
        shares = [len(piece.x0) / len(batch.x0) for piece in pieces]
        each = map if self._pool is None else self._pool.map
        losses, gradients = zip(*each(self._gradient, pieces, shares), strict=True)
        total = list(gradients[0])
        for more in gradients[1:]:
            for gradient, addend in zip(total, more, strict=True):
                gradient.add_(addend)
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = _ordered_as(parameter, gradient)
        return torch.stack(losses).sum()

    def _gradient(self, piece: Batch, share: float) -> tuple[Tensor, Sequence[Tensor]]:
        loss = share * self.loss_of(piece)
        return loss.detach(), torch.autograd.grad(loss, self.parameters, materialize_grads=True)


def _ordered_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the memory order of its parameter, which the fused optimiser takes for granted."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
