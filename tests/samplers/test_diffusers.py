"""Against diffusers, an independent implementation: the same points at every network call, in float64.

Diffusers keeps its tables in float32, so each test first gives the peer's scheduler our tables in float64 (the same
numbers with more digits), and while it steps its casts to float32 become casts to float64. What else had to be matched
is said in each test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.plan import Progress

pytest.importorskip("diffusers", minversion="0.30")

import diffusers.utils  # noqa: E402
from diffusers import schedulers as peers  # noqa: E402

diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PROCESS = fs.process.vp_linear()
FLOW = fs.process.flow()
SHAPE = (2, 3, 4, 4)
STEPS = 10


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any smooth function of the point and the time."""
    return torch.sin(1.3 * x) + 0.2 * torch.cos(t.double() / 150).view(-1, 1, 1, 1)


@contextlib.contextmanager
def doubled(noise: Callable[[], Tensor] | None = None) -> Iterator[None]:
    """Let the peer compute in float64, and draw the noise that it is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        for name in ("scheduling_ddim", "scheduling_ddpm", "scheduling_euler_ancestral_discrete"):
            module = getattr(peers, name)
            patch.setattr(module, "randn_tensor", lambda *_, **__: noise and noise())
        yield


class Peer:
    """A diffusers scheduler on one of its own grids, and that grid as ours."""

    def __init__(self, name: str, **config: Any) -> None:
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
        self.scheduler.set_timesteps(STEPS)
        times = list(dict.fromkeys(self.scheduler.timesteps.tolist()))
        self.grid = fs.Grid.from_times(PROCESS, times)
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
    grid: fs.Grid, sampler: str, x: Tensor, noise: Any = None, **options: Any
) -> list[Tensor]:
    """The points of all network calls, and the result."""
    kind = "flow" if grid.process == FLOW else "noise"
    denoiser = fs.Denoiser(network, grid.process, kind)
    points: list[Tensor] = []

    def keep(step: Progress) -> None:
        points.append(step.x)

    result = fs.plan(sampler, grid, **options).run(denoiser, x, noise, keep)
    return [*points, result]


def start() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Draws:
    """The same noise for both: for us by the level where a step starts, for the peer in the order of the steps."""

    def __init__(self, grid: fs.Grid) -> None:
        generator = torch.Generator().manual_seed(2)
        self._draws = {
            t: torch.randn(SHAPE, dtype=torch.float64, generator=generator)
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


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta: float) -> None:
    """Matched: no clipping of x_0; the last step ends at clean data (set_alpha_to_one, the default)."""
    peer = Peer("DDIMScheduler", clip_sample=False)
    draws, x = Draws(peer.grid), start()
    step = peer.scheduler.step
    peer.scheduler.step = lambda *args: step(*args, eta=eta)
    wanted = peer.run(x, scaled=False, noise=draws.next)
    assert_same(ours(peer.grid, "ddim", x, draws, eta=eta), wanted)


@pytest.mark.parametrize(
    ("variance", "peers_word"), [("posterior", "fixed_small"), ("large", "fixed_large")]
)
def test_ddpm(variance: str, peers_word: str) -> None:
    """Matched: no clipping of x_0. The peer too takes beta from the pair of levels, not from the table."""
    peer = Peer("DDPMScheduler", clip_sample=False, variance_type=peers_word)
    draws, x = Draws(peer.grid), start()
    wanted = peer.run(x, scaled=False, noise=draws.next)
    assert_same(ours(peer.grid, "ddpm", x, draws, variance=variance), wanted)


def test_euler() -> None:
    """Matched: the peer's state is x / alpha."""
    peer, x = Peer("EulerDiscreteScheduler"), start()
    assert_same(ours(peer.grid, "euler", x), peer.run(x, scaled=True))


def test_euler_ancestral() -> None:
    """Matched: the peer's state is x / alpha; it draws noise for the last step too, and multiplies it by 0."""
    peer, x = Peer("EulerAncestralDiscreteScheduler"), start()
    draws = Draws(peer.grid)
    wanted = peer.run(x, scaled=True, noise=draws.next)
    assert_same(ours(peer.grid, "euler_ancestral", x, draws), wanted)


def test_heun() -> None:
    """Matched: the peer's state is x / alpha, and its grid lists each inner level twice."""
    peer, x = Peer("HeunDiscreteScheduler"), start()
    assert_same(ours(peer.grid, "heun", x), peer.run(x, scaled=True))


def test_dpmpp_2m() -> None:
    """Matched: order 2, midpoint. The peer's last step, to clean data, is of first order too."""
    peer, x = Peer("DPMSolverMultistepScheduler", solver_order=2, solver_type="midpoint"), start()
    assert_same(ours(peer.grid, "dpmpp_2m", x), peer.run(x, scaled=False))


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order: int, variant: str) -> None:
    """Matched: the data prediction. With bh1 the peer's last step to clean data is 0 times infinity: left out."""
    peer = Peer("UniPCMultistepScheduler", solver_order=order, solver_type=variant)
    x = start()
    wanted = peer.run(x, scaled=False)
    got = ours(peer.grid, "unipc", x, order=order, variant=variant)
    if variant == "bh1":
        assert wanted.pop().isnan().all()
        assert got.pop().isfinite().all()
    assert_same(got, wanted)


def test_flow_matching_euler() -> None:
    """Matched: the peer's times are 1000 times ours, which the network undoes."""
    scheduler = peers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    times = (scheduler.timesteps.double() / 1000).tolist()
    grid = fs.Grid.from_times(FLOW, times)
    scheduler.sigmas = torch.tensor([*times, 0.0], dtype=torch.float64)
    x = point = start()
    wanted = []
    with doubled():
        for t, time in zip(scheduler.timesteps, times, strict=True):
            wanted.append(point)
            velocity = network(point, torch.tensor([time], dtype=torch.float64))
            point = scheduler.step(velocity, t, point).prev_sample
    assert_same(ours(grid, "euler", x), [*wanted, point])


def test_our_tables_are_the_peers_with_more_digits() -> None:
    for process, schedule, config in (
        (fs.process.vp_linear(), "linear", {"beta_start": 1e-4, "beta_end": 0.02}),
        (
            fs.process.vp_scaled_linear(),
            "scaled_linear",
            {"beta_start": 0.00085, "beta_end": 0.012},
        ),
        (fs.process.vp_cosine(), "squaredcos_cap_v2", {}),
    ):
        peer = peers.DDPMScheduler(beta_schedule=schedule, **config)
        ours = process.alpha(torch.arange(1000, dtype=torch.float64)) ** 2
        torch.testing.assert_close(ours.float(), peer.alphas_cumprod, rtol=1e-4, atol=1e-9)
