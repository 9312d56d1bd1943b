"""The one loop in which a network is called while sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fewstep.errors import InvalidInputError, NonFiniteError
from fewstep.plan.instructions import Combine, Denoise, Draw
from fewstep.plan.lowering import Evaluate, Operation
from fewstep.process import Level

if TYPE_CHECKING:
    from fewstep.plan.plan import Plan

GUARD_EVERY = 8


class DenoiserLike(Protocol):
    """Anything that estimates x_0 from a point and its level."""

    def __call__(self, x: Tensor, level: Level, /) -> Tensor: ...


NoiseSource = Callable[[Level, Level], Tensor]


@dataclass(frozen=True, slots=True)
class Progress:
    """What `on_step` is told after each network call.

    Attributes:
        call: Number of the call, from 1.
        calls: Calls in all.
        level: The level of the call.
        x: The point that was evaluated, shape (B, ...).
        denoised: The estimate of x_0 there: the preview, shape (B, ...).
    """

    call: int
    calls: int
    level: Level
    x: Tensor
    denoised: Tensor


@torch.no_grad()
def execute(
    plan: Plan,
    denoiser: DenoiserLike,
    x: Tensor,
    noise: NoiseSource | None,
    on_step: Callable[[Progress], None] | None,
) -> Tensor:
    """Run a Plan; see `Plan.run`."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InvalidInputError(
            "x must be a floating-point tensor: the point at the first level of the grid"
        )
    if plan.draws and noise is None:
        raise InvalidInputError(
            f"{plan.name} draws noise {plan.draws} times; give noise=fewstep.Noise(seeds, shape)"
        )
    x = x if x.dtype == torch.float64 else x.float()
    if hasattr(denoiser, "for_run"):
        denoiser = denoiser.for_run()  # type: ignore[attr-defined]
    run = _Run(plan, denoiser, noise, on_step)
    result = run.loop(
        plan.lowered(getattr(denoiser, "parameterisation", None)), x, guard_every=GUARD_EVERY
    )
    if result is None:  # run once more, looking closely, to say where it began
        run.on_step = None
        run.loop(plan.lowered(None), x, guard_every=1)
        raise NonFiniteError(
            f"{plan.name}: a NaN or infinity appeared, but not when run again; {_REMEDY}"
        )
    return result


_REMEDY = (
    "run the network in float32 or bfloat16 instead of float16, check that `predicts` and the process are right "
    "(fewstep.testing.check_denoiser), and lower the guidance scale"
)


class _Run:
    """One run of a Plan: everything that changes lives here and in the registers of `loop`."""

    def __init__(self, plan: Plan, denoiser: Any, noise: NoiseSource | None, on_step: Any) -> None:
        self.plan, self.denoiser, self.noise, self.on_step = plan, denoiser, noise, on_step

    def loop(self, operations: Sequence[Operation], x: Tensor, guard_every: int) -> Tensor | None:
        """The result, or None where it is not finite; with `guard_every=1` the first fault is raised with its place."""
        values: dict[int, Tensor] = {0: x}
        denoiser, call = self.denoiser, 0
        if guard_every == 1 and not finite(x):
            raise NonFiniteError(
                f"{self.plan.name}: the starting point x holds a NaN or infinity; check where it comes from"
            )
        for operation in operations:
            what = operation.what
            kind = type(what)
            if kind is Combine:
                register, c = operation.first
                rest = operation.rest
                if c is not None:
                    value = values[register] * c
                else:
                    (second, weight), *rest = rest
                    value = torch.add(values[register], values[second], alpha=weight)
                for register, weight in rest:
                    value.add_(values[register], alpha=weight)
            elif kind is Draw:
                value = self._draw(what, x)
            else:
                point = values[what.point]
                value = (
                    denoiser.output(point, what.level)
                    if kind is Evaluate
                    else denoiser(point, what.level)
                )
                call += 1
                if call % guard_every == 0 and not finite(value):
                    if guard_every > 1:
                        return None
                    raise NonFiniteError(self._place(point, call, what.level))
                if self.on_step is not None:
                    self._report(what, point, value, call)
            values[what.out] = value
            for register in operation.dead:
                del values[register]
        result = values[self.plan.result]
        return result if finite(result) else None

    def _draw(self, draw: Draw, x: Tensor) -> Tensor:
        assert self.noise is not None
        z = self.noise(draw.start, draw.end)
        if z.shape != x.shape:
            raise InvalidInputError(
                f"the noise source gave the shape {tuple(z.shape)}; the state has {tuple(x.shape)}"
            )
        return z.to(x)

    def _report(self, what: Evaluate | Denoise, x: Tensor, value: Tensor, call: int) -> None:
        if isinstance(what, Evaluate):
            skip, out = self.denoiser.parameterisation.skip_out(what.level)
            value = skip * x + out * value
        self.on_step(Progress(call, self.plan.calls, what.level, x, value))

    def _place(self, point: Tensor, call: int, level: Level) -> str:
        culprit = "the network's output" if finite(point) else "the point given to the network"
        return f"{self.plan.name}: {culprit} holds a NaN or infinity at call {call} of {self.plan.calls}, level {level}; {_REMEDY}"


def finite(x: Tensor) -> bool:
    """Whether every element is finite; the sum is cheap, and only a sum that is not finite needs a closer look."""
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())
