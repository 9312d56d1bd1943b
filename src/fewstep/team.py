"""The worker processes of one run, launched together by `torchrun` or `accelerate launch`.

In this library a process is a forward process; what the operating system calls so is a *worker* here, and all
workers of a run are its *team*. A run that was started as usual is a team of one, for which nothing below costs
anything and accelerate is not imported.
"""

from __future__ import annotations

import datetime
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewstep.errors import InvalidInputError, WorkerError

Result = TypeVar("Result")

PATIENCE = datetime.timedelta(days=1)
"""How long workers wait for one that decodes images or draws samples; that one has ended they notice at once."""

LAST_WORD = 1.0
"""Seconds that others leave to a worker that failed: a launcher ends all of them once the first has ended."""


@dataclass(frozen=True)
class Team:
    """Which worker this is, and of how many.

    Args:
        rank: Number of this worker, from 0; worker 0 is the main one, which writes and speaks.
        size: Number of workers.
        local_rank: Number of this worker on its machine.

    >>> Team().is_main, Team(rank=2, size=3).is_main
    (True, False)
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def launched(cls) -> Team:
        """Return the team that the launcher tells of in the environment; a team of one without launcher.

        Raises:
            InvalidInputError: What the environment says of the team is no number, or does not fit together.
        """
        rank, size, local = (
            _number(name, default)
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if not 0 <= rank < size:
            raise InvalidInputError(
                f"the environment says RANK={rank} and WORLD_SIZE={size}; ranks are 0 to WORLD_SIZE - 1: launch with "
                "torchrun or accelerate, or remove these variables"
            )
        return cls(rank, size, local)

    @property
    def is_main(self) -> bool:
        """Whether this is the worker that writes and speaks."""
        return self.rank == 0

    def device(self, device: str | torch.device | None) -> str | torch.device | None:
        """Return the device of this worker: of a kind that has several, the one with its number on the machine.

        Args:
            device: What was asked for; None: CUDA if there is any, else the CPU.

        Raises:
            InvalidInputError: One device was asked for by number, which several workers would share.
        """
        if self.size == 1 or (device is None and not torch.cuda.is_available()):
            return device
        asked = str(device or "cuda")
        kind, _, index = asked.partition(":")
        if index:
            raise InvalidInputError(
                f"device {asked!r} is one device for {self.size} workers; give {kind!r}, and each takes its own"
            )
        if kind != "cuda" or not torch.cuda.is_available():
            return device
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"


class Group(Team):
    """A team whose workers compute together: they meet in every step, and none goes on without the others.

    Made by `join`. In a team of one every method returns at once.
    """

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all workers, the same bits on each.

        Raises:
            WorkerError: Another worker has ended.
        """
        if self.size == 1:
            return tensor
        from accelerate.utils import reduce

        with _meeting():
            return reduce(tensor, reduction="sum")  # pyright: ignore[reportReturnType]

    def any(self, flag: bool) -> bool:
        """Say whether any worker raised its flag. The processors meet; no worker waits for its accelerator.

        Raises:
            WorkerError: Another worker has ended.
        """
        if self.size == 1:
            return flag
        return bool(self._agreed(int(flag), torch.distributed.ReduceOp.MAX))

    def require_same(self, what: str, number: int) -> None:
        """Refuse to go on where the workers do not agree on a number below 2^63.

        Raises:
            InvalidInputError: They do not; the message says on what.
        """
        if self.size == 1:
            return
        operations = torch.distributed.ReduceOp
        if self._agreed(number, operations.MIN) != self._agreed(number, operations.MAX):
            raise InvalidInputError(
                f"the workers do not agree on {what}; launch all with the same command, and let all machines see the "
                "same files"
            )

    def take_from_main(self, tensors: Sequence[Tensor]) -> None:
        """Fill tensors with those of the main worker."""
        if self.size == 1:
            return
        with _meeting(), torch.no_grad():
            for tensor in tensors:
                own = tensor.detach().contiguous()
                torch.distributed.broadcast(own, 0)
                tensor.copy_(own)

    def main_does(self, action: Callable[[], Result], instead: Result) -> Result:
        """Let the main worker do something while the others wait for it; if it fails there, it fails everywhere.

        Args:
            action: Called on the main worker alone.
            instead: What the others return.

        Raises:
            WorkerError: On the others, if the action failed; the main worker raises the error itself.
        """
        return self._some_do(self.is_main, action, lambda: instead)

    def first_on_machine(self, action: Callable[[], Result]) -> Result:
        """Let the first worker of each machine do something, and then the others: what it left on disk they find.

        Args:
            action: Called on every worker.

        Raises:
            WorkerError: The action failed on a first worker, which raises the error itself.
        """
        return self._some_do(self.local_rank == 0, action, action)

    def _some_do(
        self, now: bool, action: Callable[[], Result], instead: Callable[[], Result]
    ) -> Result:
        """Let some workers do something while the others wait; these go on with another thing."""
        failure, result = None, None
        if now:
            try:
                result = action()
            except Exception as error:
                failure = error
        failed = self.any(failure is not None)
        if failure is not None:
            raise failure
        if failed:
            time.sleep(LAST_WORD)
            raise WorkerError("another worker could not go on; its message says why")
        return result if now else instead()  # pyright: ignore[reportReturnType]

    def _agreed(self, number: int, operation: Any) -> int:
        told = torch.tensor(number)
        with _meeting():
            torch.distributed.all_reduce(told, operation, group=_processors())
        return int(told)


def join(device: str | torch.device | None = None) -> Group:
    """Join the team of this run; where there is no launcher, that is a team of one.

    Args:
        device: Where this worker computes, as `Team.device` gives it; decides how tensors travel.

    Raises:
        InvalidInputError: accelerate is not installed.
    """
    team = Team.launched()
    if team.size == 1:
        return Group()
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InvalidInputError(
            f"{team.size} workers were launched, but accelerate, by which they meet, is not installed; "
            "pip install 'fewstep[train]', or start without a launcher"
        ) from error
    with _meeting():
        state = PartialState(cpu=torch.device(device or "cpu").type == "cpu")
        _processors()  # now, for all are here: whoever came later than some minutes would not be waited for
        return Group(state.process_index, state.num_processes, state.local_process_index)


def leave() -> None:
    """Dissolve the group of the team, if there is one; for the end of a program."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _processors.cache_clear()
        torch.distributed.destroy_process_group()


@functools.cache
def _processors() -> Any:
    """The group in which processors meet, and in which they wait for each other for long.

    It is one beside the group of the gradients, in which accelerators would have to be waited for.
    """
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def _meeting() -> Iterator[None]:
    """Say in plain words what torch raises when a worker does not come."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerError(
            "another worker of this run has ended or cannot be reached; its message says why. What is saved is "
            f"unharmed: launch the same command again to go on ({str(error).strip().splitlines()[0][:120]})"
        ) from error


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError as error:
        raise InvalidInputError(
            f"the environment says {name}={text!r}, which is no whole number; launch with torchrun or accelerate, or "
            "remove the variable"
        ) from error
