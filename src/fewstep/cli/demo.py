"""`fewstep demo`: the bundled model by several samplers, side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep.cli.sample import calls_bar
from fewstep.data import labelled_sheet, load_images, save_image
from fewstep.metrics import label_accuracy
from fewstep.models import Model, load
from fewstep.noise import Noise
from fewstep.sampling import sample

RUNS: tuple[tuple[str, int], ...] = (
    ("ddpm", 1000),
    ("ddim", 50),
    ("ddim", 20),
    ("ddim", 10),
    ("dpmpp_2m", 10),
)
SEEDS = range(8)
FORWARD_TIMES = (0, 50, 100, 250, 500, 999)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out"),
) -> None:
    """Draw the same digits by DDPM in 1000 network calls and by few-step samplers, and time them."""
    model = load("digits")
    forward = out / "forward.png"
    save_image(forward, labelled_sheet(*_noised(model)))
    results = [_run(model, name, steps) for name, steps in RUNS]
    sheet = out / "demo.png"
    rows = [(f"{r['title']}\n{r['calls']} calls", r["images"]) for r in results]
    save_image(sheet, labelled_sheet(rows, [f"seed {seed}" for seed in SEEDS]))
    _print(results)
    typer.echo(f"{sheet}: the same {len(SEEDS)} seeds by each sampler")
    typer.echo(f"{forward}: one real digit on its way into noise")


def _noised(model: Model) -> tuple[list[tuple[str, Tensor]], list[str]]:
    """One real digit at several times of the forward process, as rows and column titles of a sheet."""
    digit, _ = load_images("mnist-1000").batch(torch.tensor([520]))
    noise = Noise([0], model.shape).initial()
    steps = [model.process.add_noise(digit, noise, float(t)) for t in FORWARD_TIMES]
    return [("q(x_t | x_0)", torch.cat(steps))], [f"t = {t}" for t in FORWARD_TIMES]


def _run(model: Model, sampler: str, steps: int) -> dict[str, Any]:
    labels = [seed % model.num_classes for seed in SEEDS]
    start = time.perf_counter()
    with calls_bar() as on_step:
        samples = sample(
            model, sampler=sampler, steps=steps, seed=SEEDS, labels=labels, on_step=on_step
        )
    seconds = time.perf_counter() - start
    return {
        "title": samples.record["sampler"],
        "calls": samples.record["network_calls"],
        "seconds": seconds,
        "images": samples.images,
        "read": label_accuracy(samples.images, torch.tensor(labels)),
    }


def _print(results: list[dict[str, Any]]) -> None:
    reference = results[0]["images"]
    table = Table(
        "sampler", "network calls", "seconds", "distance to the first row", "read as asked"
    )
    for r in results:
        distance = (r["images"] - reference).square().mean().sqrt()
        table.add_row(
            r["title"],
            str(r["calls"]),
            f"{r['seconds']:.1f}",
            f"{distance:.3f}",
            f"{r['read']:.0%}",
        )
    Console().print(table)
