"""Measured order of the foundation's deterministic samplers, on an exact Gaussian-mixture denoiser in float64."""

from __future__ import annotations

import math

import torch

import fewstep as fs
from report import Row

NAMES = ("ddim", "euler", "heun", "dpmpp_2m", "unipc")
HIGH, LOW, RHO = 20.0, 0.02, 7.0
STEPS = {1: (1280, 2560), 2: (160, 320), 3: (160, 320)}
OPTIONS = {"unipc": {"lower_order_final": False}}


def rows() -> list[Row]:
    """One row for each sampler on each family of processes; samplers.py has the orders of all others."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    widths = torch.tensor([0.1, 0.2, 0.2, 0.3, 0.4], dtype=torch.float64)
    start = torch.randn(64, 2, dtype=torch.float64, generator=generator)
    return [
        _row(process, fs.exact.GaussianMixture(means, widths, process=process), entry, start)
        for process in (fs.process.vp_linear(), fs.process.edm(), fs.process.flow())
        for entry in map(fs.samplers.SAMPLERS.find, NAMES)
    ]


def _grid(process: fs.Process, steps: int) -> fs.Grid:
    """Karras spacing from HIGH to LOW that does not end clean, so that no last step of order 1 hides the order."""
    ends = HIGH ** (1 / RHO), LOW ** (1 / RHO)
    ratios = [(ends[0] + k / steps * (ends[1] - ends[0])) ** RHO for k in range(steps + 1)]
    return fs.Grid.from_ratios(process, ratios)


def _row(
    process: fs.Process,
    denoiser: fs.Denoiser,
    entry: fs.samplers.SamplerEntry,
    start: torch.Tensor,
) -> Row:
    def run(sampler: str, steps: int, **options: object) -> torch.Tensor:
        grid = _grid(process, steps)
        return fs.plan(sampler, grid, **options).run(denoiser, grid.levels[0].sigma * start)

    reference = run("unipc", 3000, order=4)
    counts = STEPS[entry.order]
    errors = [
        (run(entry.name, n, **OPTIONS.get(entry.name, {})) - reference).norm(dim=1).mean().item()
        for n in counts
    ]
    order = math.log2(errors[0] / errors[1])
    return Row(
        f"order of {entry.name}, {process.name}",
        f"error {errors[1]:.1e} at {counts[1]} steps",
        f"nominal {entry.order}",
        order,
        "within 0.2 of nominal",
        abs(order - entry.order) <= 0.2,
    )
