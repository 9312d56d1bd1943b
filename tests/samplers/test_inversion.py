"""Samplers that run backwards exactly: the papers' formulas, the round trip, and what it cannot do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from exact_problems import FIRST, LAST, NORMAL, PROCESSES, RHO, START, grid, label, mixture, truth
from fewstep.errors import InvalidInputError, UnknownNameError
from fewstep.samplers.inversion import Encoding, ddim_inverse, decode, encode

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("edict", {}),
    ("edict", {"alternate": False}),
    ("bdia", {}),
    ("belm", {}),
]
ROUGH = [20.0, 7.0, 6.5, 2.0, 0.9, 0.3, 0.29]
Noise = Callable[[Tensor, fs.Level], Tensor]


def smooth_grid(
    process: fs.Process, steps: int, last: float = 0.0, first: float = 40.0
) -> fs.Grid:
    """Levels that become denser downwards, then clean data or the given last level."""
    ratios = (
        np.linspace(first ** (1 / RHO), (last or 0.02) ** (1 / RHO), steps + (last > 0)) ** RHO
    )
    return fs.Grid.from_ratios(process, [*ratios, *([] if last else [0.0])])


# ---- the papers, in their own variables ------------------------------------------------------


def edict_of_the_paper(
    noise: Noise, x: Tensor, levels: Sequence[fs.Level], mix: float, alternate: bool
) -> Tensor:
    """Wallace et al. 2022: `a x + b eps`, each with the noise of the other, then the mixing.

    The second point is handed to the network at the scale of t.
    """
    y = x
    for i, (t, s) in enumerate(zip(levels, levels[1:], strict=False)):
        a = s.alpha / t.alpha
        b = s.sigma - a * t.sigma
        if alternate and i % 2:
            y = a * y + b * noise(x, t)
            x = a * x + b * noise(y / a, t)
        else:
            x = a * x + b * noise(y, t)
            y = a * y + b * noise(x / a, t)
        x = mix * x + (1 - mix) * y
        y = mix * y + (1 - mix) * x
    return x


def ddim(noise: Tensor, x: Tensor, t: fs.Level, s: fs.Level) -> Tensor:
    """Song et al. 2021, deterministic: the estimate of x_0 in noise form, and the noise."""
    return s.alpha * (x - t.sigma * noise) / t.alpha + s.sigma * noise


def bdia_of_the_paper(noise: Noise, x: Tensor, levels: Sequence[fs.Level], gamma: float) -> Tensor:
    """Zhang et al. 2023; their gamma, which acts on x, as ours makes it on `x / alpha`."""
    points = [x, ddim(noise(x, levels[0]), x, levels[0], levels[1])]
    for before, t, s in zip(levels, levels[1:], levels[2:], strict=False):
        eps = noise(points[-1], t)
        theirs = gamma * s.alpha / before.alpha
        back, on = (ddim(eps, points[-1], t, to) for to in (before, s))
        points.append(theirs * (points[-2] - back) + on)
    return points[-1]


def belm_of_the_paper(noise: Noise, x: Tensor, levels: Sequence[fs.Level]) -> Tensor:
    """Wang et al. 2024, with their steps `h = sigma / alpha` apart."""
    points = [x, ddim(noise(x, levels[0]), x, levels[0], levels[1])]
    for before, t, s in zip(levels, levels[1:], levels[2:], strict=False):
        h_before = before.sigma / before.alpha - t.sigma / t.alpha
        h = t.sigma / t.alpha - s.sigma / s.alpha
        points.append(
            (h / h_before) ** 2 * (s.alpha / before.alpha) * points[-2]
            + (1 - (h / h_before) ** 2) * (s.alpha / t.alpha) * points[-1]
            - h * (h + h_before) / h_before * s.alpha * noise(points[-1], t)
        )
    return points[-1]


PAPERS: list[tuple[str, Callable[..., Tensor], dict[str, Any]]] = [
    ("edict", edict_of_the_paper, {"mix": 0.93, "alternate": True}),
    ("edict", edict_of_the_paper, {"mix": 0.8, "alternate": False}),
    ("bdia", bdia_of_the_paper, {"gamma": 1.0}),
    ("bdia", bdia_of_the_paper, {"gamma": 0.5}),
    ("belm", belm_of_the_paper, {}),
]


@pytest.mark.parametrize("ratios", [ROUGH, [*ROUGH, 0.0], [5.0, 1.0], [5.0, 0.0]], ids=len)
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("name", "paper", "options"), PAPERS, ids=label)
def test_the_samplers_are_those_of_the_papers(
    name: str,
    paper: Callable[..., Tensor],
    options: dict[str, Any],
    process: fs.Process,
    ratios: list[float],
) -> None:
    levels = fs.Grid.from_ratios(process, ratios)
    denoiser = mixture(process)

    def noise(x: Tensor, t: fs.Level) -> Tensor:
        return (x - t.alpha * denoiser(x, t)) / t.sigma

    x = levels.levels[0].sigma * NORMAL
    got = fs.plan(name, levels, **options).run(denoiser, x)
    wanted = paper(noise, x, levels.levels, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_a_single_data_point_is_hit_exactly() -> None:
    """There the noise never changes; EDICT, which asks about points of other levels, hits it in the limit alone."""
    point = torch.tensor([[0.4, -1.0]], dtype=torch.float64)
    for process in PROCESSES.values():
        levels = fs.Grid.from_ratios(process, [*ROUGH, 0.0])
        x = levels.levels[0].alpha * point + levels.levels[0].sigma * NORMAL
        for name in ("bdia", "belm"):
            got = fs.plan(name, levels).run(lambda x, level: point.expand_as(x), x)
            torch.testing.assert_close(got, point.expand_as(x), rtol=0, atol=1e-12)


def test_two_step_methods_draw_a_parabola_or_the_leapfrog() -> None:
    """One step by hand: the parabola through `x_before` with the slope at t; or the slope over both steps."""
    levels = fs.Grid.from_ratios(fs.process.edm(), [3.0, 2.0, 0.5])
    first, second = (torch.tensor([[v]], dtype=torch.float64) for v in (1.0, 0.2))
    slope = (0.2 - 0.05) / 2.0
    states = (first, second)

    def denoiser(x: Tensor, level: fs.Level) -> Tensor:
        assert (level.ratio, float(x)) == (2.0, 0.2)
        return torch.full_like(x, 0.05)

    curvature = 1.0 - 0.2 - slope * 1.0  # what is left over one unit behind
    wanted = 0.2 + slope * -1.5 + curvature * 1.5**2
    assert float(decode(Encoding("belm", {}, levels, states), denoiser)) == pytest.approx(wanted)
    wanted = 1.0 + slope * (0.5 - 3.0)
    got = decode(Encoding("bdia", {"gamma": 1.0}, levels, states), denoiser)
    assert float(got) == pytest.approx(wanted)


def test_a_step_of_a_thousand_times_the_one_before_magnifies_nothing_without_end() -> None:
    levels = fs.Grid.from_ratios(fs.process.edm(), [3.0, 2.999, 1.999])
    states = (torch.ones(1, 1).double(), torch.zeros(1, 1).double())
    end = decode(Encoding("belm", {}, levels, states), lambda x, level: x)
    assert float(end) == pytest.approx(1e4)


# ---- order -----------------------------------------------------------------------------------


def orders(name: str, options: dict[str, Any], make: Callable[[int], fs.Grid]) -> list[float]:
    errors = []
    for steps in (40, 80, 160):
        end = fs.plan(name, make(steps), **options).run(mixture(PROCESSES["edm"]), START)
        errors.append(float((end - truth()).abs().max()))
    return [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [("bdia", {}, 2), ("belm", {}, 2), ("bdia", {"gamma": 0.5}, 1), ("edict", {}, 1)],
)
def test_the_order_on_a_grid_that_changes_smoothly(
    name: str, options: dict[str, Any], order: int
) -> None:
    edm = PROCESSES["edm"]
    assert orders(name, options, lambda n: smooth_grid(edm, n, LAST, FIRST))[-1] == pytest.approx(
        order, abs=0.2
    )


def test_the_leapfrog_takes_both_of_its_steps_for_equal() -> None:
    """On a grid of steps that alternate it is of first order, which its metadata states."""
    assert orders("bdia", {}, lambda n: grid(PROCESSES["edm"], n))[-1] == pytest.approx(1, abs=0.1)


# ---- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("name", "options"), METHODS, ids=label)
def test_fifty_steps_up_and_down_give_the_data_back(
    name: str, options: dict[str, Any], process: fs.Process
) -> None:
    denoiser = mixture(process)
    x0 = denoiser.sample(16, torch.Generator().manual_seed(3))
    for levels in (smooth_grid(process, 50), smooth_grid(process, 50, 0.05)):
        point = levels.levels[-1].alpha * x0
        encoding = encode(name, denoiser, point, levels, **options)
        torch.testing.assert_close(decode(encoding, denoiser), point, rtol=0, atol=1e-10)
        assert encoding.latent.shape == x0.shape


@pytest.mark.parametrize("ratios", [[4.0, 0.0], [4.0, 1.0, 0.0], [4.0, 3.9, 0.1, 0.0], ROUGH])
@pytest.mark.parametrize(("name", "options"), METHODS, ids=label)
def test_grids_of_any_steps(name: str, options: dict[str, Any], ratios: list[float]) -> None:
    for process in PROCESSES.values():
        denoiser, levels = mixture(process), fs.Grid.from_ratios(process, ratios)
        point = levels.levels[-1].alpha * NORMAL
        back = decode(encode(name, denoiser, point, levels, **options), denoiser)
        torch.testing.assert_close(back, point, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "options"), METHODS, ids=label)
def test_decoding_is_the_sampler_from_another_start(name: str, options: dict[str, Any]) -> None:
    """From the states that the sampler makes for itself, both give the same points, not only nearly."""
    process = PROCESSES["vp"]
    levels, denoiser = smooth_grid(process, 12), mixture(process)
    t, s = levels.levels[:2]
    x = t.sigma * NORMAL
    noise = (x - t.alpha * denoiser(x, t)) / t.sigma
    states = (x, x if name == "edict" else ddim(noise, x, t, s))
    resolved = fs.samplers.SAMPLERS.find(name).resolve(options)
    decoded = decode(Encoding(name, resolved, levels, states), denoiser)
    sampled = fs.plan(name, levels, **options).run(denoiser, x)
    torch.testing.assert_close(decoded, sampled, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), METHODS, ids=label)
def test_the_latent_is_the_noise_that_the_sampler_would_start_from(
    name: str, options: dict[str, Any]
) -> None:
    """Sampling from one state alone comes near the data, nearer with more steps."""
    process = PROCESSES["edm"]
    denoiser = mixture(process)
    x0 = denoiser.sample(16, torch.Generator().manual_seed(3))
    errors = []
    for steps in (40, 80):
        levels = smooth_grid(process, steps)
        latent = encode(name, denoiser, x0, levels, **options).latent
        errors.append(float((fs.plan(name, levels, **options).run(denoiser, latent) - x0).norm()))
    assert errors[1] < 0.6 * errors[0]


def test_names_images_and_types() -> None:
    process = PROCESSES["flow"]
    levels = fs.Grid.from_ratios(process, [9.0, 3.0, 1.0, 0.2, 0.0])
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    denoiser = fs.Denoiser(lambda x, t: torch.tanh(x), process, "flow")
    for name in ("EDICT", "BDIA-DDIM", "O-BELM"):
        encoding = encode(name, denoiser, images, levels)
        assert encoding.sampler in ("edict", "bdia", "belm")
        assert encoding.latent.dtype == torch.float32
        torch.testing.assert_close(decode(encoding, denoiser), images, rtol=0, atol=1e-4)
        assert not encoding.latent.requires_grad
        assert encode(name, denoiser, images.double(), levels).latent.dtype == torch.float64


def test_another_denoiser_edits_the_data() -> None:
    """Data moved by a constant: what was encoded for the one comes out as what the other has in its place."""
    process = PROCESSES["vp"]
    levels = smooth_grid(process, 40)
    at_zero, at_two = (
        fs.exact.GaussianMixture(torch.full((1, 2), m).double(), 0.5, process=process)
        for m in (0.0, 2.0)
    )
    x0 = 0.5 * NORMAL
    encoding = encode("belm", at_zero, x0, levels)
    torch.testing.assert_close(decode(encoding, at_two), x0 + 2.0, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("name", "kept", "lost"),
    [
        ("bdia", {"gamma": 1.0}, {"gamma": 0.5}),
        ("edict", {"mix": 0.93}, {"mix": 0.7, "alternate": False}),
    ],
)
def test_rounding_grows_with_each_step_as_documented(
    name: str, kept: dict[str, Any], lost: dict[str, Any]
) -> None:
    """By `1 / gamma`, or EDICT's two points apart by `1 / mix^2`: 20 steps can bear 2, 100 steps cannot."""
    denoiser = mixture(PROCESSES["vp"])

    def error(steps: int, options: dict[str, Any]) -> float:
        levels = smooth_grid(PROCESSES["vp"], steps)
        encoding = encode(name, denoiser, NORMAL, levels, **options)
        return float((decode(encoding, denoiser) - NORMAL).abs().max())

    assert error(100, kept) < 1e-9
    assert error(20, lost) < 1e-8
    assert error(100, lost) > 1e-2


# ---- DDIM inversion --------------------------------------------------------------------------


def test_ddim_inversion_undoes_ddim_where_the_noise_does_not_change() -> None:
    point = torch.tensor([[0.4, -1.0]], dtype=torch.float64)

    def denoiser(x: Tensor, level: fs.Level) -> Tensor:
        return point.expand_as(x)

    for process in PROCESSES.values():
        for ratios in (ROUGH, [math.inf, *ROUGH] if process.name == "flow" else ROUGH):
            levels = fs.Grid.from_ratios(process, ratios)
            first = levels.levels[0]
            start = first.alpha * point + first.sigma * NORMAL
            there = fs.plan("ddim", levels).run(denoiser, start)
            torch.testing.assert_close(
                ddim_inverse(denoiser, there, levels), start, rtol=1e-11, atol=1e-11
            )


def test_ddim_inversion_is_ddim_on_the_way_up() -> None:
    """The error of the way there and back falls in the first order of the step, and not faster."""
    process = PROCESSES["vp"]
    denoiser = mixture(process)
    errors = []
    for steps in (100, 200, 400):
        levels = smooth_grid(process, steps, 0.3, 3.0)
        up = ddim_inverse(denoiser, NORMAL, levels)
        errors.append(float((fs.plan("ddim", levels).run(denoiser, up) - NORMAL).abs().max()))
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert measured == pytest.approx([1, 1], abs=0.2)


def test_ddim_inversion_of_diffusers() -> None:
    """The peer asks the network at the level that a step leads to, so here the network does not look at the time."""
    schedulers = pytest.importorskip("diffusers").schedulers
    process = fs.process.vp_linear()
    peer = schedulers.DDIMInverseScheduler(clip_sample=False, timestep_spacing="leading")
    bars = process.alpha(torch.arange(1000, dtype=torch.float64)) ** 2
    peer.alphas_cumprod = bars
    peer.set_timesteps(10)

    def network(x: Tensor, t: Tensor | None = None) -> Tensor:
        return torch.sin(1.3 * x)

    times = peer.timesteps.tolist()
    wanted = NORMAL
    for t in times[1:]:  # from the first noisy level on: at clean data our rule is another
        wanted = peer.step(network(wanted), t, wanted).prev_sample
    levels = fs.Grid.from_times(process, [float(t) for t in times[::-1]], end_clean=False)
    got = ddim_inverse(fs.Denoiser(network, process, "noise"), NORMAL, levels)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_the_first_step_from_clean_data_asks_at_the_next_level() -> None:
    levels = fs.Grid.from_ratios(PROCESSES["vp"], [2.0, 0.5, 0.0])
    asked = []

    def denoiser(x: Tensor, level: fs.Level) -> Tensor:
        asked.append((level, x))
        return 0.8 * x

    end = ddim_inverse(denoiser, NORMAL, levels)
    low, high = levels.levels[1], levels.levels[0]
    assert [level for level, _ in asked] == [low, low]
    torch.testing.assert_close(asked[0][1], low.alpha * NORMAL)
    noise = low.alpha * NORMAL * (1 - 0.8 * low.alpha) / low.sigma
    first = low.alpha * NORMAL + low.sigma * noise
    torch.testing.assert_close(asked[1][1], first)
    noise = first * (1 - 0.8 * low.alpha) / low.sigma
    torch.testing.assert_close(end, high.alpha * 0.8 * first + high.sigma * noise)


# ---- bad input -------------------------------------------------------------------------------


def test_what_cannot_be_run_backwards_is_refused_in_one_line() -> None:
    flow = PROCESSES["flow"]
    levels = smooth_grid(flow, 5)
    denoiser = mixture(flow)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            InvalidInputError,
            "euler cannot be run backwards exactly; take one of edict, bdia, belm",
            lambda: encode("euler", denoiser, NORMAL, levels),
        ),
        (
            UnknownNameError,
            "unknown sampler 'bellm'; did you mean 'belm'",
            lambda: encode("bellm", denoiser, NORMAL, levels),
        ),
        (
            UnknownNameError,
            "unknown option of belm 'gamma'",
            lambda: encode("belm", denoiser, NORMAL, levels, gamma=1.0),
        ),
        (
            InvalidInputError,
            "mix=0.2 is not a number in 0.5..1",
            lambda: encode("edict", denoiser, NORMAL, levels, mix=0.2),
        ),
        (
            InvalidInputError,
            "belm cannot be run back to pure noise",
            lambda: encode(
                "belm", denoiser, NORMAL, fs.Grid.from_ratios(flow, [math.inf, 1.0, 0.0])
            ),
        ),
        (
            InvalidInputError,
            "x must be a floating-point tensor",
            lambda: encode("belm", denoiser, NORMAL.int(), levels),
        ),
        (
            InvalidInputError,
            "x must be a floating-point tensor",
            lambda: ddim_inverse(denoiser, NORMAL.int(), levels),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind) as error:
            call()
        assert message in str(error.value)
        assert "\n" not in str(error.value)
