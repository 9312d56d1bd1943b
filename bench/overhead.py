"""What a sampler costs beside the network, against the `step` of diffusers' matching scheduler.

Both run 50 steps with a network that gives a constant back, and both get their noise from a constant tensor, so that
neither drawing noise nor the network counts. Ours is the whole run divided by the calls; the peer's is `step` alone,
with its scaling of the model input where the sampler needs one.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import diffusers
import torch

import fewstep as fs
from report import Row, interleaved, seconds

SHAPES = ((1, 4, 64, 64), (4, 4, 64, 64))
STEPS = 50
VP, VE = fs.process.vp_scaled_linear(), fs.process.edm(0.0292, 14.6146)
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def pairs() -> list[tuple[str, fs.Process, str, dict[str, Any]]]:
    """Our sampler, the process in whose coordinates the peer works, the peer's class and its settings."""
    return [
        ("ddpm", VP, "DDPMScheduler", {"clip_sample": False}),
        ("ddim", VP, "DDIMScheduler", {"clip_sample": False}),
        ("euler", VE, "EulerDiscreteScheduler", {}),
        ("euler_ancestral", VE, "EulerAncestralDiscreteScheduler", {}),
        ("heun", VE, "HeunDiscreteScheduler", {}),
        ("dpmpp_2m", VP, "DPMSolverMultistepScheduler", {}),
        ("unipc", VP, "UniPCMultistepScheduler", {}),
    ]


def rows() -> list[Row]:
    """One row for each sampler and shape."""
    return [_row(*pair, shape) for shape in SHAPES for pair in pairs()]


def _row(
    name: str,
    process: fs.Process,
    peer_class: str,
    settings: dict[str, Any],
    shape: tuple[int, ...],
) -> Row:
    own, theirs = step_times(name, {}, process, peer_class, settings, shape)
    return Row(
        f"step overhead of {name}, {'x'.join(map(str, shape))}",
        f"{own * 1e6:.1f} us",
        f"{peer_class} {theirs * 1e6:.0f} us",
        own / theirs,
        "at most 0.1",
        own <= 0.1 * theirs,
    )


def step_times(
    name: str,
    options: dict[str, Any],
    process: fs.Process,
    peer_class: str,
    settings: dict[str, Any],
    shape: tuple[int, ...],
    rounds: int = 41,
) -> tuple[float, float]:
    """Seconds for one network call's step, ours and the peer's, taking turns."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    output, noise = torch.zeros(shape), x.clone()
    plan = fs.plan(name, fs.schedulers.normal(process, STEPS), **options)
    assert isinstance(plan, fs.Plan)
    denoiser = fs.Denoiser(lambda x, t: output, process)
    peer = getattr(diffusers, peer_class)(**TABLE, **settings)

    def steps() -> None:
        state = x
        for t in peer.timesteps:
            state = peer.step(output, t, state).prev_sample

    def peers() -> float:
        peer.set_timesteps(STEPS)  # forgets the last run
        peer.is_scale_input_called = True
        return seconds(steps) / len(peer.timesteps)

    def ours() -> float:
        return seconds(lambda: plan.run(denoiser, x, lambda start, end: noise)) / plan.calls

    with (
        torch.no_grad(),
        mock.patch(f"{type(peer).__module__}.randn_tensor", lambda *_, **__: noise, create=True),
    ):
        return interleaved(ours, peers, rounds)
