"""Each kind of prediction against its textbook formula, on every kind of process."""

from __future__ import annotations

import math

import pytest
import torch

import fewstep as fs
from fewstep.denoisers import TARGETS, Parameterisation, training_target
from fewstep.process import Level

PROCESSES = {
    "vp": fs.process.vp_linear(),
    "vp_continuous": fs.process.vp_continuous(),
    "zero_snr": fs.process.vp_scaled_linear(zero_terminal_snr=True),
    "ve": fs.process.ve(),
    "edm": fs.process.edm(),
    "flow": fs.process.flow(),
}
PURE_NOISE = Level(999.0, 0.0, 1.0)


def levels_of(process):
    fractions = (0.0, 0.02, 0.3, 0.7, 0.95, 1.0)
    levels = [
        process.level(process.t_min + f * (process.t_max - process.t_min)) for f in fractions
    ]
    return [level for level in levels if not level.is_pure_noise]


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    return [torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(2)]


def columns(*values):
    return [torch.tensor(v, dtype=torch.float64).view(-1, 1, 1, 1) for v in values]


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("predicts", TARGETS)
def test_a_perfect_network_gives_back_x_0(predicts, process, data):
    x0, noise = data
    for level in levels_of(process):
        target = training_target(predicts, x0, noise, *columns(level.alpha, level.sigma))
        denoiser = fs.Denoiser(lambda x, t, output=target: output, process, predicts)
        x = level.alpha * x0 + level.sigma * noise
        # What the network leaves to x itself is rounded at the size of x, and divided by alpha.
        size = max(1.0, level.ratio) / 10
        torch.testing.assert_close(denoiser(x, level), x0, rtol=0, atol=1e-10 * max(1, size))


def textbook(predicts, x0, eps, alpha, sigma):
    match predicts:
        case "noise":
            return eps
        case "data":
            return x0
        case "velocity":
            return alpha * eps - sigma * x0
        case "flow":
            return eps - x0
        case "score":
            return -eps / sigma


@pytest.mark.parametrize("predicts", [kind for kind in TARGETS if kind != "edm"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_targets_equal_their_formulas(predicts, process, data):
    x0, eps = data
    for level in levels_of(process):
        target = training_target(predicts, x0, eps, *columns(level.alpha, level.sigma))
        expected = textbook(predicts, x0, eps, level.alpha, level.sigma)
        torch.testing.assert_close(target, expected, rtol=1e-13, atol=1e-13)


def karras_table_1(sigma):
    """c_skip, c_out, c_in, c_noise of Karras et al. 2022, table 1, for sigma_data = 1/2."""
    data = 0.25
    return (
        data / (sigma**2 + data),
        sigma * 0.5 / math.sqrt(sigma**2 + data),
        1 / math.sqrt(sigma**2 + data),
        0.25 * math.log(sigma),
    )


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_edm_is_table_1_on_x_over_alpha(process, data):
    x0, eps = data
    for level in levels_of(process):
        c_skip, c_out, c_in, c_noise = karras_table_1(level.sigma / level.alpha)
        kind = Parameterisation("edm")
        skip, out = kind.skip_out(level)
        assert skip * level.alpha == pytest.approx(c_skip, rel=1e-12)
        assert out == pytest.approx(c_out, rel=1e-12)
        assert kind.input_scale(level) * level.alpha == pytest.approx(c_in, rel=1e-12)
        assert kind.time(level) == pytest.approx(c_noise, rel=1e-12)
        y = x0 + level.ratio * eps
        target = training_target("edm", x0, eps, *columns(level.alpha, level.sigma))
        expected = (x0 - c_skip * y) / c_out  # cancels where the noise is small
        torch.testing.assert_close(target, expected, rtol=1e-10, atol=1e-12 / level.ratio)


def test_the_edm_network_sees_unit_variance_input_and_its_own_time():
    seen = []

    def network(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    g = torch.Generator().manual_seed(0)
    for process in (fs.process.vp_linear(), fs.process.edm()):
        level = process.level(process.t_max / 3)
        x0 = 0.5 * torch.randn(20000, 1, generator=g)
        x = level.alpha * x0 + level.sigma * torch.randn(20000, 1, generator=g)
        fs.Denoiser(network, process, "edm")(x, level)
        inputs, t = seen.pop()
        assert inputs.std().item() == pytest.approx(1, abs=0.03)
        assert t[0].item() == pytest.approx(math.log(level.sigma / level.alpha) / 4, rel=1e-5)


def test_only_edm_scales_its_input_and_changes_the_time():
    level = fs.process.vp_linear().level(300.0)
    for predicts in set(TARGETS) - {"edm"}:
        kind = Parameterisation(predicts)
        assert (kind.input_scale(level), kind.time(level)) == (1.0, 300.0)


@pytest.mark.parametrize("predicts", ["noise", "score", "edm"])
def test_pure_noise_is_refused_with_a_remedy(predicts):
    with pytest.raises(fs.errors.InvalidInputError, match="alpha > 0.*velocity, flow or data"):
        Parameterisation(predicts).skip_out(PURE_NOISE)


@pytest.mark.parametrize("predicts", ["velocity", "flow", "data"])
def test_pure_noise_is_fine_for(predicts, data):
    x0, eps = data
    target = training_target(predicts, x0, eps, *columns(0.0, 1.0))
    denoiser = fs.Denoiser(lambda x, t: target, PROCESSES["zero_snr"], predicts)
    torch.testing.assert_close(denoiser(eps, PURE_NOISE), x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "flow", "score", "edm"])
def test_targets_are_finite_at_pure_noise_so_that_training_may_meet_it(predicts, data):
    x0, eps = data
    alpha, sigma = columns([0.0, 0.5, 0.9], [1.0, 0.75**0.5, 0.19**0.5])
    target = training_target(predicts, x0, eps, alpha, sigma)
    assert torch.isfinite(target).all()
    first = {"velocity": -x0, "flow": eps - x0, "data": x0, "score": -eps, "edm": 2 * x0}
    torch.testing.assert_close(target[0], first.get(predicts, eps)[0])


def test_targets_keep_the_type_of_the_data(data):
    x0, eps = (v.float() for v in data)
    for predicts in TARGETS:
        target = training_target(predicts, x0, eps, *columns([0.3, 0.5, 0.9], [0.9, 0.8, 0.4]))
        assert (target.dtype, target.shape) == (torch.float32, x0.shape)


def test_a_clean_level_is_refused():
    with pytest.raises(fs.errors.InvalidInputError, match="sigma > 0"):
        Parameterisation("noise").skip_out(fs.process.flow().clean)


def test_unknown_prediction_names_the_nearest():
    with pytest.raises(fs.errors.UnknownNameError, match="'velocity'.*Known: data, edm"):
        Parameterisation("velocty")
    with pytest.raises(fs.errors.UnknownNameError, match="noise"):
        training_target("epsilon", *[torch.zeros(1)] * 4)
