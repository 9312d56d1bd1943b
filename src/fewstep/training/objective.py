"""What a network is trained to minimise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from fewstep.denoisers.parameterisation import training_target
from fewstep.process import DiscreteVP, Process


def uniform_times(process: Process, count: int, generator: Generator) -> Tensor:
    """Draw times uniformly from the training table of a process; between its entries if it is continuous.

    Returns:
        float64, shape (count,), in the process's own unit.
    """
    last = process.training_steps - 1
    if isinstance(process, DiscreteVP):
        return torch.randint(0, last + 1, (count,), generator=generator).to(torch.float64)
    index = last * torch.rand(count, dtype=torch.float64, generator=generator)
    return torch.tensor([process.table_time(i) for i in index.tolist()], dtype=torch.float64)


def prediction_loss(
    network: nn.Module,
    process: Process,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    predicts: str = "noise",
    **conditions: Any,
) -> Tensor:
    """Return the mean squared error of the network's prediction; for noise prediction DDPM's L_simple.

    ``E || noise - network(alpha_t x_0 + sigma_t noise, t) ||^2`` per pixel, with t uniform.

    Args:
        network: Called as ``network(x_t, t, **conditions)``.
        process: Gives alpha_t and sigma_t.
        x0: Data in [-1, 1], shape (B, C, H, W).
        noise: Standard normal, the shape of x0.
        t: Times in the process's unit, float64 on the CPU, shape (B,).
        predicts: Kind of prediction, see `fewstep.denoisers.training_target`.
        **conditions: For the network, such as labels.

    Returns:
        The mean over images and pixels, float32, shape ().

    Source: Ho, Jain, Abbeel 2020, arXiv:2006.11239, equation 14.
    """
    column = (-1,) + (1,) * (x0.ndim - 1)
    alpha, sigma = (f(t).reshape(column) for f in (process.alpha, process.sigma))
    x_t = alpha.to(x0) * x0 + sigma.to(x0) * noise
    output = network(x_t, t.to(x0), **conditions)
    target = training_target(predicts, x0, noise, alpha, sigma)
    return (output.float() - target.float()).square().mean()


def pixelwise_loss(process: Process, variance: Tensor, predicts: str = "noise") -> float:
    """Return the loss of the best guess that knows each pixel's mean and variance, but nothing else.

    Given x_t, a pixel of variance v is known up to the variance ``sigma^2 v / (alpha^2 v + sigma^2)``; an
    error d in x_0 is an error ``-alpha d / sigma`` in the noise. Averaged over pixels and uniform times. A
    network above this loss has learnt nothing of how pixels belong together: its pictures are noise.

    Args:
        process: The forward process.
        variance: Variance of each pixel over the data set, any shape.
        predicts: Kind of prediction.

    >>> from fewstep.process import vp_linear
    >>> pixelwise_loss(vp_linear(), torch.zeros(4))
    0.0
    """
    entries = range(process.training_steps)
    times = torch.tensor([process.table_time(i) for i in entries], dtype=torch.float64)
    alpha, sigma = process.alpha(times)[:, None], process.sigma(times)[:, None]

    def total(v: Tensor) -> float:
        error = sigma * (v / (alpha**2 * v + sigma**2)).sqrt()
        target = training_target(predicts, error, -alpha * error / sigma, alpha, sigma)
        return float(target.square().mean(0).sum())

    pixels = variance.to("cpu", torch.float64).flatten()
    return sum(total(some) for some in pixels.split(4096)) / len(pixels)


def drop_labels(labels: Tensor, share: float, null: int, generator: Generator) -> Tensor:
    """Replace a random share of the labels by the null label, so that one network learns both models of guidance.

    Args:
        labels: int64, shape (B,).
        share: Probability of losing the label, in [0, 1].
        null: The label that stands for none.
        generator: A CPU generator.

    Source: Ho, Salimans 2022, arXiv:2207.12598.
    """
    lost = torch.rand(labels.shape, generator=generator) < share
    return torch.where(lost.to(labels.device), null, labels)
