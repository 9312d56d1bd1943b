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
