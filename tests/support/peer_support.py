"""Other implementations of samplers, brought to float64 and made to use our levels and our noise."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.plan import Progress

PROCESS = fs.process.vp_linear()
SHAPE = (2, 3, 4, 4)
STEPS = 10
THAT_DRAW = [
    f"scheduling_{name}"
    for name in (
        "consistency_models",
        "ddim",
        "ddpm",
        "euler_ancestral_discrete",
        "flow_match_lcm",
        "lcm",
        "scm",
        "tcd",
    )
]
"""Modules of diffusers whose schedulers draw noise."""


@functools.cache
def k_diffusion() -> ModuleType:
    """`k_diffusion.sampling`, without importing its package: that wants torchvision, torchsde and more at once."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("k-diffusion is not installed")
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    utils = ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    absent = {name: mock.MagicMock() for name in ("torchdiffeq", "torchsde")}
    present = {"k_diffusion": package, "k_diffusion.utils": utils}
    with mock.patch.dict(sys.modules, {**absent, **present}):
        module = importlib.import_module("k_diffusion.sampling")
    module.trange = lambda n, **_: range(n)  # type: ignore[attr-defined]
    return module


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any smooth function of the point and the time."""
    return torch.sin(1.3 * x) + 0.2 * torch.cos(t.double() / 150).view(-1, 1, 1, 1)


def start() -> Tensor:
    """A start at noise of size 1."""
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def doubled(noise: Callable[[], Tensor] | None = None) -> Iterator[None]:
    """Let the peer compute in float64, and draw the noise that it is given."""
    from diffusers import schedulers as peers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        for name in THAT_DRAW:
            module = getattr(peers, name)
            patch.setattr(module, "randn_tensor", lambda *_, **__: noise and noise())
        yield


class Peer:
    """A diffusers scheduler on one of its own grids, and that grid as ours.

    Its grid ends with clean data, or at a last time for schedulers that end there.
    """

    def __init__(
        self, name: str, steps: int = STEPS, last: float | None = None, **config: Any
    ) -> None:
        from diffusers import schedulers as peers

        self.scheduler = getattr(peers, name)(
            num_train_timesteps=1000,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            prediction_type="epsilon",
            timestep_spacing="leading",
            **config,
        )
        alpha = PROCESS.alpha(torch.arange(1000, dtype=torch.float64))
        self.scheduler.alphas_cumprod = alpha**2
        self.scheduler.betas = torch.as_tensor(PROCESS.betas)
        self.scheduler.alphas = 1 - self.scheduler.betas
        if hasattr(self.scheduler, "final_alpha_cumprod"):
            self.scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
        self.scheduler.set_timesteps(steps)
        times = list(dict.fromkeys(self.scheduler.timesteps.tolist()))
        ends = [] if last is None else [last]
        self.grid = fs.Grid.from_times(PROCESS, [*times, *ends], end_clean=last is None)
        self.in_sigma = hasattr(self.scheduler, "sigmas")
        if self.in_sigma:
            ratios = torch.tensor(self.grid.ratios, dtype=torch.float64)
            if name == "HeunDiscreteScheduler":
                ratios = torch.cat([ratios[:1], ratios[1:-1].repeat_interleave(2), ratios[-1:]])
            assert ratios.shape == self.scheduler.sigmas.shape
            torch.testing.assert_close(
                ratios.float(), self.scheduler.sigmas.float(), rtol=1e-4, atol=1e-6
            )
            self.scheduler.sigmas = ratios

    def run(
        self, x: Tensor, scaled: bool, noise: Callable[[], Tensor] | None = None
    ) -> list[Tensor]:
        """The points of all network calls, and the result.

        Where the peer works in `x / alpha` (scaled), it brings the network's input to our coordinates by itself.
        """
        points = []
        if scaled:
            x = x / self.grid.levels[0].alpha
        with doubled(noise):
            for t in self.scheduler.timesteps:
                point = self.scheduler.scale_model_input(x, t)
                points.append(point)
                x = self.scheduler.step(network(point, t.view(1)), t, x).prev_sample
        return [*points, x]


def ours(
    grid: fs.Grid,
    sampler: str,
    x: Tensor,
    noise: Any = None,
    net: Callable[[Tensor, Tensor], Tensor] = network,
    **options: Any,
) -> list[Tensor]:
    """The points of all network calls, and the result."""
    kind = "flow" if grid.process.name == "flow" else "noise"
    denoiser = fs.Denoiser(net, grid.process, kind)
    points: list[Tensor] = []

    def keep(step: Progress) -> None:
        points.append(step.x)

    result = fs.plan(sampler, grid, **options).run(denoiser, x, noise, keep)
    return [*points, result]


class Draws:
    """The same noise for both: for us by the level where a step starts, for the peer in the order of the steps."""

    def __init__(self, grid: fs.Grid, shape: tuple[int, ...] = SHAPE) -> None:
        generator = torch.Generator().manual_seed(2)
        self._draws = {
            t: torch.randn(shape, dtype=torch.float64, generator=generator)
            for t in grid.levels[:-1]
        }
        self._order = iter(self._draws.values())

    def __call__(self, start: fs.Level, end: fs.Level) -> Tensor:
        return self._draws[start]

    def next(self) -> Tensor:
        return next(self._order)


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    for k, (a, b) in enumerate(zip(got, wanted, strict=True)):
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-9, msg=lambda m, k=k: f"point {k}: {m}"
        )
