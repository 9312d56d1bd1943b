"""How fast the weights move: the learning rate and the averaging of the weights, step by step."""

from __future__ import annotations

import math

from fewstep.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of step k = 0, 1, ...

    Rises linearly over ``warmup_steps``, ``(k + 1) / warmup_steps``; then, by ``decay``, with u the share of the
    remaining steps that is done, and v the share of the last ``cooldown_share`` of all steps that is done::

        constant         1
        linear           1 - u
        cosine           (1 + cos(pi u)) / 2
        inverse_sqrt     1 / sqrt(max((k + 1) / decay_after, 1)); decay_after = 0 stands for the warm-up
        cooldown         1 - sqrt(v)
        linear_cooldown  1 - v

    Source: warm-up Goyal et al. 2017, arXiv:1706.02677; cosine Loshchilov and Hutter 2016, arXiv:1608.03983;
    inverse_sqrt Vaswani et al. 2017, arXiv:1706.03762, and with decay_after Karras et al. 2024,
    arXiv:2312.02696; cooldowns Hägele et al. 2024, arXiv:2405.18392.

    >>> config = TrainingConfig(data="mnist-1000", learning_rate=1.0, warmup_steps=4, steps=12)
    >>> [round(learning_rate(config, k), 3) for k in (0, 3, 4, 8)]
    [0.25, 1.0, 1.0, 0.5]
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * _decayed(config, step)


def _decayed(config: TrainingConfig, step: int) -> float:
    """What is left of the peak in a step after the warm-up."""
    match config.decay:
        case "linear":
            return 1 - _done(config, step, config.warmup_steps)
        case "cosine":
            return (1 + math.cos(math.pi * _done(config, step, config.warmup_steps))) / 2
        case "inverse_sqrt":
            reference = config.decay_after or max(1, config.warmup_steps)
            return 1 / math.sqrt(max((step + 1) / reference, 1))
        case "cooldown":
            return 1 - math.sqrt(_done(config, step, _cooldown(config)))
        case "linear_cooldown":
            return 1 - _done(config, step, _cooldown(config))
        case _:
            return 1.0


def _cooldown(config: TrainingConfig) -> int:
    """The first step of the last share."""
    return max(config.warmup_steps, round((1 - config.cooldown_share) * config.steps))


def _done(config: TrainingConfig, step: int, first: int) -> float:
    """The share of the steps from ``first`` to the end that is done, 0 to 1."""
    return min(1.0, max(0.0, (step - first) / max(1, config.steps - first)))


def average_decay(decay: float, step: int) -> float:
    """Return the weight of the old average in step k: ``min(decay, (1 + k) / (10 + k))``.

    The second argument keeps the average from remembering the untrained weights for ``1 / (1 - decay)`` steps.

    >>> average_decay(0.999, 0), average_decay(0.999, 100_000)
    (0.1, 0.999)
    """
    return min(decay, (1 + step) / (10 + step))


def power_exponent(width: float) -> float:
    """Return the gamma > 0 of the power-function average ``t^gamma`` of a width, its standard deviation over t.

    ``width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))``; the positive root is found by halving.

    Args:
        width: In (0, 0.28], a share of the length of the run; even weights have 0.289.

    Source: Karras et al. 2024, arXiv:2312.02696, section 3.1.

    >>> round(power_exponent(0.1), 2), round(power_exponent(0.05), 2)
    (6.94, 16.97)
    """
    low, high = 0.0, 1.0 / width
    for _ in range(100):
        gamma = (low + high) / 2
        found = math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)
        low, high = (gamma, high) if found > width else (low, gamma)
    return low


def power_decay(width: float, step: int) -> float:
    """Return the weight of the old average in step k of a power-function average: ``(k / (k + 1))^(gamma + 1)``.

    Then weights of step j count as ``j^gamma``, whatever the length of the run, and the first ones not at all.

    Source: Karras et al. 2024, arXiv:2312.02696, equation 3.

    >>> power_decay(0.1, 0)
    0.0
    """
    return (step / (step + 1)) ** (power_exponent(width) + 1)
