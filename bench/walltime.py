"""Wall time of a 50-step run of the bundled model over 50 times its network's own forward time."""

from __future__ import annotations

import torch

import fewstep as fs
from report import Row, interleaved, seconds

STEPS, BATCH = 50, 8


def rows() -> list[Row]:
    """One row: the run through the front door, initial noise and all, against bare forward passes."""
    model = fs.load("digits")
    labels = list(range(BATCH))
    x, t, y = torch.randn(BATCH, *model.shape), torch.full((BATCH,), 500.0), torch.tensor(labels)

    @torch.inference_mode()
    def forwards() -> float:
        return seconds(lambda: [model.network(x, t, labels=y) for _ in range(STEPS)])

    def run() -> float:
        return seconds(
            lambda: fs.sample(model, sampler="ddim", steps=STEPS, seed=range(BATCH), labels=labels)
        )

    own, bare = interleaved(run, forwards, rounds=9)
    ratio = own / bare
    return [
        Row(
            f"{STEPS}-step run of digits, batch {BATCH}",
            f"{own:.3f} s",
            f"{STEPS} forward passes {bare:.3f} s",
            ratio,
            "at most 1.03",
            ratio <= 1.03,
        )
    ]
