"""A network as an estimator of x_0."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewstep.denoisers.parameterisation import Parameterisation
from fewstep.errors import InvalidInputError
from fewstep.process import Level, Process


class Denoiser:
    """A network, its forward process and what it predicts: together an estimator `denoiser(x, level) -> x_0`.

    Wrappers such as guidance or clipping are Denoisers again. A Denoiser holds no state.

    Args:
        network: Any callable `(x, t, **conditions) -> output`, x of shape (B, ...), t of shape (B,) in the process's
            unit. The output has x's shape; one with twice the channels is taken for a learned-variance network, and
            its second half is left aside.
        process: The forward process that the network was trained with.
        predicts: "noise", "data", "velocity", "flow", "score" or "edm".
        conditions: Keyword arguments for the network, such as labels; tensors have the batch as first dimension.

    Raises:
        UnknownNameError: If there is no such prediction.

    >>> import torch, fewstep as fs
    >>> denoiser = Denoiser(lambda x, t: torch.zeros_like(x), fs.process.edm(), predicts="data")
    >>> denoiser(torch.ones(2, 3), denoiser.process.level(1.0)).abs().max().item()
    0.0
    """

    parameterisation: Parameterisation | None
    passes = 1
    """Network passes for one call: 2 where guidance evaluates a second one."""

    def __init__(
        self,
        network: Callable[..., Tensor],
        process: Process,
        predicts: str = "noise",
        conditions: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(process, Process):
            raise InvalidInputError(
                f"process must be a fewstep process such as fewstep.process.vp_linear(), got {process!r}"
            )
        self.network = network
        self.process = process
        self.parameterisation = Parameterisation(predicts)
        self.conditions = dict(conditions or {})

    @property
    def predicts(self) -> str:
        """What the network's output means."""
        assert self.parameterisation is not None
        return self.parameterisation.predicts

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """Estimate x_0.

        Args:
            x: The point, shape (B, ...), float32 or float64.
            level: Its noise level.

        Returns:
            The estimate, in x's shape and type.
        """
        assert self.parameterisation is not None
        skip, out = self.parameterisation.skip_out(level)
        return skip * x + out * self.output(x, level)

    def output(self, x: Tensor, level: Level) -> Tensor:
        """The network's own output at a point, in x's shape and type; the network runs in its own type."""
        assert self.parameterisation is not None
        scale = self.parameterisation.input_scale(level)
        inputs = x if scale == 1.0 else x * scale
        dtype = self._dtype
        if dtype is not None and dtype != x.dtype:
            inputs = inputs.to(dtype)
        time_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        t = torch.full(
            (x.shape[0],), self.parameterisation.time(level), dtype=time_dtype, device=x.device
        )
        output = self.network(inputs, t, **self.conditions)
        if output.shape != x.shape:
            output = _without_variance(output, x)
        return output if output.dtype == x.dtype else output.to(x.dtype)

    def with_conditions(self, **conditions: Any) -> Self:
        """The same denoiser with these conditions added."""
        new = copy.copy(self)
        new.conditions = {**self.conditions, **conditions}
        return new

    def for_run(self) -> Self:
        """The denoiser to use for one run of a Plan; one that remembers earlier calls returns a fresh copy."""
        return self

    @property
    def _dtype(self) -> torch.dtype | None:
        """The type a torch module computes in."""
        if not isinstance(self.network, nn.Module):
            return None
        if "dtype" not in self.__dict__:
            floating = (p.dtype for p in self.network.parameters() if p.is_floating_point())
            self.__dict__["dtype"] = next(floating, None)
        return self.__dict__["dtype"]


def _without_variance(output: Tensor, x: Tensor) -> Tensor:
    doubled = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if x.ndim > 1 else ()
    if output.shape != doubled:
        raise InvalidInputError(
            f"the network gave the shape {tuple(output.shape)} for an input of shape {tuple(x.shape)}; "
            "it must give the same shape, or twice the channels (learned variance)"
        )
    return output[:, : x.shape[1]]


class Wrapper(Denoiser):
    """A Denoiser around a Denoiser, whose estimate is not linear in one network output."""

    parameterisation = None

    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner
        self.process = inner.process
        self.network = inner.network
        self.passes = inner.passes

    @property
    def predicts(self) -> str:
        """What the innermost network's output means."""
        return self.inner.predicts

    @property
    def conditions(self) -> dict[str, Any]:  # type: ignore[override]
        """The conditions of the inner denoiser."""
        return self.inner.conditions

    def with_conditions(self, **conditions: Any) -> Self:
        """The same wrapper around the inner denoiser with these conditions."""
        return self._around(self.inner.with_conditions(**conditions))

    def for_run(self) -> Self:
        """The wrapper around the inner denoiser's copy for a run."""
        inner = self.inner.for_run()
        return self if inner is self.inner else self._around(inner)

    def _around(self, inner: Denoiser) -> Self:
        new = copy.copy(self)
        new.inner = inner
        return new
