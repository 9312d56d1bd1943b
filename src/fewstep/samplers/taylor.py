"""A Taylor step: the derivative of the estimate of x_0 along the path takes the place of a second estimate."""

from __future__ import annotations

from fewstep.plan import Tape, Vector
from fewstep.process import log_snr_step
from fewstep.samplers.options import NoiseFactor, SdeEta
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import (
    declare_noise_factor,
    exponential_moments,
    exponential_step,
    fresh_std,
    freshened,
    is_open,
)
from fewstep.schedulers import Grid


@sampler(
    "ttm",
    title="TTM",
    family="SDE",
    order=2,
    calls_per_step=2,
    stochastic=True,
    paper="Crowson 2023, in Extra-Samplers; compare Tachibana et al. 2021, arXiv:2112.13339",
    aliases=("sample_ttm", "ttm_jvp", "sample_ttm_jvp"),
    needs=("differentiable network",),
)
def ttm(tape: Tape, grid: Grid, eta: SdeEta = 1.0, s_noise: NoiseFactor = 1.0) -> Vector:
    """Truncated Taylor method: an exponential step for an estimate that changes linearly in log_snr.

    Its rate `D' = dD/dlog_snr` along the ODE comes from the differentiated network and is weighted by
    `H I_1(H) = H - (1 - e^-H)`, `H = (1 + eta) h`. With eta > 0 both follow the ODE and the whole H on purpose: the
    share of D' beyond the drift of the SDE makes up, on average, for what the noise of the step does to the estimate.
    Weighted for the drift alone the weak order would be 1. A step from pure noise or to clean data takes D alone.

    A network that was trained at the times of a table may change quickly from one to the next; its derivative then
    says little about a whole step, and samplers that compare two estimates need fewer calls.
    """
    declare_noise_factor(tape, eta, s_noise)
    x = tape.start
    for t, s in grid.steps:
        denoised = tape.denoise(x, t)
        moved = exponential_step(x, denoised, t, s, eta)
        if is_open(t, s):
            length = (1 + eta) * log_snr_step(t, s)
            rate = tape.derivative(x, t.alpha * denoised - x, t)
            moved = moved + (s.alpha * length * exponential_moments(length, 2)[1]) * rate
        x = freshened(tape, moved, t, s, s_noise * fresh_std(t, s, eta))
    return x
