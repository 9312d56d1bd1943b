"""How much each noise level counts in the loss.

Every weight is stated as a weight w on one error, that of the estimate of x_0. With `D = skip x + out F` an error of
the network's output F is `out` times smaller than that of D, so the loss of the output is `w out^2 |F - target|^2`.
With `snr = (alpha / sigma)^2`, the error of the noise is `snr` times the error of x_0, both squared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from fewstep.denoisers.parameterisation import SIGMA_DATA, SILENT_AT_PURE_NOISE, Parameterisation
from fewstep.errors import InvalidInputError
from fewstep.process import Process
from fewstep.registry import Entry, Option, Registry
from fewstep.training.named import full_form
from fewstep.training.times import Times

WEIGHTS: Registry[Entry] = Registry("weight of the loss", Entry)


class DrawnLevels(NamedTuple):
    """What a weight may depend on; float64, shape (B,).

    Args:
        snr: `(alpha / sigma)^2`.
        out: The factor from the network's output to the estimate of x_0.
        spacing: `1 / p(log_snr)`, see `Times.spacing`.
        bound: Weight on the error of x_0 in the variational bound over p(t), see `_vlb`.
    """

    snr: Tensor
    out: Tensor
    spacing: Tensor
    bound: Tensor


class Weight:
    """A weight of the loss on a process, for one kind of prediction.

    Args:
        settings: The weight's name and options, ``{"name": "min_snr", "gamma": 5.0}``.
        predicts: What the network outputs.
        times: The process, and how its times are drawn.

    Raises:
        UnknownNameError: There is no such weight or option.
        InvalidInputError: An option is out of range, or the prediction says nothing at a level of the process.

    >>> from fewstep.process import flow
    >>> Weight({"name": "simple"}, "flow", Times(flow(), {"name": "uniform"})).is_simple
    True
    """

    def __init__(self, settings: Mapping[str, Any], predicts: str, times: Times) -> None:
        self.settings = full_form(WEIGHTS, settings)
        self.times, self._form = times, Parameterisation(predicts)
        self._options = {k: v for k, v in self.settings.items() if k != "name"}
        self._function = WEIGHTS.find(self.settings["name"]).function
        self._check(times.process, predicts)

    @property
    def is_simple(self) -> bool:
        """Whether the loss of the output is not weighted at all."""
        return self.settings["name"] == "simple"

    def on_x0(self, t: Tensor) -> Tensor:
        """Return the weight on the squared error of x_0 at these times, float64."""
        process = self.times.process
        alpha, sigma = process.alpha(t), process.sigma(t)
        levels = DrawnLevels(
            (alpha / sigma).square(),
            self._form.estimate_of(alpha, sigma)[1],
            self.times.spacing(t),
            _bound(self.times, t),
        )
        return self._function(levels, **self._options)

    def on_output(self, t: Tensor) -> Tensor:
        """Return the weight on the squared error of the network's output at these times, float64."""
        if self.is_simple:
            return torch.ones_like(t)
        process = self.times.process
        _, out = self._form.estimate_of(process.alpha(t), process.sigma(t))
        return self.on_x0(t) * out.square()

    def _check(self, process: Process, predicts: str) -> None:
        weighted = not self.is_simple or predicts == "edm"
        silent = predicts in SILENT_AT_PURE_NOISE and weighted
        if silent and self.times.is_discrete and process.noisiest.is_pure_noise:
            raise InvalidInputError(
                f"{process.name} ends in pure noise, where predicts={predicts!r} says nothing about x_0, so weight "
                f"{self.settings['name']!r} has no value there; predict velocity, flow or data"
            )


def _bound(times: Times, t: Tensor) -> Tensor:
    """`(snr_s - snr_t) / 2` over p(t), s the entry before t; its limit `snr / p(log_snr)` in continuous time.

    Before the first entry is clean data: there it is `1 / (2 sigma^2)`, a decoder as wide as the noise.
    """
    process = times.process
    if not times.is_discrete:
        return (2 * process.log_snr(t)).exp() * times.spacing(t)
    snr = (2 * process.log_snr(t)).exp()
    before = (2 * process.log_snr((t - 1).clamp(min=0))).exp()
    decoder = 1 / (2 * process.sigma(t).square())
    return torch.where(t > 0, (before - snr) / 2, decoder) / times.probability(t)


def _named(name: str, title: str, paper: str) -> Callable[[Any], Any]:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        WEIGHTS.add(name, function, title=title, paper=paper)
        return function

    return register


@_named("simple", "L_simple", "Ho, Jain, Abbeel 2020, arXiv:2006.11239, equation 14")
def _simple(levels: DrawnLevels) -> Tensor:
    """1 on the network's own output; with noise prediction this is DDPM's L_simple."""
    return levels.out.square().reciprocal()


@_named("snr", "SNR", "Ho, Jain, Abbeel 2020, arXiv:2006.11239, equation 14")
def _snr(levels: DrawnLevels) -> Tensor:
    """SNR on x_0, which is 1 on the noise: L_simple, whatever is predicted."""
    return levels.snr


@_named("truncated_snr", "Truncated SNR", "Salimans, Ho 2022, arXiv:2202.00512, section 4")
def _truncated_snr(levels: DrawnLevels) -> Tensor:
    """max(SNR, 1) on x_0: high noise counts too."""
    return levels.snr.clamp(min=1.0)


@_named("min_snr", "Min-SNR-gamma", "Hang et al. 2023, arXiv:2303.09556")
def _min_snr(
    levels: DrawnLevels, gamma: Annotated[float, Option("largest weight on x_0", 0.01, 1e6)] = 5.0
) -> Tensor:
    """min(SNR, gamma) on x_0: no level of low noise outweighs the rest."""
    return levels.snr.clamp(max=gamma)


@_named("p2", "P2", "Choi et al. 2022, arXiv:2204.00227, equation 8")
def _p2(
    levels: DrawnLevels,
    gamma: Annotated[float, Option("how much low noise is held down", 0, 10)] = 1.0,
    k: Annotated[float, Option("SNR at which that begins", 1e-3, 1e6)] = 1.0,
) -> Tensor:
    """1 / (k + SNR)^gamma on the noise."""
    return levels.snr / (k + levels.snr) ** gamma


@_named("edm", "EDM", "Karras et al. 2022, arXiv:2206.00364, table 1")
def _edm(
    levels: DrawnLevels,
    sigma_data: Annotated[float, Option("standard deviation of the data", 1e-3, 1e3)] = SIGMA_DATA,
) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x_0, which is 1 on the output of EDM prediction."""
    return levels.snr + sigma_data**-2


@_named(
    "sigmoid",
    "Sigmoid",
    "Kingma, Gao 2023, arXiv:2303.00848; Hoogeboom et al. 2024, arXiv:2410.19324",
)
def _sigmoid(
    levels: DrawnLevels,
    bias: Annotated[float, Option("ln(SNR) at which it is 1/2", -20, 20)] = 2.0,
) -> Tensor:
    """sigmoid(bias - ln SNR) on the noise, integrated over log_snr, however the times are drawn."""
    noise = torch.sigmoid(bias - levels.snr.log())
    return torch.where(levels.snr > 0, levels.snr * noise * levels.spacing, 0.0)


@_named(
    "vlb",
    "Variational bound",
    "Kingma et al. 2021, arXiv:2107.00630; Ho, Jain, Abbeel 2020, equation 12",
)
def _vlb(levels: DrawnLevels) -> Tensor:
    """The bound itself in nats per pixel: half the fall of SNR on x_0, however the times are drawn."""
    return levels.bound
