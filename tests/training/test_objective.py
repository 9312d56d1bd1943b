from __future__ import annotations

import pytest
import torch

from fewstep import process as processes
from fewstep.training import pixelwise_loss, prediction_loss
from fewstep.training.objective import drop_labels
from fewstep.training.times import uniform_times

COUNT = 2048  # times 64 pixels: the mean of squared normals is known to 0.4 %


def _normal(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(COUNT, 1, 8, 8, generator=generator)


def _loss(process, t, predicts, network) -> float:
    times = torch.full((COUNT,), float(t), dtype=torch.float64)
    return float(prediction_loss(network, process, _normal(0), _normal(1), times, predicts))


@pytest.mark.parametrize("t", [0, 100, 400, 999])
def test_best_noise_prediction_on_normal_data(t):
    """Data N(0, 1), VP: the best prediction is sigma x_t, and it leaves E|noise - sigma x_t|^2 = alpha^2."""
    vp = processes.vp_linear()
    level = vp.level(t)
    loss = _loss(vp, t, "noise", lambda x, times: level.sigma * x)
    assert loss == pytest.approx(level.alpha**2, rel=0.015)


@pytest.mark.parametrize("t", [0, 400, 999])
def test_best_velocity_and_data_prediction_on_normal_data(t):
    vp = processes.vp_linear()
    level = vp.level(t)
    assert _loss(vp, t, "velocity", lambda x, times: 0 * x) == pytest.approx(1.0, rel=0.015)
    data = _loss(vp, t, "data", lambda x, times: level.alpha * x)
    assert data == pytest.approx(level.sigma**2, rel=0.015)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_best_flow_prediction_on_normal_data(t):
    """Cov(noise - x_0, x_t) = 2t - 1, Var x_t = s = t^2 + (1 - t)^2: what is left is 2 - (2t - 1)^2 / s = 1 / s."""
    s = t**2 + (1 - t) ** 2
    loss = _loss(processes.flow(), t, "flow", lambda x, times: (2 * t - 1) / s * x)
    assert loss == pytest.approx(1 / s, rel=0.015)


def test_mean_over_uniform_times():
    vp = processes.vp_linear()
    times = uniform_times(vp, COUNT, torch.Generator().manual_seed(2))
    alpha = vp.alpha(torch.arange(1000, dtype=torch.float64))

    def best(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return vp.sigma(t.double()).to(x).reshape(-1, 1, 1, 1) * x

    loss = float(prediction_loss(best, vp, _normal(0), _normal(1), times))
    spread = float(alpha.square().std()) / COUNT**0.5
    assert loss == pytest.approx(float(alpha.square().mean()), abs=4 * spread + 0.002)


def test_network_gets_noised_images_times_and_labels():
    flow, seen = processes.flow(), {}

    def network(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.update(x=x, t=t, labels=labels)
        return torch.zeros_like(x)

    x0, noise = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 5.0)
    times = torch.tensor([0.25, 0.75], dtype=torch.float64)
    prediction_loss(network, flow, x0, noise, times, "flow", labels=torch.tensor([7, 8]))
    assert seen["x"].flatten().tolist() == [3.5, 4.5]
    assert seen["t"].tolist() == [0.25, 0.75]
    assert seen["t"].dtype == torch.float32
    assert seen["labels"].tolist() == [7, 8]


def test_discrete_times_are_the_whole_table():
    process = processes.vp_from_betas([0.1, 0.2, 0.3, 0.4])
    times = uniform_times(process, 8000, torch.Generator().manual_seed(0))
    counts = torch.bincount(times.long(), minlength=4)
    assert times.frac().abs().max() == 0
    assert counts.tolist() == pytest.approx([2000] * 4, abs=4 * (8000 * 3 / 16) ** 0.5)


@pytest.mark.parametrize("name", ["flow", "vp_continuous", "ve"])
def test_continuous_times_fill_the_range_evenly(name):
    process = processes.from_dict({"name": name})
    times = uniform_times(process, 8000, torch.Generator().manual_seed(0))
    width = process.t_max - process.t_min
    assert times.min() >= process.t_min
    assert times.max() <= process.t_max
    deviation = width / 12**0.5 / 8000**0.5
    assert float(times.mean()) == pytest.approx(
        (process.t_max + process.t_min) / 2, abs=4 * deviation
    )
    assert float(times.std()) == pytest.approx(width / 12**0.5, rel=0.03)


def test_edm_times_are_even_in_the_logarithm():
    times = uniform_times(processes.edm(), 8000, torch.Generator().manual_seed(0)).log()
    low, high = torch.tensor([0.002, 80.0]).log().tolist()
    assert float(times.mean()) == pytest.approx((low + high) / 2, abs=0.15)


def test_pixelwise_loss_of_noise_prediction():
    vp = processes.vp_linear()
    times = torch.arange(1000, dtype=torch.float64)
    alpha, sigma = vp.alpha(times), vp.sigma(times)
    assert pixelwise_loss(vp, torch.ones(3)) == pytest.approx(float((alpha**2).mean()))
    variance = torch.tensor([0.0, 0.3])
    remaining = (alpha**2 * 0.3 / (alpha**2 * 0.3 + sigma**2)).mean() / 2
    assert pixelwise_loss(vp, variance) == pytest.approx(float(remaining))


def test_pixelwise_loss_is_what_the_best_pixelwise_guess_gets():
    """Data N(m, v) per pixel, flow: the loss of the conditional mean, by simulation."""
    flow, mean, variance = processes.flow(), 0.4, 0.25
    times = uniform_times(flow, COUNT, torch.Generator().manual_seed(3))

    def best(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.reshape(-1, 1, 1, 1)
        gain = ((1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)
        x0 = mean + gain * (x - (1 - t) * mean)
        return (x - x0) / t

    x0 = mean + variance**0.5 * _normal(0)
    loss = float(prediction_loss(best, flow, x0, _normal(1), times, "flow"))
    expected = pixelwise_loss(flow, torch.full((1, 8, 8), variance), "flow")
    assert loss == pytest.approx(expected, rel=0.03)


def test_labels_are_dropped_at_the_asked_rate():
    labels = torch.arange(20_000) % 10
    dropped = drop_labels(labels, 0.1, 10, torch.Generator().manual_seed(0))
    lost = dropped == 10
    assert float(lost.float().mean()) == pytest.approx(0.1, abs=4 * (0.09 / 20_000) ** 0.5)
    assert torch.equal(dropped[~lost], labels[~lost])


@pytest.mark.parametrize(("share", "expected"), [(0.0, [0, 1, 2]), (1.0, [3, 3, 3])])
def test_no_label_or_every_label_is_dropped(share, expected):
    labels = torch.tensor([0, 1, 2])
    assert drop_labels(labels, share, 3, torch.Generator().manual_seed(0)).tolist() == expected
