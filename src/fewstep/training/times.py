"""Which noise levels a network is trained on, and how often.

Every distribution is a function of uniform numbers u in (0, 1), its inverse distribution function; so each can be
stratified over the batch, which is a property of the u alone. Beside a sample each has its density, which weights
that are integrals over the noise level are divided by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from torch import Generator, Tensor
from torch.special import ndtr, ndtri

from fewstep.process import DiscreteVP, Process
from fewstep.registry import Entry, Option, Registry
from fewstep.training.named import full_form

TIMES: Registry[Entry] = Registry("distribution of times", Entry)

GREATEST_LOG_RATIO = 9.2
"""Of a process that ends in pure noise, where the logarithm has no end: a ratio of 10^4."""


def uniform_numbers(count: int, generator: Generator, stratified: bool) -> Tensor:
    """Draw numbers in (0, 1): independent, or one in each of ``count`` equal parts, `(i + u) / count`, shuffled.

    Stratified ones share one offset u, so each by itself is uniform, and the mean loss of a batch varies less.

    Returns:
        float64, shape (count,).

    Source: Kingma et al. 2021, arXiv:2107.00630, appendix I.1.

    >>> numbers = uniform_numbers(4, Generator().manual_seed(0), stratified=True)
    >>> sorted((4 * numbers).floor().tolist())
    [0.0, 1.0, 2.0, 3.0]
    """
    if stratified:
        offset = torch.rand((), dtype=torch.float64, generator=generator)
        numbers = (torch.randperm(count, generator=generator) + offset) / count
    else:
        numbers = torch.rand(count, dtype=torch.float64, generator=generator)
    # float64 may round to 0, where a normal distribution has no finite quantile.
    return numbers.clamp(min=2.0**-53, max=1 - 2.0**-53)


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


class Times:
    """A distribution of times on a process.

    Args:
        process: The forward process.
        settings: The distribution's name and options, ``{"name": "log_normal", "mean": -1.2}``.
        stratified: Whether the times of a batch are spread evenly over the distribution.

    Raises:
        UnknownNameError: There is no such distribution or option.
        InvalidInputError: An option is out of range.

    >>> from fewstep.process import flow
    >>> Times(flow(), {"name": "logit_normal"}).quantile(torch.tensor([0.5], dtype=torch.float64))
    tensor([0.5000], dtype=torch.float64)
    """

    def __init__(
        self, process: Process, settings: Mapping[str, Any], stratified: bool = False
    ) -> None:
        self.process, self.stratified = process, stratified
        self.settings = full_form(TIMES, settings)
        options = {name: value for name, value in self.settings.items() if name != "name"}
        self._form: _Uniform | _NormalLogRatio = TIMES.find(self.settings["name"]).function(
            process, **options
        )

    @property
    def is_discrete(self) -> bool:
        """Whether times are the entries of a table."""
        return isinstance(self.process, DiscreteVP)

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Draw times, float64, shape (count,), in the process's own unit."""
        if isinstance(self._form, _Uniform) and not self.stratified:
            return uniform_times(self.process, count, generator)
        return self.quantile(uniform_numbers(count, generator, self.stratified))

    def quantile(self, u: Tensor) -> Tensor:
        """Return the times below which the share u of the distribution lies; entries of the table if there is one.

        Args:
            u: float64, in (0, 1).
        """
        return self._form.quantile(u)

    def probability(self, t: Tensor) -> Tensor:
        """Return how likely these entries of the table are; for discrete processes."""
        return self._form.probability(t)

    def spacing(self, t: Tensor) -> Tensor:
        """Return `1 / p(log_snr)` at these times, the stretch of log_snr that a time stands for.

        On a table it is half the distance of the two neighbours in log_snr over the entry's probability, so a mean
        over drawn times of ``f * spacing`` is the integral of f over log_snr. No entry without signal has one: 0.
        """
        if not self.is_discrete:
            return self._form.spacing(t)
        process = self.process
        before, after = (
            process.log_snr((t + step).clamp(0, process.t_max)) for step in (-0.5, 0.5)
        )
        width = torch.where(process.alpha(t) > 0, before - after, 0.0)
        return width / self.probability(t)

    def nodes(self, count: int = 1000) -> tuple[Tensor, Tensor]:
        """Return times and shares that sum to 1: a mean over them is the mean over the distribution.

        Exact on a table; else the midpoints of ``count`` equally likely parts.
        """
        if self.is_discrete:
            t = torch.arange(self.process.training_steps, dtype=torch.float64)
            return t, self.probability(t)
        u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return self.quantile(u), torch.full_like(u, 1 / count)


class _Uniform:
    """Every index of the training table alike, `index = (T - 1) u`; on a table `floor(T u)`."""

    def __init__(self, process: Process) -> None:
        self.process, self.steps = process, process.training_steps

    def quantile(self, u: Tensor) -> Tensor:
        if isinstance(self.process, DiscreteVP):
            return (self.steps * u).floor()
        index = (self.steps - 1) * u
        return torch.tensor(
            [self.process.table_time(i) for i in index.tolist()], dtype=torch.float64
        )

    def probability(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 / self.steps)

    def spacing(self, t: Tensor) -> Tensor:
        """`-dlog_snr/du`, by differentiating the process."""
        with torch.enable_grad():
            index = self.process.table_index(t).detach().requires_grad_()
            times = torch.as_tensor(self.process.table_time(index))  # pyright: ignore[reportArgumentType]
            fall = -self.process.log_snr(times.clamp(self.process.t_min, self.process.t_max))
            (slope,) = torch.autograd.grad(fall.sum(), index)
        return slope * (self.steps - 1)


class _NormalLogRatio:
    """`ln(sigma / alpha)` normal, cut off (not piled up) at the ends of the process.

    On a table it is the nearest entry in log_snr.
    """

    def __init__(self, process: Process, mean: float, std: float) -> None:
        self.process, self.mean, self.std = process, mean, std
        ends = [process.least_noisy.log_snr, process.noisiest.log_snr]
        low, high = (min(-end, GREATEST_LOG_RATIO) for end in ends)
        if isinstance(process, DiscreteVP) and process.noisiest.is_pure_noise:
            high = float("inf")
        self._low, self._high = self._below(torch.tensor([low, high], dtype=torch.float64))

    def _below(self, log_ratio: Tensor) -> Tensor:
        return ndtr((log_ratio - self.mean) / self.std)

    def quantile(self, u: Tensor) -> Tensor:
        z = ndtri(self._low + (self._high - self._low) * u)
        t = self.process.time(log_snr=-(self.mean + self.std * z))
        return t.round() if isinstance(self.process, DiscreteVP) else t

    def probability(self, t: Tensor) -> Tensor:
        last = self.process.t_max
        ends = [self.process.ratio((t + step).clamp(0, last)).log() for step in (-0.5, 0.5)]
        low, high = (self._below(end) for end in ends)
        return (high - low) / (self._high - self._low)

    def spacing(self, t: Tensor) -> Tensor:
        z = (-self.process.log_snr(t) - self.mean) / self.std
        density = (-z.square() / 2).exp() / (self.std * (2 * torch.pi) ** 0.5)
        return (self._high - self._low) / density


def _named(name: str, title: str, paper: str) -> Callable[[Any], Any]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        TIMES.add(name, function, title=title, paper=paper)
        return function

    return register


@_named("uniform", "Uniform", "Ho, Jain, Abbeel 2020, arXiv:2006.11239")
def _uniform(process: Process) -> _Uniform:
    """Every entry of the training table alike; for EDM, even in ln(sigma)."""
    return _Uniform(process)


Mean = Annotated[float, Option("mean of ln(sigma / alpha)", -20, 20)]
Std = Annotated[float, Option("standard deviation of ln(sigma / alpha)", 0.01, 20)]


@_named("log_normal", "Log-normal", "Karras et al. 2022, arXiv:2206.00364, table 1")
def _log_normal(process: Process, mean: Mean = -1.2, std: Std = 1.2) -> _NormalLogRatio:
    """EDM's: ln(sigma / alpha) is normal, most often at middle levels."""
    return _NormalLogRatio(process, mean, std)


@_named("logit_normal", "Logit-normal", "Esser et al. 2024, arXiv:2403.03206, equation 19")
def _logit_normal(process: Process, mean: Mean = 0.0, std: Std = 1.0) -> _NormalLogRatio:
    """Stable Diffusion 3's: the logit of the flow time sigma / (alpha + sigma) is normal; it is ln(sigma / alpha)."""
    return _NormalLogRatio(process, mean, std)
