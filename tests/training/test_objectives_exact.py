"""Every prediction, weight and distribution of times against what is known of Gaussian data."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch

from fewstep import process as processes
from fewstep.denoisers import Parameterisation
from fewstep.errors import InvalidInputError, UnknownNameError
from fewstep.training import TIMES, WEIGHTS, Objective, pixelwise_loss
from fewstep.training.times import Times, uniform_numbers

PROCESSES = {
    name: processes.from_dict({"name": name}) for name in ("vp_linear", "vp_cosine", "edm", "flow")
}
PREDICTIONS = ("noise", "data", "velocity", "flow", "edm")
VARIANCE, COUNT, PIXELS = 0.09, 512, 256


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact_network(objective, factor=1.0):
    """The network whose estimate is the posterior mean of N(0, VARIANCE) data, or a multiple of it."""
    process, form = objective.process, Parameterisation(objective.predicts)

    def network_at(times):
        a, s = (f(times).reshape(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
        skip, out = form.estimate_of(a, s)
        scale, _ = form.input_of(times.reshape(-1, 1, 1, 1), a, s)
        gain = a * VARIANCE / (a**2 * VARIANCE + s**2)
        return lambda inputs, t: (factor * gain - skip) / out * (inputs / scale)

    return network_at


def measured(objective, factor=1.0, count=COUNT):
    """Loss of each image in float64, the share of the expected square of the error divided out by the caller."""
    data = math.sqrt(VARIANCE) * torch.randn(
        count, 1, 16, 16, generator=random(0), dtype=torch.float64
    )
    noise = torch.randn(count, 1, 16, 16, generator=random(1), dtype=torch.float64)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    t = objective.times.quantile(u)
    return t, objective.per_image(exact_network(objective, factor)(t), data, noise, t).double()


@pytest.mark.parametrize("times", TIMES.names())
@pytest.mark.parametrize("weight", WEIGHTS.names())
@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES)
def test_the_exact_denoiser_has_the_loss_of_the_closed_form_and_no_less_is_possible(
    process, predicts, weight, times
):
    """At every level the loss is w sigma^2 v / (alpha^2 v + sigma^2); a gain 1 +- d adds w d^2 (gain)^2 Var x_t."""
    objective = Objective(PROCESSES[process], predicts, {"name": times}, {"name": weight})
    t, loss = measured(objective)
    a, s = objective.process.alpha(t), objective.process.sigma(t)
    spread = a**2 * VARIANCE + s**2
    rest = s**2 * VARIANCE / spread
    expected = objective.weight.on_x0(t) * rest
    # 256 squared normals for each image, so each ratio is known to 9 %, their mean to 0.4 %.
    assert float((loss / expected).mean()) == pytest.approx(1, abs=0.02)
    gain = a * VARIANCE / spread
    for d in (-0.2, 0.2):
        _, other = measured(objective, 1 + d)
        more = objective.weight.on_x0(t) * d**2 * gain**2 * spread
        assert float(other.sum()) > float(loss.sum())
        assert float((other / (expected + more)).mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("times", TIMES.names())
@pytest.mark.parametrize("weight", ["simple", "snr", "min_snr", "p2"])
@pytest.mark.parametrize("predicts", ["noise", "velocity"])
@pytest.mark.parametrize("process", PROCESSES)
def test_the_loss_of_a_batch_is_the_pixelwise_loss(process, predicts, weight, times):
    """Drawn at random, the mean of the exact denoiser's loss is the quadrature over the distribution."""
    objective = Objective(PROCESSES[process], predicts, {"name": times}, {"name": weight})
    count = 4096
    data = math.sqrt(VARIANCE) * torch.randn(
        count, 1, 4, 4, generator=random(2), dtype=torch.float64
    )
    noise = torch.randn(data.shape, generator=random(3), dtype=torch.float64)
    t = objective.draw_times(count, random(4))
    network = exact_network(objective)(t)
    each = objective.per_image(network, data, noise, t).double()
    expected = pixelwise_loss(objective.process, torch.full((3,), VARIANCE), objective=objective)
    error = float(each.std()) / count**0.5
    assert float(each.mean()) == pytest.approx(expected, abs=4 * error + 1e-3 * expected)
    assert float(objective(network, data, noise, t)) == pytest.approx(float(each.mean()), rel=1e-4)


def of_levels(weight, predicts, process=None, t=None, **options):
    process = process or processes.vp_linear()
    t = torch.tensor([3.0, 250.0, 700.0], dtype=torch.float64) if t is None else t
    objective = Objective(process, predicts, weight={"name": weight, **options})
    snr = (process.alpha(t) / process.sigma(t)).square()
    return objective.weight.on_output(t), snr


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_weights_are_those_of_their_papers():
    """Each in the prediction that its paper states it for."""
    w, snr = of_levels("min_snr", "noise")
    same(w, torch.minimum(snr, torch.tensor(5.0)) / snr)  # Hang et al. 2023, section 3.3
    w, snr = of_levels("min_snr", "data", gamma=1)
    same(w, torch.minimum(snr, torch.tensor(1.0)))
    w, snr = of_levels("min_snr", "velocity")
    same(w, torch.minimum(snr, torch.tensor(5.0)) / (snr + 1))
    w, snr = of_levels("p2", "noise", gamma=0.5, k=2)
    same(w, 1 / (2 + snr).sqrt())  # Choi et al. 2022, equation 8
    w, snr = of_levels("truncated_snr", "data")
    same(w, torch.maximum(snr, torch.tensor(1.0)))  # Salimans, Ho 2022
    w, snr = of_levels("snr", "noise")
    same(w, torch.ones_like(w))
    sigma = torch.tensor([0.01, 0.5, 30.0], dtype=torch.float64)
    w, _ = of_levels("edm", "data", processes.edm(), sigma)
    same(w, (sigma**2 + 0.25) / (sigma * 0.5) ** 2)  # Karras et al. 2022, table 1
    w, _ = of_levels("edm", "edm", processes.edm(), sigma)
    same(w, torch.ones_like(w))


def test_the_bound_weight_of_a_table_is_ddpm_equation_12():
    vp = processes.vp_linear(steps=50)
    t = torch.arange(1, 50, dtype=torch.float64)
    found = Objective(vp, "noise", weight={"name": "vlb"}).weight.on_output(t)
    beta = torch.from_numpy(vp.betas)
    alpha_bar = (1 - beta).cumprod(0)
    tilde = beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    expected = beta[1:] ** 2 / (2 * tilde * (1 - beta[1:]) * (1 - alpha_bar[1:]))
    torch.testing.assert_close(found, 50 * expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("weight", ["sigmoid", "vlb"])
@pytest.mark.parametrize("process", ["vp_linear", "edm"])
def test_integrals_over_log_snr_do_not_depend_on_how_times_are_drawn(process, weight):
    """Both are expectations of f(log_snr) over the density of the times, which cancels (a uniform one as yardstick)."""
    losses = [
        pixelwise_loss(
            PROCESSES[process],
            torch.tensor([VARIANCE]),
            objective=Objective(PROCESSES[process], "noise", times, {"name": weight}),
        )
        for times in ({"name": "uniform"}, {"name": "log_normal", "mean": 0.0, "std": 3.0})
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_sigmoid_weight_is_an_integral():
    """On EDM's process: int sigmoid(b - 2 l) v / (v + e^-2l) e^2l e^-2l dl over l = log_snr, by the trapezium rule."""
    edm = processes.edm()
    log_snr = torch.linspace(-math.log(80), math.log(500), 20001, dtype=torch.float64)
    noise_error = (2 * log_snr).exp() * VARIANCE / (1 + (2 * log_snr).exp() * VARIANCE)
    expected = float(torch.trapezoid(torch.sigmoid(2 - 2 * log_snr) * noise_error, log_snr))
    for name in ("uniform", "log_normal"):
        times = {"name": name} if name == "uniform" else {"name": name, "mean": 0, "std": 3}
        objective = Objective(edm, "edm", times, {"name": "sigmoid"})
        assert pixelwise_loss(edm, torch.tensor([VARIANCE]), objective=objective) == pytest.approx(
            expected, rel=0.01
        )


@pytest.mark.parametrize(
    ("name", "mean", "std"), [("log_normal", -1.2, 1.2), ("logit_normal", 0.0, 1.0)]
)
@pytest.mark.parametrize("process", PROCESSES)
def test_normal_log_ratios_have_their_quantiles(process, name, mean, std):
    times = Times(PROCESSES[process], {"name": name})
    normal = statistics.NormalDist(mean, std)
    ends = [-level.log_snr for level in (times.process.least_noisy, times.process.noisiest)]
    low, high = (normal.cdf(end) for end in ends)
    u = torch.tensor([0.05, 0.3, 0.5, 0.95], dtype=torch.float64)
    found = -times.process.log_snr(times.quantile(u))
    expected = [normal.inv_cdf(low + (high - low) * float(share)) for share in u]
    tolerance = 0.5 if times.is_discrete else 1e-6  # the spacing of the first entries of a table
    assert found.tolist() == pytest.approx(expected, abs=tolerance)
    if times.is_discrete:
        assert times.quantile(u).frac().abs().max() == 0


@pytest.mark.parametrize("name", TIMES.names())
@pytest.mark.parametrize("process", ["vp_linear", "vp_cosine"])
def test_probabilities_of_a_table_are_its_frequencies(process, name):
    times = Times(PROCESSES[process], {"name": name})
    entries, shares = times.nodes()
    assert float(shares.sum()) == pytest.approx(1)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    counted = torch.bincount(times.quantile(u).long(), minlength=1000) / 200_000
    assert float((counted - shares).abs().max()) < 2e-5
    assert torch.equal(entries, torch.arange(1000, dtype=torch.float64))


@pytest.mark.parametrize("name", TIMES.names())
@pytest.mark.parametrize("process", ["edm", "flow", "vp_continuous"])
def test_spacing_is_the_slope_of_the_quantiles(process, name):
    times = Times(processes.from_dict({"name": process}), {"name": name})
    u = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    before, after = (times.process.log_snr(times.quantile(u + d)) for d in (-1e-5, 1e-5))
    torch.testing.assert_close(
        times.spacing(times.quantile(u)), (before - after) / 2e-5, rtol=1e-5, atol=0
    )


def test_stratified_numbers_are_one_in_each_part_and_uniform():
    numbers = torch.stack([uniform_numbers(16, random(k), stratified=True) for k in range(500)])
    assert torch.equal(
        (16 * numbers).floor().sort(1).values, torch.arange(16.0).double().expand(500, 16)
    )
    assert float(numbers[:, 0].mean()) == pytest.approx(0.5, abs=4 / (12 * 500) ** 0.5)
    assert (numbers[0].diff() < 0).any()  # shuffled


def test_stratified_times_make_the_mean_of_a_batch_steadier():
    """The standard deviation of the mean of u over 16 images: 1/(16 sqrt 12), not 1/sqrt(16 * 12)."""
    means = [
        torch.stack(
            [
                Times(PROCESSES["flow"], {"name": "uniform"}, s).draw(16, random(k)).mean()
                for k in range(300)
            ]
        )
        for s in (True, False)
    ]
    assert float(means[0].std()) == pytest.approx(1 / (16 * 12**0.5), rel=0.15)
    assert float(means[1].std()) == pytest.approx(1 / (16 * 12) ** 0.5, rel=0.15)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": {"name": "min_snrr"}}, "min_snr"),
        ({"weight": {"name": "min_snr", "gama": 1}}, "gamma"),
        ({"weight": {"name": "min_snr", "gamma": -1}}, "gamma=-1"),
        ({"times": {"name": "log_norm"}}, "log_normal"),
        ({"times": {"name": "log_normal", "std": 0}}, "std=0"),
    ],
    ids=str,
)
def test_wrong_names_and_options_say_what_is_right(settings, words):
    with pytest.raises((UnknownNameError, InvalidInputError), match=words):
        Objective(processes.vp_linear(), **settings)


def test_what_says_nothing_at_pure_noise_has_no_weight_there():
    vp = processes.vp_linear(zero_terminal_snr=True)
    with pytest.raises(InvalidInputError, match="velocity"):
        Objective(vp, "noise", weight={"name": "min_snr"})
    for name in WEIGHTS.names():
        last = torch.tensor([999.0], dtype=torch.float64)
        assert (
            Objective(vp, "velocity", weight={"name": name})
            .weight.on_output(last)
            .isfinite()
            .all()
        )


def test_a_learned_variance_needs_a_table():
    with pytest.raises(InvalidInputError, match="vp_linear"):
        Objective(processes.flow(), "flow", learned_variance=True)


def test_the_page_of_objectives_lists_what_there_is():
    """Name, title of a weight, options with defaults, source and summary of each entry stand in one line of a table."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "objectives.md").read_text(
        encoding="utf-8"
    )
    for registry in (TIMES, WEIGHTS):
        for entry in registry:
            options = ", ".join(f"`{o.name}={o.default}`" for o in entry.options)
            columns = [f"`{entry.name}`", entry.title, options, entry.paper, entry.summary]
            if registry is TIMES:
                del columns[1]
            assert "| " + " | ".join(columns).replace("|  |", "| |") + " |" in page, entry.name
