"""A network as an estimator of x_0."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.denoisers.base import NEARBY, BaseDenoiser, beside
from fewstep.denoisers.parameterisation import Parameterisation, variance_share
from fewstep.errors import InvalidInputError, not_differentiable, unknown_name
from fewstep.process import Level, Process


class Denoiser(BaseDenoiser):
    """A network, its forward process and what it predicts: together an estimator `denoiser(x, level) -> x_0`.

    Guidance and clipping are wrappers around it that are denoisers again. A Denoiser holds no state.

    Args:
        network: Any callable `(x, t, **conditions) -> output`, x of shape (B, ...), t of shape (B,) in the process's
            unit. The output has x's shape; one with twice the channels is taken for a learned-variance network, and
            its second half is for `variance_pair` alone. A torch module is called in the mode it is in: put it in
            `eval()`.
        process: The forward process that the network was trained with.
        predicts: "noise", "data", "velocity", "flow", "score" or "edm".
        conditions: Keyword arguments for the network, such as labels; tensors have the batch as first dimension.

    Raises:
        UnknownNameError: If there is no such prediction, or the network takes no condition of that name.
        InvalidInputError: If the network is not callable or the process is none.

    >>> import torch, fewstep as fs
    >>> denoiser = Denoiser(lambda x, t: torch.zeros_like(x), fs.process.edm(), predicts="data")
    >>> denoiser(torch.ones(2, 3), denoiser.process.level(1.0)).abs().max().item()
    0.0
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        process: Process,
        predicts: str = "noise",
        conditions: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(process)
        if not callable(network):
            raise InvalidInputError(
                f"network must be a callable (x, t, **conditions), got {network!r}"
            )
        self.network = network
        self._parameterisation = Parameterisation(predicts)
        self._conditions = dict(conditions or {})
        _check_names(network, self._conditions)

    @property
    def parameterisation(self) -> Parameterisation:
        """How the network's output gives the estimate."""
        return self._parameterisation

    @property
    def predicts(self) -> str:
        """What the network's output means."""
        return self._parameterisation.predicts

    @property
    def conditions(self) -> dict[str, Any]:
        """Keyword arguments that the network is called with."""
        return self._conditions

    @property
    def device(self) -> torch.device | None:
        """Where a torch module's weights are."""
        weight = self._first_weight()
        return None if weight is None else weight.device

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """Estimate x_0; see `BaseDenoiser`."""
        skip, out = self._parameterisation.skip_out(level)
        return skip * x + out * self.output(x, level)

    def output(self, x: Tensor, level: Level) -> Tensor:
        """The network's own output at a point, in x's shape and type; the network runs in its own type."""
        return self.outputs(x, (level,))(x)

    def outputs(self, x: Tensor, levels: Sequence[Level]) -> Callable[[Tensor], Tensor]:
        """The network's own outputs at these levels, one after the other, as a function of the point.

        What the calls have in common is worked out here, once.

        Args:
            x: Any point of the run, shape (B, ...).
            levels: The level of each call to come.

        Returns:
            To be called with the point of the first level, then of the second...
        """
        halves = self._outputs_in_halves(x, levels)

        def output(point: Tensor) -> Tensor:
            value, _ = halves(point)
            return value if value.dtype == point.dtype else value.to(point.dtype)

        return output

    def _outputs_in_halves(
        self, x: Tensor, levels: Sequence[Level]
    ) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """What the network predicts and its half for the variance, both in its own type; see `outputs`."""
        form, network, conditions = self._parameterisation, self.network, self._conditions
        own, of_times = self._types(x)
        column = torch.tensor(
            [form.time(level) for level in levels], dtype=of_times, device=x.device
        )
        times = iter(column.unsqueeze(1).repeat(1, x.shape[0]).unbind())
        scales = iter([form.input_scale(level) for level in levels])

        def halves(point: Tensor) -> tuple[Tensor, Tensor | None]:
            scale = next(scales)
            inputs = point if scale == 1.0 else point * scale
            if inputs.dtype != own:
                inputs = inputs.to(own)
            return _halves(network(inputs, next(times), **conditions), point)

        return halves

    def many(self, x: Tensor, levels: Sequence[Level]) -> Tensor:
        """Estimate x_0 at points of several levels, in one call of the network; see `BaseDenoiser`."""
        form = self._parameterisation
        numbers = [(*form.skip_out(level), form.input_scale(level)) for level in levels]
        skip, out, scale = x.new_tensor(numbers).view(len(x), 3, *(1,) * (x.ndim - 1)).unbind(1)
        own, of_times = self._types(x)
        times = torch.tensor(
            [form.time(level) for level in levels], dtype=of_times, device=x.device
        )
        repeated = {
            name: _repeated(value, *x.shape[:2]) for name, value in self._conditions.items()
        }
        output = self.with_conditions(**repeated)._called(
            (scale * x).flatten(0, 1).to(own), times.repeat_interleave(x.shape[1])
        )
        return skip * x + out * output.to(x.dtype).reshape(x.shape)

    def variance_pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
        """The estimate of x_0, and the network's own second half; see `BaseDenoiser`."""
        skip, out = self._parameterisation.skip_out(level)
        value, variance = self._outputs_in_halves(x, (level,))(x)
        share = None if variance is None else variance_share(variance.to(x.dtype))
        return skip * x + out * value.to(x.dtype), share

    def derivative(self, x: Tensor, along: Tensor, level: Level) -> Tensor:
        """`dD/dlog_snr` by differentiating the network; see `BaseDenoiser`.

        `D = skip x + out F(scale x, t)`, where everything but F depends on the level alone.
        """
        before, here, after = beside(self.process, level)
        form = self._parameterisation

        def rate(value: Callable[[Level], float]) -> float:
            return (value(after) - value(before)) / (2 * NEARBY)

        moving = along + rate(lambda level: level.alpha) / here.alpha * x
        scale, scale_rate = form.input_scale(here), rate(form.input_scale)
        skip, out = form.skip_out(here)
        own, of_times = self._types(x)
        t = x.new_full((x.shape[0],), form.time(here), dtype=of_times)
        output, change = self._called_with_change(
            ((scale * x).to(own), t),
            ((scale_rate * x + scale * moving).to(own), torch.full_like(t, rate(form.time))),
        )
        return (
            rate(lambda level: form.skip_out(level)[0]) * x
            + skip * moving
            + rate(lambda level: form.skip_out(level)[1]) * output.to(x.dtype)
            + out * change.to(x.dtype)
        )

    @torch.enable_grad()
    def _called_with_change(
        self, arguments: tuple[Tensor, Tensor], directions: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The output and its directional derivative: the backward pass is linear, so its own backward pass gives it.

        Unlike forward mode this needs nothing but gradients, which every layer has in every memory layout.
        """
        inputs, t = (argument.detach().requires_grad_() for argument in arguments)
        try:
            with sdpa_kernel(
                SDPBackend.MATH
            ):  # the fused attention kernels can be differentiated only once
                output = self._called(inputs, t)
                weights = torch.zeros_like(output, requires_grad=True)
                back = torch.autograd.grad(
                    output, (inputs, t), weights, create_graph=True, allow_unused=True
                )
                if back[0] is None:
                    raise RuntimeError("its output does not follow its input")
                used = [(b, d) for b, d in zip(back, directions, strict=True) if b is not None]
                (change,) = torch.autograd.grad(
                    [b for b, _ in used], weights, [d for _, d in used], materialize_grads=True
                )
        except RuntimeError as error:
            raise not_differentiable(self.name, str(error).splitlines()[0]) from error
        return output.detach(), change.detach()

    def _called(self, inputs: Tensor, t: Tensor) -> Tensor:
        output = self.network(inputs, t, **self._conditions)
        return _halves(output, inputs)[0]

    def with_conditions(self, **conditions: Any) -> Self:
        """The same denoiser with these conditions added; this one stays as it is.

        Raises:
            UnknownNameError: If the network takes no condition of that name.
        """
        _check_names(self.network, conditions.keys() - self._conditions.keys())
        new = copy.copy(self)
        new._conditions = {**self._conditions, **conditions}
        return new

    def _types(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """The network's own type, and that of its times, which is never below float32."""
        weight = self._first_weight()
        own = x.dtype if weight is None else weight.dtype
        # bfloat16 does not tell the time 999 from 1000.
        return own, torch.float64 if own == torch.float64 else torch.float32

    def _first_weight(self) -> Tensor | None:
        """The first floating-point weight of a torch module: it tells the module's type and device."""
        if not isinstance(self.network, nn.Module):
            return None
        return next((p for p in self.network.parameters() if p.is_floating_point()), None)


def _repeated(condition: Any, rows: int, images: int) -> Any:
    """A condition of the images, for rows of the same images; one without a batch stays as it is."""
    if (
        not isinstance(condition, Tensor)
        or not condition.ndim
        or len(condition) not in (1, images)
    ):
        return condition
    each = condition.expand(images, *condition.shape[1:])
    return each.repeat(rows, *(1,) * (condition.ndim - 1))


def _halves(output: object, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a network predicts, and the other half of a learned-variance network's doubled channels."""
    if not isinstance(output, Tensor):
        raise InvalidInputError(
            f"the network gave a {type(output).__name__} instead of a tensor; wrap it so that it gives the tensor, "
            "such as lambda x, t, **conditions: network(x, t, **conditions).sample"
        )
    if output.shape == x.shape:
        return output, None
    if x.ndim < 2 or output.shape != (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        raise InvalidInputError(
            f"the network gave the shape {tuple(output.shape)} for an input of shape {tuple(x.shape)}; "
            "it must give the same shape, or twice the channels (learned variance)"
        )
    return output[:, : x.shape[1]], output[:, x.shape[1] :]


def _check_names(network: Callable[..., Tensor], names: Iterable[str]) -> None:
    """Refuse a condition that the network's signature does not know, before it is called."""
    function = network.forward if isinstance(network, nn.Module) else network
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables have no signature to read
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters[2:] if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    for name in names:
        if name not in known:
            raise unknown_name(
                "condition", name, known, "Known are the network's arguments after x and t"
            )
