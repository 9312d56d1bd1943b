from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fewstep.training.rates import average_decay, learning_rate
from fewstep.training.state import TrainingState


def test_warm_up_is_linear_and_reaches_the_peak(make_config):
    config = make_config(learning_rate=0.3, warmup_steps=6, steps=100)
    assert [learning_rate(config, k) for k in range(6)] == pytest.approx(
        [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    )


def test_cosine_falls_from_peak_to_zero(make_config):
    config = make_config(learning_rate=0.3, warmup_steps=10, steps=110)
    for done in (0.0, 0.25, 1 / 3, 0.5, 1.0):
        step = 10 + round(100 * done)
        angle = math.pi * (step - 10) / 100
        assert learning_rate(config, step) == pytest.approx(
            0.15 * (1 + math.cos(angle)), abs=1e-15
        )


def test_constant_stays_and_no_warm_up_starts_at_the_peak(make_config):
    config = make_config(learning_rate=0.3, warmup_steps=0, decay="constant", steps=9)
    assert {learning_rate(config, k) for k in range(9)} == {0.3}


def test_average_decay_warms_up():
    assert [average_decay(0.95, k) for k in (0, 1, 8)] == [1 / 10, 2 / 11, 9 / 18]
    assert average_decay(0.95, 1000) == 0.95


@pytest.mark.global_rng
def test_state_follows_the_closed_forms(make_config):
    """Constant gradient g: Adam without decay moves by lr_k exactly; the average is a weighted sum."""
    config = make_config(
        learning_rate=0.1, warmup_steps=3, steps=8, weight_decay=0.0, ema_decay=0.4
    )
    network = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    state = TrainingState(network, config)
    raw = [network.weight.detach().clone()]
    for _ in range(8):
        network.weight.grad = torch.tensor([[1.0, -1.0, 1.0]], dtype=torch.float64)
        state.update(torch.zeros(()))
        raw.append(network.weight.detach().clone())

    rates = torch.tensor([learning_rate(config, k) for k in range(8)], dtype=torch.float64)
    sign = torch.tensor([[1.0, -1.0, 1.0]], dtype=torch.float64)
    for k in range(9):
        expected = raw[0] - rates[:k].sum() * sign
        torch.testing.assert_close(raw[k], expected, rtol=0, atol=1e-7)

    decays = [min(0.4, (1 + k) / (10 + k)) for k in range(8)]
    average = math.prod(decays) * raw[0]
    for k, decay in enumerate(decays):
        average = average + (1 - decay) * math.prod(decays[k + 1 :]) * raw[k + 1]
    (averaged,) = state.average.parameters()
    torch.testing.assert_close(averaged, average, rtol=1e-12, atol=0)


@pytest.mark.global_rng
def test_weight_decay_spares_vectors(make_config):
    config = make_config(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, decay="constant")
    network = nn.Linear(2, 2)
    nn.init.ones_(network.bias)
    before = network.weight.detach().clone()
    state = TrainingState(network, config)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.update(torch.zeros(()))
    torch.testing.assert_close(network.weight, before * (1 - 0.1 * 0.5))
    assert network.bias.tolist() == [1.0, 1.0]


@pytest.mark.global_rng
@pytest.mark.parametrize(("clip", "length"), [(0.5, 0.5), (0.0, 5.0), (9.0, 5.0)])
def test_long_gradients_are_shortened(make_config, clip, length):
    network = nn.Linear(2, 1, bias=False)
    state = TrainingState(network, make_config(gradient_clip=clip))
    network.weight.grad = torch.tensor([[3.0, 4.0]])
    seen: list[float] = []
    state.optimiser.register_step_pre_hook(
        lambda *_: seen.append(float(network.weight.grad.norm()))
    )
    assert float(state.update(torch.zeros(()))) == pytest.approx(5.0)
    assert seen == pytest.approx([length], rel=1e-5)


def test_linear_falls_from_peak_to_zero(make_config):
    config = make_config(learning_rate=0.3, warmup_steps=10, steps=110, decay="linear")
    assert [learning_rate(config, k) for k in (10, 35, 60, 110)] == pytest.approx(
        [0.3, 0.225, 0.15, 0.0]
    )


def test_inverse_sqrt_is_that_of_the_transformer(make_config):
    """Vaswani et al., equation 3: d^-0.5 min(k^-0.5, k warmup^-1.5), here with the peak as its scale."""
    config = make_config(learning_rate=0.3, warmup_steps=16, steps=999, decay="inverse_sqrt")
    for k in (1, 7, 16, 17, 64, 900):
        expected = 0.3 * 16**0.5 * min(k**-0.5, k * 16**-1.5)
        assert learning_rate(config, k - 1) == pytest.approx(expected)


def test_inverse_sqrt_after_a_plateau(make_config):
    """Karras et al. 2024, equation 67: alpha_ref / sqrt(max(t / t_ref, 1))."""
    config = make_config(
        learning_rate=0.3, warmup_steps=0, steps=999, decay="inverse_sqrt", decay_after=100
    )
    assert [learning_rate(config, k - 1) for k in (1, 100, 400, 900)] == pytest.approx(
        [0.3, 0.3, 0.15, 0.1]
    )


@pytest.mark.parametrize("decay", ["cooldown", "linear_cooldown"])
def test_cooldowns_stay_then_fall_over_the_last_share(make_config, decay):
    config = make_config(
        learning_rate=0.3, warmup_steps=0, steps=200, decay=decay, cooldown_share=0.5
    )
    assert {learning_rate(config, k) for k in range(101)} == {0.3}
    for k in (116, 125, 164, 200):
        done = (k - 100) / 100
        left = 1 - math.sqrt(done) if decay == "cooldown" else 1 - done
        assert learning_rate(config, k) == pytest.approx(0.3 * left)


@pytest.mark.global_rng
def test_the_memory_order_of_a_gradient_does_not_matter(make_config):
    """The fused optimiser walks through memory; parameters and gradients have to lie alike."""
    from fewstep.training.batches import Batch
    from fewstep.training.gradients import Gradients

    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    coefficients = torch.randn(4, 3, 3, 3)
    gradients = Gradients(
        network, lambda _: (network.weight * coefficients).sum(), 1, threaded=False
    )
    x = torch.zeros(2, 3, 4, 4)
    gradients(Batch(x, x, torch.zeros(2), None))
    assert network.weight.grad is not None
    assert network.weight.grad.stride() == network.weight.stride()
    before = network.weight.detach().clone()
    config = make_config(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, decay="constant")
    TrainingState(network, config).update(torch.zeros(()))
    torch.testing.assert_close(
        network.weight, before - 0.1 * coefficients.sign(), rtol=0, atol=1e-4
    )
