"""How fast the weights move: the learning rate and the averaging of the weights, step by step."""

from __future__ import annotations

import math

from fewstep.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of step k = 0, 1, ...

    Rises linearly over ``warmup_steps``, ``(k + 1) / warmup_steps``; then stays, or falls as half a
    cosine to zero, ``(1 + cos(pi u)) / 2`` with u = the share of the remaining steps that is done.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983; warm-up Goyal et al. 2017, arXiv:1706.02677.

    >>> config = TrainingConfig(data="mnist-1000", learning_rate=1.0, warmup_steps=4, steps=12)
    >>> [round(learning_rate(config, k), 3) for k in (0, 3, 4, 8)]
    [0.25, 1.0, 1.0, 0.5]
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * min(1.0, done))) / 2


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
