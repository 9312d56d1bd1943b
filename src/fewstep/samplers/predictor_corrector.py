"""Stochastic predictor-correctors: SA-Solver, the Adams methods of the reverse SDE."""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

from fewstep.plan import Tape, Vector
from fewstep.process import Level, log_snr_step
from fewstep.registry import Option
from fewstep.samplers.options import ChurnFrom, ChurnTo, NoiseFactor
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import (
    Output,
    declare_noise_factor,
    exponential_rule,
    exponential_step,
    fresh_std,
    freshened,
    look_back,
)
from fewstep.schedulers import Grid


@sampler(
    "sa_solver",
    title="SA-Solver",
    family="implicit",
    order=2,
    stochastic=True,
    paper="Xue et al. 2023, arXiv:2309.05019",
    aliases=("SASolverScheduler", "sample_sa_solver"),
    presets={"sa_solver_pece": {"pece": True}, "sample_sa_solver_pece": {"pece": True}},
)
def sa_solver(
    tape: Tape,
    grid: Grid,
    predictor_order: Annotated[int, Option("estimates that the predictor uses", 1, 6)] = 3,
    corrector_order: Annotated[
        int, Option("estimates that the corrector uses, the new one included; 0 for none", 0, 6)
    ] = 4,
    tau: Annotated[
        float, Option("strength of the noise: 0 is the ODE, 1 the usual SDE", 0, 10)
    ] = 1.0,
    s_tmin: ChurnFrom = 0.57,
    s_tmax: ChurnTo = 5.1,
    s_noise: NoiseFactor = 1.0,
    pece: Annotated[bool, Option("evaluate the corrected point again: two calls a step")] = False,
    simple_order_2: Annotated[
        bool, Option("the published shortcut for two estimates: weight H / 2 in place of I_1(H)")
    ] = False,
) -> Vector:
    """Stochastic Adams: a predictor, and a corrector that repeats the step, with its noise, once its end is evaluated.

    Both are exact for estimates polynomial in log_snr under the reverse SDE of strength `eta = tau^2`, which acts on
    steps to levels with sigma/alpha in s_tmin..s_tmax; the others follow the ODE. The defaults are timesteps 200 to
    800 of Stable Diffusion's table. Towards clean data the orders fall, to end with the estimate itself.
    """
    declare_noise_factor(tape, tau, s_noise)
    x, outputs, last = tape.start, [], None
    for i, (t, s) in enumerate(grid.steps):
        left = len(grid.steps) - 1 - i if grid.levels[-1].is_clean else math.inf
        outputs.append(Output(t, tape.denoise(x, t)))
        if last is not None and corrector_order > 0 and (pece or not s.is_clean):
            order = int(min(corrector_order, left + 1))
            x = tape.settle(last.solve(_around(outputs, order), simple_order_2))
            if pece:
                outputs[-1] = Output(t, tape.denoise(x, t))
        eta = tau**2 if s_tmin <= s.ratio <= s_tmax else 0.0
        noise = freshened(tape, Vector({}), t, s, s_noise * fresh_std(t, s, eta))
        step = _Step(x, t, s, eta, noise)
        order = int(max(1, min(predictor_order, left)))
        x = step.solve(look_back(outputs, s, order), simple_order_2)
        last = None if t.is_pure_noise else step
    return x


class _Step(NamedTuple):
    """A step of the reverse SDE from the point x at t to s, and the noise that it adds."""

    x: Vector
    t: Level
    s: Level
    eta: float
    noise: Vector

    def solve(self, outputs: list[Output[Vector]], simple: bool) -> Vector:
        """The point at s, for estimates of x_0 polynomial in log_snr; of several outputs the first is that at t."""
        if len(outputs) == 1:
            moved = exponential_step(self.x, outputs[0].value, self.t, self.s, self.eta)
        else:
            half = (1 + self.eta) * log_snr_step(self.t, self.s) / 2
            moments = [half] if simple and len(outputs) == 2 else None
            moved = exponential_rule(self.x, outputs, self.s, eta=self.eta, moments=moments)
        return moved + self.noise


def _around(outputs: list[Output[Vector]], order: int) -> list[Output[Vector]]:
    """The outputs that correct the step that led to the newest: first the one at the step's start, if there are two."""
    newest, *older = look_back(outputs, outputs[-1].level, order)
    return [older[0], newest, *older[1:]] if older else [newest]
