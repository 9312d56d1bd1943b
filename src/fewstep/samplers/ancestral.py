"""Samplers that put the estimate of x_0 back on the next level, with part of the noise fresh: DDPM, DDIM, Euler a.

With a learned variance, DDPM's noise differs from pixel to pixel.
"""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from fewstep.plan import EagerTape, Tape, Vector
from fewstep.process import forward_kernel, posterior
from fewstep.registry import Option
from fewstep.samplers.options import AncestralEta, NoiseFactor
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import ancestral_split, noise_estimate, renoised
from fewstep.schedulers import Grid


@sampler(
    "ddpm",
    title="DDPM",
    family="SDE",
    stochastic=True,
    paper="Ho, Jain, Abbeel 2020, arXiv:2006.11239",
    aliases=("DDPMScheduler",),
)
def ddpm(
    tape: Tape,
    grid: Grid,
    variance: Annotated[
        Literal["posterior", "large"],
        Option("of the fresh noise: the posterior's, or the larger one of q(x_t|x_s)"),
    ] = "posterior",
) -> Vector:
    """Ancestral sampling: draw from the posterior `q(x_s | x_t, x_0)` with the estimate in place of x_0."""
    if variance == "large":
        tape.declare_inexact("noise")
    x = tape.start
    for t, s in grid.steps:
        denoised = tape.denoise(x, t)
        q = posterior(t, s)
        x = q.on_x * x + q.on_x0 * denoised
        if not s.is_clean:
            std = q.std if variance == "posterior" else forward_kernel(s, t).std
            x = x + std * tape.noise(t, s)
    return x


@sampler(
    "ddpm_learned",
    title="DDPM, learned variance",
    family="SDE",
    stochastic=True,
    eager=True,
    needs=("learned variance",),
    paper="Nichol, Dhariwal 2021, arXiv:2102.09672",
    aliases=("improved_ddpm", "learned_range"),
)
def ddpm_learned(tape: EagerTape, grid: Grid) -> Tensor:
    """Ancestral sampling with the network's own variance of each pixel, between the two choices of DDPM."""
    x = tape.start
    for t, s in grid.steps:
        denoised, share = tape.denoise_with_variance(x, t)
        q = posterior(t, s)
        x = q.on_x * x + q.on_x0 * denoised
        if not s.is_clean:
            small, large = q.std, forward_kernel(s, t).std
            x = x + small ** (1 - share) * large**share * tape.noise(t, s)
    return x


@sampler(
    "ddim",
    title="DDIM",
    paper="Song, Meng, Ermon 2021, arXiv:2010.02502",
    aliases=("DDIMScheduler",),
)
def ddim(tape: Tape, grid: Grid, eta: AncestralEta = 0.0) -> Vector:
    """Deterministic for eta = 0, and then the same as Euler in sigma/alpha; DDPM for eta = 1."""
    return euler_ancestral(tape, grid, eta=eta)


@sampler(
    "euler_ancestral",
    title="Euler a",
    family="SDE",
    stochastic=True,
    paper="Karras et al. 2022, arXiv:2206.00364; k-diffusion",
    aliases=("euler_a", "EulerAncestralDiscreteScheduler", "sample_euler_ancestral"),
)
def euler_ancestral(
    tape: Tape,
    grid: Grid,
    eta: AncestralEta = 1.0,
    s_noise: NoiseFactor = 1.0,
) -> Vector:
    """An Euler step to the kept part of the noise, then fresh noise up to the level."""
    if s_noise != 1.0 and eta > 0:
        tape.declare_inexact("noise")
    x = tape.start
    for t, s in grid.steps:
        denoised = tape.denoise(x, t)
        split = ancestral_split(t, s, eta)
        fresh = s_noise * tape.noise(t, s) if split.up > 0 else None
        x = renoised(denoised, noise_estimate(x, denoised, t), fresh, split, s)
    return x
