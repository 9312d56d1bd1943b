"""Measuring settings on a problem: how far their results are from the converged ones, and from real pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep.metrics import frechet_distance
from fewstep.training.precision import autocast
from problems import SEEDS, Problem
from report import seconds
from untuned import Trial, plan_trial

CONVERGED = {"sampler": "unipc", "order": 3, "scheduler": "exponential", "steps": 200}
LOOKS = 4


class Contest:
    """A problem with its noise, and the converged results.

    Args:
        problem: The problem.
        folder: Where converged results are kept.
        batch_size: Pictures that go through a network together.
    """

    def __init__(self, problem: Problem, folder: Path, batch_size: int) -> None:
        self.problem, self.folder, self.batch_size = problem, folder, batch_size
        self._starts: dict[range, Tensor] = {}
        self._converged: dict[tuple[int, bool], Tensor] = {}

    def rmse(self, trial: Trial, images: int, precise: bool = True) -> float | None:
        """Root mean square distance to the converged results of the same noise; None if the setting breaks down.

        Args:
            trial: The setting.
            images: Pictures to make.
            precise: Whether a network computes in float32, and not in bfloat16 where that is fast.
        """
        result = self.results(trial, images, precise)
        if result is None:
            return None
        return (result - self.converged(images, precise)).square().mean().sqrt().item()

    def distance(self, trial: Trial, images: int) -> float | None:
        """Frechet distance to the real pictures; None if the setting breaks down."""
        result = self.results(trial, images, precise=False)
        return None if result is None else self._to_real(result)

    def floor(self, images: int) -> float:
        """Frechet distance of the converged results themselves."""
        return self._to_real(self.converged(images, precise=False))

    def _to_real(self, pictures: Tensor) -> float:
        # Classifiers have seen nothing far beyond [-1, 1], and a diverging run would overflow them.
        features = self.problem.features(pictures.clamp(-4, 4))
        return frechet_distance(features, self.problem.reference)

    def results(self, trial: Trial, images: int, precise: bool) -> Tensor | None:
        """The pictures of a setting, seeds in order; None if it breaks down."""
        made = []
        with autocast("float32" if precise else "auto", torch.device("cpu")):
            for first in range(0, images, self.batch_size):
                rows = range(first, min(first + self.batch_size, images))
                denoiser = self.problem.denoiser(rows)
                part = trial.attempt(denoiser, self._start(rows), SEEDS + first)
                if part is None:
                    return None
                made.append(part)
        return torch.cat(made)

    def _start(self, rows: range) -> Tensor:
        if rows not in self._starts:
            seeds = range(SEEDS + rows.start, SEEDS + rows.stop)
            self._starts[rows] = fs.Noise(seeds, self.problem.shape).initial()
        return self._starts[rows]

    def converged(self, images: int, precise: bool) -> Tensor:
        """The converged results, worked out once and kept."""
        precise = precise or not self.problem.is_network
        if (images, precise) not in self._converged:
            kind = "float32" if precise else "auto"
            store = self.folder / f"{self.problem.name}-converged-{images}-{kind}.pt"
            facts = {"about": self.problem.about, "batch_size": self.batch_size}
            kept: dict[str, Any] = torch.load(store, weights_only=True) if store.exists() else {}
            if kept.get("facts") != facts:
                grid = fs.schedulers.make_grid(
                    CONVERGED["scheduler"], self.problem.model.process, CONVERGED["steps"]
                )
                plan = fs.plan(CONVERGED["sampler"], grid, order=CONVERGED["order"])
                assert isinstance(plan, fs.Plan)
                kept = {"facts": facts, "x": self.results(plan_trial(plan), images, precise)}
                store.parent.mkdir(parents=True, exist_ok=True)
                torch.save(kept, store)
            self._converged[images, precise] = kept["x"]
        return self._converged[images, precise]

    def seconds(self, images: int, precise: bool) -> float:
        """How long a network call of so many pictures takes: the shortest of a few, since the machine may be busy."""
        rows = range(min(images, self.batch_size))
        denoiser, x = self.problem.denoiser(rows), self._start(rows)
        process = self.problem.model.process
        level = process.level(process.table_time(process.training_steps / 2))
        with autocast("float32" if precise else "auto", torch.device("cpu")):
            taken = min(seconds(lambda: denoiser(x, level)) for _ in range(LOOKS))
        return taken * images / len(rows)
