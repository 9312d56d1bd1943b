"""Gaussians of the reverse process: their divergence, the decoder of bytes, and a variance that is learnt."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.special import log_ndtr

from fewstep.denoisers import variance_share
from fewstep.process import Process
from fewstep.training.columns import column

BIN = 1 / 255
"""Half the distance of two neighbouring bytes on [-1, 1]."""


def gaussian_divergence(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """Return `KL(N(mean, variance) || N(other_mean, other_variance))` of each number, in nats.

    >>> zero = torch.zeros(1)
    >>> gaussian_divergence(zero, zero, zero + 2, zero)
    tensor([2.])
    """
    difference = log_variance - other_log_variance
    shift = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return (difference.exp() - 1 - difference + shift) / 2


def decoder_loss(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return `-log p(x_0)` of each byte, p a normal distribution summed up over the byte's bin, in nats.

    The bins of the bytes 0 and 255 reach to infinity, so the 256 probabilities sum to 1.

    Args:
        x0: Bytes scaled to [-1, 1], `byte / 127.5 - 1`.
        mean: Of the normal distribution, the shape of x0.
        log_std: Logarithm of its standard deviation, broadcastable to x0.

    Source: Ho, Jain, Abbeel 2020, arXiv:2006.11239, equation 13.
    """
    scale = (-log_std).exp()
    low, high = (scale * (x0 - mean + side) for side in (-BIN, BIN))
    low = torch.where(x0 < -1 + BIN, -math.inf, low)
    high = torch.where(x0 > 1 - BIN, math.inf, high)
    # On the side of the mean where both tails are small, so that their difference keeps its digits.
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper, lower = log_ndtr(high), log_ndtr(low)
    return -(upper + torch.log1p(-(lower - upper).clamp(max=-1e-12).exp()))


def split_variance(output: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """What a learned-variance network predicts, and where its variance lies, as a share in float32."""
    return output[:, : x0.shape[1]], variance_share(output[:, x0.shape[1] :].float())


def log_variances(process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the smallest and the largest variance of a reverse step, beta tilde and beta.

    The first step's smallest would be 0; it takes that of the second.

    Args:
        process: A process on a table.
        t: Entries of the table, float64, shape (B,).
    """
    log_snr, log_snr_before = process.log_snr(t), process.log_snr((t - 1).clamp(min=0))
    # At the first entry, where the one before is clean, everything of beta is new.
    fresh = torch.where(t > 0, -torch.expm1(2 * (log_snr - log_snr_before)), 1.0)
    large = 2 * process.sigma(t).log() + fresh.log()
    second = t.clamp(min=1)
    step = process.log_snr(second) - process.log_snr(second - 1)
    small = 2 * process.sigma(second - 1).log() + (-torch.expm1(2 * step)).log()
    return small, large


def learned_log_variance(process: Process, share: Tensor, t: Tensor) -> Tensor:
    """Return `v log beta + (1 - v) log beta~` for a share v.

    Args:
        process: A process on a table.
        share: Of the network, see `fewstep.denoisers.variance_share`, shape (B, C, H, W).
        t: Entries of the table, float64, shape (B,).

    Source: Nichol, Dhariwal 2021, arXiv:2102.09672, equation 15.
    """
    small, large = (column(value, share).to(share) for value in log_variances(process, t))
    return share * large + (1 - share) * small


def bound_term(process: Process, x0: Tensor, estimate: Tensor, share: Tensor, t: Tensor) -> Tensor:
    """Return L_t of the variational bound with a learned variance, in nats per pixel, shape (B,).

    For t > 0 the divergence of the true reverse step `q(x_s | x_t, x_0)` from the learnt one, s = t - 1; both are
    normal, and their means differ by `on_x0 (x_0 - D)`. For t = 0 the loss of the decoder.
    """
    learnt = learned_log_variance(process, share, t)
    small, _ = (column(value, x0).to(x0) for value in log_variances(process, t))
    before = (t - 1).clamp(min=0)
    on_x0 = process.alpha(before) * -torch.expm1(
        2 * (process.log_snr(t) - process.log_snr(before))
    )
    shift = column(on_x0, x0).to(x0) * (x0 - estimate)
    divergence = gaussian_divergence(shift, small, torch.zeros_like(shift), learnt)
    first = column(t == 0, x0)
    return (
        torch.where(first, decoder_loss(x0, estimate, learnt / 2), divergence).flatten(1).mean(1)
    )
