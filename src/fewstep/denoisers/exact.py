"""Denoisers known in closed form: what samplers, metrics and tuners are tested against, with no training.

They are the posterior means `E[x_0 | x_t = x]` of data that is a mixture of Gaussians, on any forward process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.denoisers.denoiser import Denoiser
from fewstep.denoisers.parameterisation import Parameterisation
from fewstep.errors import InvalidInputError
from fewstep.process import Level, Process


class GaussianMixture(Denoiser):
    """Exact denoiser for a mixture of isotropic Gaussians with centres m_k, widths w_k and shares pi_k.

    With `v_k = (alpha w_k)^2 + sigma^2` and `p_k(x)` proportional to `pi_k N(x; alpha m_k, v_k)`:
    `D(x) = sum_k p_k(x) (sigma^2 m_k + alpha w_k^2 x) / v_k`.

    Args:
        means: Centres, shape (K, *data shape).
        widths: Standard deviations, shape (K,) or one number for all, >= 0.
        weights: Shares, shape (K,), > 0; equal by default.
        process: The forward process.
        chunk: How many centres are looked at together, which bounds memory to about B * chunk numbers.

    Raises:
        InvalidInputError: If shapes or signs are wrong.

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
        super().__init__(self._network, process, "data")
        self.parameterisation: Parameterisation | None = (
            None  # its estimate needs the level, not only a time
        )
        count = len(means)
        self.shape = tuple(means.shape[1:])
        self.means = means.flatten(1)
        self.widths = torch.as_tensor(widths, dtype=means.dtype).expand(count)
        self.weights = torch.ones(count, dtype=means.dtype) if weights is None else weights
        self.chunk = chunk
        if (
            self.weights.shape != (count,)
            or not bool((self.weights > 0).all())
            or bool((self.widths < 0).any())
        ):
            raise InvalidInputError(
                f"a mixture of {count} centres needs {count} weights > 0 and widths >= 0"
            )

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """The posterior mean at x, shape (B, *data shape); at pure noise it is the mean of the data."""
        flat = x.flatten(1)
        largest = torch.full_like(flat[:, :1], -torch.inf)
        total, centre, pull = (
            torch.zeros_like(largest),
            torch.zeros_like(flat),
            torch.zeros_like(largest),
        )
        for k in range(0, len(self.means), self.chunk):
            means, widths, weights = (
                v[k : k + self.chunk].to(x) for v in (self.means, self.widths, self.weights)
            )
            variance = (level.alpha * widths) ** 2 + level.sigma**2
            squared = torch.cdist(flat, level.alpha * means).square()
            logits = weights.log() - squared / (2 * variance) - flat.shape[1] / 2 * variance.log()
            new_largest = torch.maximum(largest, logits.amax(1, keepdim=True))
            share, keep = (logits - new_largest).exp(), (largest - new_largest).exp()
            total = keep * total + share.sum(1, keepdim=True)
            centre = keep * centre + (share * (level.sigma**2 / variance)) @ means
            pull = keep * pull + (share * (level.alpha * widths**2 / variance)).sum(
                1, keepdim=True
            )
            largest = new_largest
        return ((centre + pull * flat) / total).view_as(x)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n points of the data, shape (n, *data shape)."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return (self.means[which] + self.widths[which, None] * noise).view(n, *self.shape)

    def _network(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, self.process.level(float(t[0])))


class Dataset(GaussianMixture):
    """Exact denoiser for a data set smoothed by a Gaussian: one centre for each image, all of the same width.

    Args:
        images: The data, shape (N, ...), such as images in [-1, 1]; 10,000 of them fit, since they are taken in chunks.
        width: Standard deviation of the smoothing, > 0; 0 gives the images themselves back.
        process: The forward process.
        chunk: How many images are looked at together.
    """

    def __init__(
        self, images: Tensor, width: float, *, process: Process, chunk: int = 1024
    ) -> None:
        super().__init__(images, width, process=process, chunk=chunk)
