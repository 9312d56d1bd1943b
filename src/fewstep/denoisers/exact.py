"""Denoisers known in closed form: what samplers, metrics and tuners are tested against, with no training.

They are the posterior means `E[x_0 | x_t = x]` of data that is a mixture of Gaussians, on any forward process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.denoisers.base import NEARBY, BaseDenoiser, beside
from fewstep.errors import InvalidInputError
from fewstep.process import Level, Process


class GaussianMixture(BaseDenoiser):
    """Exact denoiser for a mixture of isotropic Gaussians with centres m_k, widths w_k and shares pi_k.

    With `v_k = (alpha w_k)^2 + sigma^2` and `p_k(x)` proportional to `pi_k N(x; alpha m_k, v_k)`:
    `D(x) = sum_k p_k(x) (sigma^2 m_k + alpha w_k^2 x) / v_k`.

    Args:
        means: Centres, floating point, shape (K, *data shape).
        widths: Standard deviations, shape (K,) or one number for all, >= 0.
        weights: Shares, shape (K,), > 0, of any sum; equal by default.
        process: The forward process.
        chunk: How many centres are looked at together, >= 1, which bounds memory to about chunk * (B + data size)
            numbers.

    Raises:
        InvalidInputError: If shapes, types or signs are wrong.

    >>> import torch
    >>> from fewstep.process import edm
    >>> denoiser = GaussianMixture(torch.zeros(1, 2), 1.0, process=edm())
    >>> denoiser(torch.ones(1, 2), edm().level(1.0))
    tensor([[0.5000, 0.5000]])
    """

    def __init__(
        self,
        means: Tensor,
        widths: Tensor | float,
        weights: Tensor | None = None,
        *,
        process: Process,
        chunk: int = 1024,
    ) -> None:
        super().__init__(process)
        means = torch.as_tensor(means)
        if means.ndim < 2 or means.numel() == 0 or not means.is_floating_point():
            raise InvalidInputError(
                f"centres of shape {tuple(means.shape)} and type {means.dtype} do not fit; give floating-point numbers "
                "of shape (K, ...), images scaled to [-1, 1]"
            )
        self.means = means
        self.widths = _one_each("widths", widths, means)
        self.weights = _one_each("weights", 1.0 if weights is None else weights, means)
        if not bool((self.weights > 0).all()) or not bool((self.widths >= 0).all()):
            raise InvalidInputError("a mixture needs weights > 0 and widths >= 0")
        if chunk < 1:
            raise InvalidInputError(f"chunk must be at least 1, got {chunk}")
        self.chunk = chunk

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one point of the data."""
        return tuple(self.means.shape[1:])

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """The posterior mean at x, shape (B, *data shape); at pure noise it is the mean of the data."""
        if x.shape[1:] != self.shape:
            raise InvalidInputError(
                f"points of shape {tuple(x.shape)} do not fit data of shape {self.shape}; "
                f"give (B, {', '.join(map(str, self.shape))})"
            )
        if level.is_clean:
            return x / level.alpha
        flat = x.flatten(1).to(_exact_type(x))
        log_total = torch.full_like(flat[:, :1], -math.inf)
        denoised = torch.zeros_like(flat)
        for means, widths, weights in self._chunks(flat):
            variance = (level.alpha * widths) ** 2 + level.sigma**2
            distance = _squared_distance(flat, level.alpha * means)
            log_share = weights.log() - (distance / variance + flat.shape[1] * variance.log()) / 2
            new_total = torch.logaddexp(log_total, log_share.logsumexp(1, keepdim=True))
            kept, share = (log_total - new_total).exp(), (log_share - new_total).exp() / variance
            pull = level.alpha * (share @ widths.square()).unsqueeze(1)
            denoised = kept * denoised + level.sigma**2 * (share @ means) + pull * flat
            log_total = new_total
        return denoised.to(x.dtype).view(x.shape)

    def derivative(self, x: Tensor, along: Tensor, level: Level) -> Tensor:
        """`dD/dlog_snr` along a direction; see `BaseDenoiser`."""
        before, here, after = beside(self.process, level)
        _, change = torch.autograd.functional.jvp(lambda point: self(point, here), (x,), (along,))
        assert isinstance(change, Tensor)
        point = x.to(_exact_type(x)) / here.alpha
        difference = self(after.alpha * point, after) - self(before.alpha * point, before)
        return change + (difference / (2 * NEARBY)).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n points of the data, shape (n, *data shape), with a generator on the centres' device."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        centres = self.means[which]
        noise = torch.empty_like(centres).normal_(generator=generator)
        return centres + self.widths[which].view(-1, *(1,) * len(self.shape)) * noise

    def _chunks(self, like: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Centres (k, size), widths (k,) and weights (k,), a chunk at a time, in the given tensor's type and place."""
        columns = self.means.flatten(1), self.widths, self.weights
        for part in zip(*(column.split(self.chunk) for column in columns), strict=True):
            means, widths, weights = (values.to(like) for values in part)
            yield means, widths, weights


class Dataset(GaussianMixture):
    """Exact denoiser for a data set smoothed by a Gaussian: one centre for each image, all of the same width.

    Args:
        images: The data, shape (N, ...), such as images in [-1, 1]; 10,000 of them fit, since they are taken in chunks.
        width: Standard deviation of the smoothing, >= 0; 0 gives the images themselves back.
        process: The forward process.
        chunk: How many images are looked at together.
    """

    def __init__(
        self, images: Tensor, width: float, *, process: Process, chunk: int = 1024
    ) -> None:
        super().__init__(images, width, process=process, chunk=chunk)


def _one_each(name: str, values: Tensor | float, means: Tensor) -> Tensor:
    """One number for each centre, shape (K,), in the centres' type and place."""
    numbers = torch.as_tensor(values).to(means)
    if numbers.shape not in ((), (len(means),)):
        raise InvalidInputError(
            f"{name} of shape {tuple(numbers.shape)} do not fit {len(means)} centres; "
            f"give one number, or shape ({len(means)},)"
        )
    return numbers.expand(len(means))


def _exact_type(x: Tensor) -> torch.dtype:
    """float64 where the device has it: at low noise, float32 distances between images are off by several sigma^2."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _squared_distance(x: Tensor, means: Tensor) -> Tensor:
    """`|x_b - m_k|^2`, shape (B, K), by one matrix product."""
    squares = x.square().sum(1, keepdim=True) + means.square().sum(1)
    return (squares - 2 * x @ means.T).clamp(min=0)
