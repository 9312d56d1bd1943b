"""What running a Plan in rounds of many calls saves: rounds, network calls and time, against running it in order.

    python bench/parallel.py --out docs/results/parallel.md
    python bench/parallel.py --device cuda --out docs/results/parallel-gpu.md

One image (`--images`), so that a round's batch is as large as the number of its calls. `digits` is the bundled model;
`mixture` is an exact denoiser, whose calls cost next to nothing and are made one by one: its times show the overhead;
it is left out on other devices.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fewstep as fs
from report import header

SAMPLERS = ("ddim", "dpmpp_2m", "unipc", "ddpm")
STEPS = (20, 50, 100)
SCHEDULER = "trailing"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--images", type=int, default=1, help="images in the batch")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    words = ["--device", arguments.device] * (arguments.device != "cpu")
    words += ["--images", str(arguments.images)] * (arguments.images != 1)
    words += ["--out", str(arguments.out)] * (arguments.out is not None)
    lines = header(
        f"Parallel in time, on {_name(device)}",
        " ".join(["python bench/parallel.py", *words]),
        ("torch",),
    )
    lines += [
        f"Levels of `{SCHEDULER}`, {arguments.images} image(s), tolerance 0.001, a third of the calls at a time. "
        "Rounds follow one another; calls are all evaluations of the network, of which a run in order makes one for "
        "each step. The differences are to the run in order, for images in [-1, 1].",
        "",
        "| model | sampler | steps | rounds | calls | in order | in rounds | speed-up | rms difference | largest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows(device, arguments.images):
        print(row, flush=True)
        lines.append(row)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


def rows(device: torch.device, images: int) -> Iterator[str]:
    """One line of the table for each model, sampler and number of steps."""
    models: dict[str, fs.denoisers.BaseDenoiser] = {"digits": digits(device, images)}
    if device.type == "cpu":
        models = {"mixture": mixture(), **models}
    for name, denoiser in models.items():
        shape = denoiser.shape
        assert shape is not None
        noise = fs.Noise(range(images), shape, device=device)
        for sampler in SAMPLERS:
            for steps in STEPS:
                plan = fs.plan(
                    sampler, fs.schedulers.make_grid(SCHEDULER, denoiser.process, steps)
                )
                yield f"| {name} | {sampler} | {steps} | {_measured(plan, denoiser, noise, device)} |"


def mixture() -> fs.exact.GaussianMixture:
    """Five clusters in 16 dimensions."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    return fs.exact.GaussianMixture(means, 0.3, process=fs.process.vp_linear())


def digits(device: torch.device, images: int) -> fs.Model:
    model = fs.load("digits")
    model.network.to(device)  # type: ignore[attr-defined]
    return model.with_conditions(labels=torch.arange(images, device=device) % 10)


def _measured(
    plan: fs.Plan, denoiser: fs.denoisers.BaseDenoiser, noise: fs.Noise, device: torch.device
) -> str:
    x = plan.levels[0].sigma * noise.initial()
    plan.run(denoiser, x, noise)  # the first run of a kind also warms up
    expected, in_order = _timed(lambda: plan.run(denoiser, x, noise), device)
    if device.type != "cpu":
        plan.run_parallel(denoiser, x, noise)
    done, in_rounds = _timed(lambda: plan.run_parallel(denoiser, x, noise), device)
    difference = done.x - expected
    return (
        f"{done.rounds} | {done.calls} | {_milliseconds(in_order)} | {_milliseconds(in_rounds)} | "
        f"{in_order / in_rounds:.2f} | {difference.square().mean().sqrt():.1e} | {difference.abs().max():.1e}"
    )


def _timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    _settle(device)
    start = time.perf_counter()
    value = function()
    _settle(device)
    return value, time.perf_counter() - start


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


if __name__ == "__main__":
    main()
