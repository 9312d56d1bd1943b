"""The one loop in which a network is called while sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fewstep.errors import (
    InvalidInputError,
    NonFiniteError,
    no_guidance,
    no_learned_variance,
    not_differentiable,
)
from fewstep.plan.instructions import Combine, Denoise, Differentiate, Draw, Evaluate
from fewstep.plan.lowering import Program
from fewstep.process import Level

if TYPE_CHECKING:
    from fewstep.plan.plan import Plan

LOOK_EVERY, LARGE = 8, 2**20
"""How many network calls pass between looks for NaN and infinity; at this many elements, every call is looked at."""


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
    x = checked_start(plan.name, x, draws=plan.draws, noise=noise)
    if hasattr(denoiser, "for_run"):
        denoiser = denoiser.for_run()  # type: ignore[attr-defined]
    program = plan.lowered(getattr(denoiser, "parameterisation", None))
    return _Run(plan, denoiser, noise, on_step, _Guard(plan, x)).loop(program, x)


class _Run:
    """One run of a Plan: everything that changes lives here and in the slots of `loop`."""

    def __init__(
        self,
        plan: Plan,
        denoiser: Any,
        noise: NoiseSource | None,
        on_step: Callable[[Progress], None] | None,
        guard: _Guard,
    ) -> None:
        self.plan, self.denoiser, self.noise = plan, denoiser, noise
        self.on_step, self.guard = on_step, guard

    def loop(self, program: Program, x: Tensor) -> Tensor:
        what: Any  # the kind beside it says which
        slots: list[Any] = [x] + [None] * (program.slots - 1)
        output = self.denoiser.outputs(x, program.evaluated) if program.evaluated else None
        guard, call = self.guard, 0
        guard.check(x)
        for kind, what, first, factor, rest, out, second in program.operations:
            if kind is Combine:
                if factor is None:
                    other, weight = rest[0]
                    value = torch.add(slots[first], slots[other], alpha=weight)
                    rest = rest[1:]
                else:
                    value = slots[first] * factor
                for other, weight in rest:
                    value.add_(slots[other], alpha=weight)
            elif kind is Draw:
                value = drawn(self.noise, what, x)
                guard.recent.append((what, call, value))
            else:
                point = slots[first]
                call += 1
                if call % guard.every == 0:
                    guard.check(point)
                if kind is Evaluate:
                    value = output(point)  # type: ignore[misc]
                elif kind is Differentiate:
                    value = derivative(self.denoiser, point, slots[second], what.level)
                elif what.weak is None:
                    value = estimate(self.denoiser, point, what.level)
                else:
                    value, slots[second] = guided_pair(self.denoiser, point, what.level)
                guard.recent.append((what, call, value))
                if self.on_step is not None:
                    self._report(what, point, value, call)
            slots[out] = value
        result = slots[program.result]
        guard.check(result)
        return result

    def _report(
        self, what: Evaluate | Denoise | Differentiate, x: Tensor, value: Tensor, call: int
    ) -> None:
        assert self.on_step is not None
        if isinstance(what, Differentiate):
            return
        if isinstance(what, Evaluate):
            skip, out = self.denoiser.parameterisation.skip_out(what.level)
            value = skip * x + out * value
        self.on_step(Progress(call, self.plan.calls, what.level, x, value))


def checked_start(name: str, x: object, *, draws: int, noise: NoiseSource | None) -> Tensor:
    """The start in the type of the state, float32 or float64.

    Raises:
        InvalidInputError: If x is no floating-point tensor, or noise is needed and missing.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InvalidInputError(
            "x must be a floating-point tensor: the point at the first level of the grid"
        )
    if draws and noise is None:
        raise InvalidInputError(
            f"{name} draws noise {draws} times; give noise=fewstep.Noise(seeds, shape)"
        )
    return x if x.dtype == torch.float64 else x.float()


def estimate(denoiser: Any, point: Tensor, level: Level) -> Tensor:
    """The denoiser's estimate of x_0, in the shape and type of the point."""
    value = denoiser(point, level)
    if value.shape != point.shape:
        raise InvalidInputError(
            f"the denoiser gave the shape {tuple(value.shape)} for a point of shape {tuple(point.shape)}; "
            "it must give an estimate of x_0 in the shape of the point"
        )
    return value if value.dtype == point.dtype else value.to(point.dtype)


def guided_pair(denoiser: Any, point: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """The guided and the weak estimate of a guided denoiser."""
    if not hasattr(denoiser, "guided_pair"):
        raise no_guidance(type(denoiser).__name__)
    guided, weak = denoiser.guided_pair(point, level)
    return guided.to(point.dtype), weak.to(point.dtype)


def variance_pair(denoiser: Any, point: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """The estimate of a denoiser and where its learnt variance lies."""
    if hasattr(denoiser, "variance_pair"):
        denoised, share = denoiser.variance_pair(point, level)
        if share is not None:
            return denoised.to(point.dtype), share.to(point.dtype)
    raise no_learned_variance(getattr(denoiser, "name", type(denoiser).__name__))


def derivative(denoiser: Any, point: Tensor, along: Tensor, level: Level) -> Tensor:
    """The derivative of the estimate along a direction."""
    if not hasattr(denoiser, "derivative"):
        raise not_differentiable(type(denoiser).__name__, "it is a plain function")
    return denoiser.derivative(point, along, level).to(point.dtype)


def drawn(noise: NoiseSource | None, draw: Draw, x: Tensor) -> Tensor:
    """The noise of a draw, in the type and place of the state."""
    assert noise is not None
    source = noise.on_lap(draw.lap) if draw.lap and hasattr(noise, "on_lap") else noise  # type: ignore[attr-defined]
    z = source(draw.start, draw.end)
    if getattr(z, "shape", None) != x.shape:
        raise InvalidInputError(
            f"the noise source gave {_shape(z)}; it must give a tensor of the state's shape {tuple(x.shape)}"
        )
    return z.to(x)


class _Guard:
    """Finds where a run ceases to be finite.

    A NaN or infinity in a network's output or in the noise stays in every later point. So it is enough to look at a
    point now and then, and to keep what was added since the last look, to say exactly where it came from.
    """

    def __init__(self, plan: Plan, x: Tensor) -> None:
        self.plan = plan
        self.every = LOOK_EVERY if x.numel() < LARGE else 1
        self.recent: list[tuple[Evaluate | Denoise | Differentiate | Draw, int, Tensor]] = []

    def check(self, point: Tensor) -> None:
        """Look at the point, and at what led to it if that is not finite."""
        if not finite(point):
            raise NonFiniteError(f"{self.plan.name}: {self._culprit()}")
        self.recent.clear()

    def _culprit(self) -> str:
        for what, call, value in self.recent:
            if finite(value):
                continue
            if isinstance(what, Draw):
                stretch = f"from level {what.start} to {what.end}"
                return f"the noise drawn after call {call}, {stretch}, {_FAULT}; check the noise source"
            place = f"at call {call} of {self.plan.calls}, level {what.level}"
            return f"the network's output {place}, {_FAULT}; {_REMEDY}"
        if not self.recent:
            return f"the starting point x {_FAULT}; check where it comes from"
        return f"the state overflowed by call {self.recent[-1][1]} of {self.plan.calls}; {_REMEDY}"


_FAULT = "holds a NaN or infinity"
_REMEDY = (
    "run the network in float32 or bfloat16 instead of float16, check that `predicts` and the process are right "
    "(fewstep.testing.check_denoiser), and lower the guidance scale"
)


def finite(x: Tensor) -> bool:
    """Whether every element is finite; a finite sum says so cheaply, any other may just have overflowed."""
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


def _shape(z: object) -> str:
    return f"the shape {tuple(z.shape)}" if isinstance(z, Tensor) else repr(z)
