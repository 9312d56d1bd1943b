"""The Taylor method: measured order, the law of its noise, real networks, and denoisers that have no derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep as fs
from exact_problems import PROCESSES, START, grid, measured_orders, mixture
from fewstep.errors import InvalidInputError
from fewstep.plan import Differentiate, Plan


def traced(levels: fs.Grid, **options: Any) -> Plan:
    made = fs.plan("ttm", levels, **options)
    assert isinstance(made, Plan)
    return made


def ttm_of_the_pack(
    levels: fs.Grid, x: Tensor, eta: float, noise: Callable[..., Tensor]
) -> Tensor:
    """As it is published, in sigma = sigma / alpha on the exact mixture, with the derivative by forward mode."""
    denoiser = mixture(PROCESSES["edm"])

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        v = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64) ** 2 + sigma**2
        distance = (x[:, None] - denoiser.means).square().sum(2)
        share = (-distance / (2 * v) - v.log()).exp() * denoiser.weights
        share = share / share.sum(1, keepdim=True)
        pull = (v - sigma**2)[None, :, None] * x[:, None] + sigma**2 * denoiser.means
        return (share[:, :, None] * pull / v[None, :, None]).sum(1)

    for (t, s), (a, b) in zip(levels.steps, pairwise(levels.ratios), strict=True):
        sigma = torch.tensor(a, dtype=torch.float64)
        denoised = model(x, sigma)
        if b == 0:
            return denoised
        _, change = torch.func.jvp(model, (x, sigma), (denoised - x, -sigma))
        h_eta = (1 + eta) * math.log(a / b)
        phi_1, phi_2 = -math.expm1(-h_eta), math.expm1(-h_eta) + h_eta
        x = math.exp(-h_eta) * x + phi_1 * denoised + phi_2 * change
        if eta:
            x = x + b * math.sqrt(-math.expm1(-2 * eta * math.log(a / b))) * noise(t, s)
    return x


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("end", [[], [0.0]], ids=["open", "clean"])
def test_it_is_the_published_formula(eta: float, end: list[float], process: fs.Process) -> None:
    levels = fs.Grid.from_ratios(process, [*grid(process, 9).ratios, *end])
    noise = fs.Noise(range(6), (2,), dtype=torch.float64)
    on_edm = fs.Grid.from_ratios(PROCESSES["edm"], levels.ratios)
    wanted = ttm_of_the_pack(on_edm, START, eta, noise)
    got = traced(levels, eta=eta).run(mixture(process), levels.levels[0].alpha * START, noise)
    # the part of the derivative that belongs to the level is a difference quotient
    torch.testing.assert_close(got / levels.levels[-1].alpha, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_without_noise_it_is_of_second_order(process: fs.Process) -> None:
    assert measured_orders("ttm", {"eta": 0.0}, process, (40, 80, 160)) == pytest.approx(
        [2.0, 2.0], abs=0.2
    )


def errors_in_law(eta: float, along_drift: bool, steps: int) -> np.ndarray:
    """Errors of E x, E x^2, E x^3 and E cos 3x for data of two Gaussians in one dimension, with no sampling.

    The density is carried from level to level on a grid of points by the step's Gaussian kernel.
    """
    process = PROCESSES["edm"]
    centres = torch.tensor([[-1.0], [0.7]], dtype=torch.float64)
    widths, weights = torch.tensor([0.3, 0.45]).double(), torch.tensor([0.4, 0.6]).double()
    denoiser = fs.exact.GaussianMixture(centres, widths, weights, process=process)
    ratios = np.geomspace(3.0, 0.2, steps + 1)
    levels = fs.Grid.from_ratios(process, ratios).levels

    def points(level: fs.Level) -> Tensor:
        end = 7 * math.hypot(level.sigma, 1.1)
        return torch.linspace(-end, end, 401, dtype=torch.float64)

    def normal(x: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
        return (-(((x - mean) / std) ** 2) / 2).exp() / (math.sqrt(2 * math.pi) * std)

    def density(level: fs.Level) -> Tensor:
        std = (widths**2 + level.sigma**2).sqrt()
        values = normal(points(level)[:, None], centres[:, 0], std) @ weights
        return values / values.sum()

    mass = density(levels[0])
    for t, s in pairwise(levels):
        x, y = points(t), points(s)
        mean = step_mean(denoiser, x[:, None], t, s, eta, along_drift)[:, 0]
        std = s.sigma * math.sqrt(-math.expm1(-2 * eta * math.log(t.sigma / s.sigma)))
        mass = normal(y[:, None], mean, std) @ mass * float(y[1] - y[0])
    difference, y = mass - density(levels[-1]), points(levels[-1])
    return np.array([float(difference @ f) for f in (y, y**2, y**3, (3 * y).cos())])


def step_mean(
    denoiser: fs.exact.GaussianMixture,
    x: Tensor,
    t: fs.Level,
    s: fs.Level,
    eta: float,
    along_drift: bool,
) -> Tensor:
    """The mean of a step: of the Plan's, or of one whose derivative follows the drift of the SDE instead."""
    levels = fs.Grid(denoiser.process, (t, s))
    if not along_drift:
        return traced(levels, eta=eta).run(denoiser, x, lambda a, b: torch.zeros_like(x))
    h, denoised = math.log(t.sigma / s.sigma), denoiser(x, t)
    rate = denoiser.derivative(x, (1 + eta) * (denoised - x), t)
    weight = h - -math.expm1(-(1 + eta) * h) / (1 + eta)
    euler = traced(levels, eta=eta).run(constant(denoised), x, lambda a, b: torch.zeros_like(x))
    return euler + weight * rate


def constant(denoised: Tensor) -> Any:
    """An estimate that does not change."""

    class Constant:
        def __call__(self, x: Tensor, level: fs.Level) -> Tensor:
            return denoised

        def derivative(self, x: Tensor, along: Tensor, level: fs.Level) -> Tensor:
            return torch.zeros_like(x)

    return Constant()


@pytest.mark.parametrize(("along_drift", "order"), [(False, 2), (True, 1)])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_derivative_along_the_ode_gives_weak_order_two(
    eta: float, along_drift: bool, order: int
) -> None:
    """Also on data that are not Gaussian; along the drift of the SDE, as one might expect, it would be one."""
    coarse, fine = (errors_in_law(eta, along_drift, steps) for steps in (12, 24))
    measured = np.log2(np.linalg.norm(coarse) / np.linalg.norm(fine))
    assert measured == pytest.approx(order, abs=0.2)


class Small(nn.Module):
    """A network with weights, labels and every kind of dependence on x and t."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(3, 32), nn.Linear(32, 2)
        self.label = nn.Embedding(4, 32)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.into(torch.cat([x, t[:, None] / 1000], dim=1))
        if labels is not None:
            hidden = hidden + self.label(labels)
        return self.out(torch.tanh(hidden))


VP = fs.process.vp_linear()


def guided(scale: float) -> fs.ClassifierFree:
    labelled = fs.Denoiser(Small().double(), VP, "noise", {"labels": torch.tensor([0, 1, 2])})
    return fs.ClassifierFree(labelled, scale, null={"labels": 3})


DENOISERS: dict[str, Callable[[], Any]] = {
    "noise": lambda: fs.Denoiser(Small().double(), VP, "noise"),
    "velocity": lambda: fs.Denoiser(Small().double(), VP, "velocity"),
    "classifier-free": lambda: guided(3.0),
    "autoguided": lambda: fs.AutoGuided(
        fs.Denoiser(Small().double(), VP), fs.Denoiser(Small().double(), VP), 2.0
    ),
}


@pytest.fixture(params=DENOISERS)
def denoiser(request: pytest.FixtureRequest) -> Any:
    return DENOISERS[request.param]()


def test_real_networks_converge_in_second_order(denoiser: Any) -> None:
    """Small steps of a third-order sampler tell where it should arrive."""
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def end(name: str, steps: int, **options: Any) -> Tensor:
        levels = fs.Grid.from_ratios(VP, np.linspace(5 ** (1 / 3), 0.3 ** (1 / 3), steps + 1) ** 3)
        return fs.plan(name, levels, **options).run(denoiser, levels.levels[0].sigma * x)

    wanted = end("unipc", 300)
    errors = [float((end("ttm", n, eta=0.0) - wanted).abs().max()) for n in (15, 30, 60)]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.3)
    assert errors[2] < 3e-3


def test_the_bundled_model_arrives_where_other_samplers_do() -> None:
    model = fs.load("digits")
    settings: dict[str, Any] = {"seed": 3, "labels": [3], "batch_size": 1}
    settings["scheduler"] = "exponential"
    ode: dict[str, Any] = {"sampler": "ttm", "sampler_options": {"eta": 0.0}}
    wanted = fs.sample(model, steps=30, **settings).images
    few, many = (fs.sample(model, steps=n, **ode, **settings) for n in (3, 10))
    assert many.record["network_calls"] == 19
    errors = [float((got.images - wanted).square().mean().sqrt()) for got in (few, many)]
    assert errors[1] < 0.15
    assert errors[1] < errors[0] / 2
    noisy = fs.sample(model, sampler="ttm", steps=4, guidance=2.0, **settings).images
    assert torch.isfinite(noisy).all()


def test_the_derivative_is_not_asked_at_the_ends_of_the_path() -> None:
    levels = fs.Grid.from_ratios(fs.process.flow(), [math.inf, 5.0, 1.0, 0.2, 0.0])
    asked = [i.level for i in traced(levels).instructions if isinstance(i, Differentiate)]
    assert asked == list(levels.levels[1:-2])


def detached(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x).detach()


def in_numpy(x: Tensor, t: Tensor) -> Tensor:
    return torch.from_numpy(np.tanh(x.detach().numpy()))


def differentiable(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x)


NETWORK = fs.Denoiser(differentiable, VP)


@pytest.mark.parametrize(
    ("denoiser", "why"),
    [
        (fs.Denoiser(detached, VP), r"Denoiser cannot be differentiated \("),
        (fs.Denoiser(in_numpy, VP), r"Denoiser cannot be differentiated \("),
        (fs.Clipped(NETWORK), r"Clipped\(Denoiser\) cannot be differentiated"),
        (fs.DynamicThreshold(NETWORK), "cannot be differentiated"),
        (
            fs.AutoGuided(NETWORK, NETWORK, 2.0, projection=fs.Projection()),
            "leave projection and rescale out",
        ),
        (lambda x, level: x, "function cannot be differentiated"),
    ],
    ids=["detached", "numpy", "clipped", "threshold", "projection", "function"],
)
def test_what_cannot_be_differentiated_is_refused_in_one_line(denoiser: Any, why: str) -> None:
    plan = traced(fs.schedulers.karras(VP, 4), eta=0.0)
    with pytest.raises(InvalidInputError, match=why) as refused:
        plan.run(denoiser, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert "\n" not in str(refused.value)
    assert "dpmpp_2m" in str(refused.value)
