"""Gradients of a batch, computed in equal parts on several threads of the processor.

Small networks on a CPU are held up by the threads of each operation waiting for one another, hundreds of
times in a step. Here each thread takes its part of the batch through the whole network, and they meet once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import torch
from torch import Tensor, nn

from fewstep.training.batches import Batch


class Gradients:
    """Puts the gradient of the mean loss over a batch into ``.grad`` of a network's parameters.

    The parts are added in their order, so the result does not depend on which thread is done first.

    Args:
        network: The network.
        loss_of: Mean loss over a batch, called in several threads at once.
        parts: How many parts to cut each batch into.
        threaded: Whether each part has its own thread.
    """

    def __init__(
        self, network: nn.Module, loss_of: Callable[[Batch], Tensor], parts: int, *, threaded: bool
    ) -> None:
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.loss_of, self.parts, self.threaded = loss_of, parts, threaded and parts > 1

    def __call__(self, batch: Batch) -> Tensor:
        """Set the gradients; return the mean loss, shape ()."""
        pieces = batch.split(self.parts)
        shares = [len(piece.x0) / len(batch.x0) for piece in pieces]
        run = self._pool.map if self.threaded else map
        losses, gradients = zip(*run(self._gradient, pieces, shares), strict=True)
        total = list(gradients[0])
        for more in gradients[1:]:
            torch._foreach_add_(total, more)
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = gradient
        return torch.stack(losses).sum()

    def _gradient(self, piece: Batch, share: float) -> tuple[Tensor, Sequence[Tensor]]:
        loss = share * self.loss_of(piece)
        return loss.detach(), torch.autograd.grad(loss, self.parameters, materialize_grads=True)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        available = torch.get_num_threads()
        each = max(1, available // self.parts)
        pool = ThreadPoolExecutor(self.parts, "gradients", torch.set_num_threads, (each,))
        torch.set_num_threads(available)
        return pool
