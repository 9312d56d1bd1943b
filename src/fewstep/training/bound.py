"""The variational bound of a model, as a number in bits per dimension."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from fewstep.denoisers import BaseDenoiser
from fewstep.errors import InvalidInputError
from fewstep.process import DiscreteVP, Level, Process
from fewstep.training.randomness import generator
from fewstep.training.variance import bound_term, decoder_loss, gaussian_divergence

CONTINUOUS_LEVELS = 1000


class VariationalBound(NamedTuple):
    """An upper bound on ``-log2 p(x_0)`` for each dimension, in bits, and its three parts.

    Args:
        prior: L_T, what the noisiest level still tells of the image.
        steps: The sum of the L_t, what each step of the reverse process has to add.
        decoder: L_0, from the least noisy level to bytes.
    """

    prior: float
    steps: float
    decoder: float

    @property
    def total(self) -> float:
        """The bound."""
        return self.prior + self.steps + self.decoder


@torch.no_grad()
def variational_bound(
    model: BaseDenoiser,
    images: Tensor,
    *,
    levels: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    **conditions: Any,
) -> VariationalBound:
    """Return the variational bound of images under a model, in bits per dimension.

    ``L_T + sum_t (snr_s - snr_t) / 2 |x_0 - D(x_t)|^2 + L_0``, which is the sum of the divergences of
    ``q(x_s | x_t, x_0)`` from ``q(x_s | x_t, D)``, s the level before t. The levels are the whole table of a discrete
    process; for a continuous one 1000, even in log_snr, which is a bound of its own and tends to that of continuous
    time. The decoder is as wide as the noise left at the least noisy level. A variance that the network has learnt
    for a discrete process takes the place of the posterior's, and of the decoder's.

    Args:
        model: An estimator of x_0.
        images: Bytes scaled to [-1, 1], `byte / 127.5 - 1`, shape (N, C, H, W), on the model's device.
        levels: How many of the steps to ask the model at, evenly spread, with a random offset for each batch: an
            unbiased estimate; None: all.
        seed: Decides the noise.
        batch_size: Images that go through the model together.
        **conditions: For the network, such as labels; tensors with the images as first dimension.

    Raises:
        InvalidInputError: There are no images, or levels is out of range.

    Source: Ho, Jain, Abbeel 2020, arXiv:2006.11239, equation 5; Kingma et al. 2021, arXiv:2107.00630, equation 11.

    >>> import fewstep as fs
    >>> process = fs.process.vp_cosine(steps=50)
    >>> ideal = fs.exact.GaussianMixture(torch.zeros(1, 1, 2, 2), 0.3, process=process)
    >>> draws = 127.5 + 38 * torch.randn(64, 1, 2, 2, generator=Generator().manual_seed(0))
    >>> 7 < variational_bound(ideal, draws.round() / 127.5 - 1).total < 9
    True
    """
    table = _rising_levels(model.process)
    count = len(table) - 1 if levels is None else levels
    if not len(images) or not 1 <= count < len(table):
        raise InvalidInputError(
            f"a bound of {len(images)} images at {count} levels; give at least one image, and 1 to "
            f"{len(table) - 1} levels"
        )
    total = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(images), batch_size):
        part = images[first : first + batch_size]
        given = {
            name: value[first : first + batch_size] if isinstance(value, Tensor) else value
            for name, value in conditions.items()
        }
        asked = model.with_conditions(**given) if given else model
        random = generator(seed, "bound", first)
        total += _bound(asked, part, table, count, random) * len(part)
    return VariationalBound(*(total / (len(images) * math.log(2))).tolist())


def _bound(
    model: BaseDenoiser, x0: Tensor, table: list[Level], count: int, random: Generator
) -> Tensor:
    """The three parts of a batch in nats per dimension."""

    def term(k: int) -> Tensor:
        """What the step that ends below level k adds; at the least noisy one, the decoder."""
        level, noise = table[k], torch.randn(x0.shape, generator=random, dtype=torch.float32)
        x = level.alpha * x0 + level.sigma * noise.to(x0)
        estimate, share = model.variance_pair(x, level)
        exact, estimate = x0.double(), estimate.double()
        if share is not None and isinstance(model.process, DiscreteVP):
            t = torch.full((len(x0),), k, dtype=torch.float64)
            return bound_term(model.process, exact, estimate, share.double(), t).mean().cpu()
        if k == 0:
            width = exact.new_tensor(math.log(level.ratio))
            return decoder_loss(exact, estimate, width).mean().cpu()
        fall = _snr(table[k - 1]) - _snr(level)
        return fall / 2 * (exact - estimate).square().mean().cpu()

    steps = len(table) - 1
    offset = float(torch.rand((), generator=random, dtype=torch.float64))
    chosen = [math.floor((k + offset) * steps / count) + 1 for k in range(count)]
    asked = range(1, steps + 1) if count == steps else chosen
    divergence = sum((term(k) for k in asked), torch.zeros((), dtype=torch.float64))
    return torch.stack(
        [_prior(model.process, x0, table[-1]), divergence * (steps / count), term(0)]
    )


def _prior(process: Process, x0: Tensor, level: Level) -> Tensor:
    """`KL(q(x_T | x_0) || p(x_T))`, p the noise that sampling starts from: N(0, 1) on a table, else N(0, sigma^2)."""
    start = 1.0 if isinstance(process, DiscreteVP) else level.sigma
    mean = level.alpha * x0.double()
    own, prior = (torch.full_like(mean, 2 * math.log(std)) for std in (level.sigma, start))
    return gaussian_divergence(mean, own, torch.zeros_like(mean), prior).mean().cpu()


def _rising_levels(process: Process) -> list[Level]:
    """The levels of the bound, least noisy first."""
    if isinstance(process, DiscreteVP):
        return process.levels([float(t) for t in range(process.training_steps)])
    last = min(process.noisiest.ratio, 1e4)
    first = process.least_noisy.ratio
    exponents = torch.linspace(0, 1, CONTINUOUS_LEVELS, dtype=torch.float64)
    return process.levels_at((first * (last / first) ** exponents).tolist())


def _snr(level: Level) -> float:
    return math.exp(2 * level.log_snr) if level.alpha else 0.0
