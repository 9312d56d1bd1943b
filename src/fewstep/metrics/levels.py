"""A denoiser's error at each noise level: what it knows of images, and of images that it never saw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.denoisers import Denoiser
from fewstep.errors import InvalidInputError


@dataclass(frozen=True)
class LevelLoss:
    """Errors at a level, squared, per pixel, averaged over images.

    Args:
        t: The level's time in the process's unit.
        log_snr: ``log(alpha / sigma)``.
        data_error: Of the estimate of x_0.
        noise_error: Of the estimate of the noise that belongs to it, ``(alpha / sigma)^2 data_error``;
            its mean over uniform times is DDPM's L_simple.
        uncertainty: Standard error of ``noise_error``, from its spread over the images; NaN for one image.
    """

    t: float
    log_snr: float
    data_error: float
    noise_error: float
    uncertainty: float


@torch.no_grad()
def loss_by_level(
    denoiser: Denoiser,
    x0: Tensor,
    labels: Tensor | None = None,
    *,
    levels: int = 10,
    seed: int = 0,
    batch_size: int = 64,
) -> list[LevelLoss]:
    """Return ``E |x_0 - D(alpha x_0 + sigma noise)|^2`` at levels spread evenly over the training times.

    The noise of image k at each level depends on the seed and k alone, so two sets of images are
    compared under the same noise: what differs is what the denoiser knows of them.

    Args:
        denoiser: The denoiser.
        x0: Images in [-1, 1], shape (N, C, H, W), N at least 1.
        labels: Their classes, shape (N,), for a network that takes labels; None for none.
        levels: How many levels K; level k is at the quantile ``(k + 1/2) / K`` of the training times.
        seed: Of the noise.
        batch_size: Images that go through the network together.

    Returns:
        The errors from the least to the most noise.

    Raises:
        InvalidInputError: If there are no images or no levels.

    >>> import fewstep as fs
    >>> blind = fs.Denoiser(lambda x, t: torch.zeros_like(x), fs.process.vp_linear(), "noise")
    >>> [round(loss.noise_error) for loss in loss_by_level(blind, torch.zeros(8, 1, 16, 16), levels=2)]
    [1, 1]
    """
    if len(x0) < 1 or levels < 1:
        raise InvalidInputError(f"{len(x0)} images at {levels} levels; give at least one of each")
    process = denoiser.process
    device = denoiser.device or torch.device("cpu")
    quantiles = [(k + 0.5) / levels for k in range(levels)]
    times = [process.table_time((process.training_steps - 1) * q) for q in quantiles]
    totals = torch.zeros(levels, len(x0), dtype=torch.float64)
    for start in range(0, len(x0), batch_size):
        rows = slice(start, start + batch_size)
        x = x0[rows].to(device)
        given = {} if labels is None else {"labels": labels[rows].to(device)}
        conditioned = denoiser.with_conditions(**given)
        noise = torch.stack([_noise(seed, start + k, x.shape[1:]) for k in range(len(x))])
        noise = noise.to(device)
        for k, t in enumerate(times):
            level = process.level(t)
            estimate = conditioned(level.alpha * x + level.sigma * noise, level)
            totals[k, rows] = (estimate - x).double().square().flatten(1).mean(1).cpu()
    return [
        _level_loss(t, process.level(t).log_snr, errors)
        for t, errors in zip(times, totals, strict=True)
    ]


def _noise(seed: int, image: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed((seed << 24) + image))


def _level_loss(t: float, log_snr: float, errors: Tensor) -> LevelLoss:
    factor = torch.tensor(2 * log_snr, dtype=torch.float64).exp().item()
    spread = errors.std().item() if len(errors) > 1 else float("nan")
    return LevelLoss(
        t=t,
        log_snr=log_snr,
        data_error=errors.mean().item(),
        noise_error=factor * errors.mean().item(),
        uncertainty=factor * spread / len(errors) ** 0.5,
    )
