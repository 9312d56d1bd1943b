"""Which sampler at which budget: distance to the converged result of the same noise, on the bundled model.

    python bench/choosing.py --out docs/results/choosing.md

Deterministic samplers are held against the converged solution of the probability-flow ODE. The stochastic ones have no
such solution for a seed; for all of them the second table shows how many samples are read as the digit asked for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import fewstep as fs
from fewstep.metrics import label_accuracy
from fewstep.samplers import SAMPLERS, SamplerEntry
from report import header

BUDGETS = (5, 10, 20, 50)
SCHEDULERS = ("trailing", "karras", "exponential")
IMAGES = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    model = fs.load("digits")
    labels = [k % 10 for k in range(IMAGES)]
    common = {"seed": range(IMAGES), "labels": labels}
    converged = fs.sample(
        model,
        sampler="unipc",
        scheduler="exponential",
        steps=200,
        sampler_options={"order": 3},
        **common,
    ).images
    errors, read = [], []
    for entry in SAMPLERS:
        for scheduler in SCHEDULERS:
            runs = [
                fs.sample(
                    model,
                    sampler=entry.name,
                    scheduler=scheduler,
                    steps=_steps(entry, budget),
                    **common,
                )
                for budget in BUDGETS
            ]
            name = f"{entry.name} | {scheduler}"
            if not entry.stochastic:
                rmse = [(run.images - converged).square().mean().sqrt().item() for run in runs]
                errors.append((name, [f"{e:.3f}" for e in rmse]))
                print(*errors[-1], flush=True)
            read.append((name, [f"{label_accuracy(run.images, labels):.0%}" for run in runs]))
    command = "python bench/choosing.py --out docs/results/choosing.md"
    text = "\n".join(
        [
            *header("Error against network calls on `digits`", command, ("torch",)),
            "RMSE to the converged result (UniPC, order 3, 200 calls), images in [-1, 1], "
            f"{IMAGES} images, seeds from 0.",
            "",
            *_table(errors),
            "",
            f"Share of {IMAGES} images read as the digit asked for.",
            "",
            *_table(read),
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


def _steps(entry: SamplerEntry, budget: int) -> int:
    """Steps that cost at most the budget: a two-call sampler takes one call in its last step."""
    return (budget + 1) // 2 if entry.calls_per_step == 2 else budget


def _table(rows: list[tuple[str, list[str]]]) -> list[str]:
    head = "| sampler | scheduler | " + " | ".join(f"{b} calls" for b in BUDGETS) + " |"
    return [
        head,
        "| --- " * (2 + len(BUDGETS)) + "|",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
    ]


if __name__ == "__main__":
    with torch.no_grad():
        main()
