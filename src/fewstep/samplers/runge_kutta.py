"""One-step solvers of the probability-flow ODE `dx^ / dr = noise`, with `x^ = x / alpha` and `r = sigma / alpha`."""

from __future__ import annotations

from fewstep.plan import Tape, Vector
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import exponential_step, noise_estimate
from fewstep.schedulers import Grid


@sampler(
    "euler",
    title="Euler",
    paper="Karras et al. 2022, arXiv:2206.00364",
    aliases=(
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "EDMEulerScheduler",
        "sample_euler",
        "flow_euler",
    ),
)
def euler(tape: Tape, grid: Grid) -> Vector:
    """Euler's method in sigma/alpha; on flow models the same as Euler's method in t."""
    x = tape.start
    for t, s in grid.steps:
        x = exponential_step(x, tape.denoise(x, t), t, s)
    return x


@sampler(
    "heun",
    title="Heun",
    order=2,
    calls_per_step=2,
    paper="Karras et al. 2022, arXiv:2206.00364",
    aliases=("HeunDiscreteScheduler", "sample_heun"),
)
def heun(tape: Tape, grid: Grid) -> Vector:
    """Heun's method in sigma/alpha: an Euler step, corrected by half the change of slope.

    A step from pure noise or to clean data is an Euler step.
    """
    x = tape.start
    for t, s in grid.steps:
        denoised = tape.denoise(x, t)
        predicted = exponential_step(x, denoised, t, s)
        if not (s.is_clean or t.is_pure_noise):
            change = noise_estimate(predicted, tape.denoise(predicted, s), s) - noise_estimate(
                x, denoised, t
            )
            predicted = predicted + s.alpha * (s.ratio - t.ratio) / 2 * change
        x = predicted
    return x
