"""All samplers in one table: order, calls, and what a step costs beside the network, ours and the peer's.

    python bench/samplers.py --out docs/results/samplers.md

The order is measured on data whose solution is known (`fewstep.testing.measured_order`). A step's cost is that of a run
of 50 steps whose network gives a constant back and whose noise is a constant tensor, divided by the network calls. The
peers do the same in the same run, in turns: diffusers' `step`, and k-diffusion's `sample_...` for the whole run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep.plan import EagerPlan
from fewstep.samplers import SAMPLERS, SamplerEntry
from fewstep.testing import measured_order
from overhead import STEPS, VE, VP, step_times
from report import header, interleaved, seconds

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from peer_support import k_diffusion

SHAPE = (1, 4, 64, 64)
ROUNDS = 15
DIFFUSERS_TARGET, K_DIFFUSION_TARGET = 0.1, 1.0
"""Largest share of the peer's time that a step may take."""


@dataclass(frozen=True)
class Peer:
    """Another implementation of a sampler: a class of diffusers, or a function of k-diffusion."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    process: fs.Process = VP

    @property
    def is_function(self) -> bool:
        return self.name.startswith("sample_")

    @property
    def target(self) -> float:
        return K_DIFFUSION_TARGET if self.is_function else DIFFUSERS_TARGET


MULTISTEP = "DPMSolverMultistepScheduler"
PEERS: dict[str, tuple[Peer, ...]] = {
    "ddpm": (Peer("DDPMScheduler", {"clip_sample": False}),),
    "ddim": (Peer("DDIMScheduler", {"clip_sample": False}),),
    "euler": (Peer("EulerDiscreteScheduler", process=VE), Peer("sample_euler")),
    "euler_ancestral": (
        Peer("EulerAncestralDiscreteScheduler", process=VE),
        Peer("sample_euler_ancestral"),
    ),
    "heun": (Peer("HeunDiscreteScheduler", process=VE), Peer("sample_heun")),
    "dpm_2": (
        Peer("KDPM2DiscreteScheduler", process=VE),
        Peer("KDPM2AncestralDiscreteScheduler", options={"eta": 1.0}, process=VE),
        Peer("sample_dpm_2"),
        Peer("sample_dpm_2_ancestral", options={"eta": 1.0}),
    ),
    "lms": (Peer("LMSDiscreteScheduler", process=VE), Peer("sample_lms")),
    "pndm": (
        Peer("PNDMScheduler"),
        Peer("PNDMScheduler", {"skip_prk_steps": True}, {"warm_up": "plms"}),
    ),
    "deis": (Peer("DEISMultistepScheduler"),),
    "dpmpp_2m": (Peer(MULTISTEP), Peer("sample_dpmpp_2m")),
    "dpmpp_3m": (Peer(MULTISTEP, {"solver_order": 3}),),
    "dpm_solver_multistep": (
        Peer(
            MULTISTEP,
            {
                "solver_order": 3,
                "algorithm_type": "dpmsolver",
                "final_sigmas_type": "sigma_min",
            },
        ),
    ),
    "dpmpp_2m_sde": (
        Peer(MULTISTEP, {"algorithm_type": "sde-dpmsolver++"}),
        Peer("sample_dpmpp_2m_sde"),
    ),
    "dpmpp_3m_sde": (Peer("sample_dpmpp_3m_sde"),),
    "dpmpp_singlestep": (Peer("DPMSolverSinglestepScheduler"),),
    "dpmpp_2s_ancestral": (Peer("sample_dpmpp_2s_ancestral"),),
    "dpmpp_sde": (Peer("sample_dpmpp_sde"),),
    "dpm_fast": (Peer("sample_dpm_fast"),),
    "unipc": (Peer("UniPCMultistepScheduler"),),
    "sa_solver": (Peer("SASolverScheduler"),),
    "lcm": (Peer("LCMScheduler"),),
    "tcd": (Peer("TCDScheduler"),),
}


class Constant:
    """A network that costs nothing; it also counts as guided and as differentiable."""

    def __init__(self) -> None:
        self.output = torch.zeros(SHAPE)

    def __call__(self, x: Tensor, level: Any, **_: Any) -> Tensor:
        return self.output

    def guided_pair(self, x: Tensor, level: fs.Level) -> tuple[Tensor, Tensor]:
        return self.output, self.output

    def derivative(self, x: Tensor, along: Tensor, level: fs.Level) -> Tensor:
        return self.output


X, DENOISER = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), Constant()


def cells(entry: SamplerEntry) -> Iterator[tuple[str, ...]]:
    """The sampler's row, and one more for each further peer."""
    facts = (*_orders(entry), _calls(entry))
    peers = PEERS.get(entry.name, ())
    if not peers:
        own = statistics.median(_own_time(entry.name, {}) for _ in range(ROUNDS))
        yield (f"`{entry.name}`", *facts, f"{own * 1e6:.1f}", "", "", "", "")
    for peer in peers:
        own, theirs = _times(entry.name, peer)
        met = "yes" if own <= peer.target * theirs else "no"
        given = "".join(f" {name}={value}" for name, value in peer.options.items())
        times = f"{own * 1e6:.1f}", f"{theirs * 1e6:.0f}"
        ratio = f"{own / theirs:.3f}"
        yield (f"`{entry.name}`{given}", *facts, times[0], _titled(peer), times[1], ratio, met)


def _titled(peer: Peer) -> str:
    settings = " ".join(f"{name}={value}" for name, value in peer.settings.items())
    package = "k-diffusion" if peer.is_function else "diffusers"
    return f"{package} `{peer.name}`{f' {settings}' if settings else ''}"


def _orders(entry: SamplerEntry) -> tuple[str, str]:
    """The stated and the measured order."""
    stated = str(entry.order or "-")
    if entry.eager or not entry.order or entry.needs_training:
        return stated, "-"
    measured = measured_order(entry.name)
    return stated, "-" if measured is None else f"{measured:.2f}"


def _calls(entry: SamplerEntry) -> str:
    """Network calls for 10 steps to clean data."""
    plan = _plan(entry.name, {}, 10)
    return "as needed" if isinstance(plan, EagerPlan) else str(plan.calls)


def _plan(name: str, options: dict[str, Any], steps: int) -> fs.Plan | EagerPlan:
    return fs.plan(name, fs.schedulers.karras(VE, steps), **options)


def _own_time(name: str, options: dict[str, Any]) -> float:
    """Seconds for each network call."""
    plan = _plan(name, options, STEPS)
    if isinstance(plan, EagerPlan):
        calls = plan.solve(DENOISER, X, lambda a, b: X).calls
    else:
        calls = plan.calls
        plan.run(DENOISER, X, lambda a, b: X)  # the first run also works the program out
    return seconds(lambda: plan.run(DENOISER, X, lambda a, b: X)) / calls


def _times(name: str, peer: Peer) -> tuple[float, float]:
    if not peer.is_function:
        return step_times(
            name, peer.options, peer.process, peer.name, peer.settings, SHAPE, ROUNDS
        )
    plan = _plan(name, peer.options, STEPS)
    assert isinstance(plan, fs.Plan)
    sigmas = torch.tensor([level.ratio for level in plan.levels])
    function = getattr(k_diffusion(), peer.name)
    noise = {"noise_sampler": lambda a, b: X} if SAMPLERS.find(peer.name).stochastic else {}
    if peer.name == "sample_dpm_fast":
        ends = float(sigmas[-2]), float(sigmas[0])
        arguments: tuple[Any, ...] = (*ends, STEPS)
    else:
        arguments = (sigmas,)

    def theirs() -> float:
        run = lambda: function(DENOISER, X, *arguments, disable=True, **noise)  # noqa: E731
        return seconds(run) / plan.calls

    def ours() -> float:
        return seconds(lambda: plan.run(DENOISER, X, lambda a, b: X)) / plan.calls

    return interleaved(ours, theirs, ROUNDS)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--only", action="append", help="measure this sampler alone, or these")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="diffusers")
    torch.set_num_threads(1)
    rows: list[tuple[str, ...]] = []
    for entry in SAMPLERS:
        if entry.name in (arguments.only or [e.name for e in SAMPLERS]):
            if entry.needs_training:
                continue
            for row in cells(entry):
                rows.append(row)
                print(*row, flush=True)
    met = [row[-1] == "yes" for row in rows if row[-1]]
    columns = (
        "sampler",
        "order stated",
        "measured",
        "calls for 10 steps",
        "us a call",
        "peer",
        "its us",
        "ours / peer",
        "met",
    )
    text = "\n".join(
        [
            *header(
                "All samplers in figures",
                "python bench/samplers.py --out docs/results/samplers.md",
                ("torch", "diffusers", "k-diffusion"),
            ),
            f"State of shape {'x'.join(map(str, SHAPE))}, {STEPS} steps. Target: at most {DIFFUSERS_TARGET:g} of "
            f"diffusers' time, and no more than k-diffusion's: met by {sum(met)} of {len(met)}.",
            "",
            "| " + " | ".join(columns) + " |",
            "| --- " * len(columns) + "|",
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
        ]
    )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
