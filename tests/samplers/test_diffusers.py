"""Against diffusers, an independent implementation: the same points at every network call, in float64.

Diffusers keeps its tables in float32, so each test first gives the peer's scheduler our tables in float64 (the same
numbers with more digits), and while it steps its casts to float32 become casts to float64. What else had to be matched
is said in each test.
"""

from __future__ import annotations

import pytest
import torch

import fewstep as fs
from peer_support import STEPS, Draws, Peer, assert_same, doubled, network, ours, start

pytest.importorskip("diffusers", minversion="0.30")

import diffusers.utils  # noqa: E402
from diffusers import schedulers as peers  # noqa: E402

diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FLOW = fs.process.flow()


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
