"""What a network is trained to minimise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fewstep.denoisers.parameterisation import Parameterisation, training_target
from fewstep.errors import InvalidInputError
from fewstep.process import DiscreteVP, Process
from fewstep.training.columns import column
from fewstep.training.loss_weights import Weight
from fewstep.training.times import Times
from fewstep.training.variance import bound_term, split_variance

VARIANCE_SHARE = 0.001


class Objective:
    """The loss of a training run: what is predicted, at which times, and how much each counts.

    Args:
        process: The forward process.
        predicts: What the network outputs, see `fewstep.denoisers.TARGETS`.
        times: How times are drawn: name and options, see `fewstep.training.TIMES`.
        weight: How much each level counts: name and options, see `fewstep.training.WEIGHTS`.
        stratified: Whether the times of a batch are spread evenly.
        learned_variance: Whether the network outputs twice the channels, the second half a variance.

    Raises:
        UnknownNameError: There is no such name or option.
        InvalidInputError: A value is out of range, or two do not fit together.

    >>> from fewstep.process import vp_linear
    >>> objective = Objective(vp_linear(), weight={"name": "min_snr"})
    >>> objective.weight.on_x0(torch.tensor([0.0, 999.0], dtype=torch.float64))
    tensor([5.0000e+00, 4.0360e-05], dtype=torch.float64)
    """

    def __init__(
        self,
        process: Process,
        predicts: str = "noise",
        times: Mapping[str, Any] | None = None,
        weight: Mapping[str, Any] | None = None,
        stratified: bool = False,
        learned_variance: bool = False,
    ) -> None:
        self.process, self.predicts, self.learned_variance = process, predicts, learned_variance
        self.times = Times(process, times or {"name": "uniform"}, stratified)
        self.weight = Weight(weight or {"name": "simple"}, predicts, self.times)
        if learned_variance and not (
            isinstance(process, DiscreteVP) and not process.noisiest.is_pure_noise
        ):
            raise InvalidInputError(
                f"a learned variance needs a table of betas below 1, which {process!r} does not have; "
                "take a process such as vp_linear or vp_cosine, or leave learned_variance out"
            )

    def draw_times(self, count: int, generator: Generator) -> Tensor:
        """Draw the times of a batch, float64, shape (count,), in the process's own unit."""
        return self.times.draw(count, generator)

    def __call__(
        self, network: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, **conditions: Any
    ) -> Tensor:
        """Return the mean loss, float32, shape (); see `prediction_loss`.

        With a learned variance it is L_hybrid, `L + 0.001 L_vlb`, with L_vlb in nats per pixel and no gradient
        through its mean, so that it teaches the variance alone.

        Source: Nichol, Dhariwal 2021, arXiv:2102.09672, section 3.1.
        """
        output, target, x_t = _output_and_target(
            network, self.process, x0, noise, t, self.predicts, conditions, self.learned_variance
        )
        mean, share = split_variance(output, x0) if self.learned_variance else (output, None)
        squares = (mean.float() - target.float()).square()
        loss = squares.mean() if self.weight.is_simple else self._weighted(squares, t).mean()
        if share is None:
            return loss
        skip, out = Parameterisation(self.predicts).estimate_of(
            *(column(f(t), x0) for f in (self.process.alpha, self.process.sigma))
        )
        estimate = skip.to(x0).float() * x_t.float() + out.to(x0).float() * mean.detach().float()
        bound = bound_term(self.process, x0, estimate, share, t)
        probability = column(self.times.probability(t), bound).to(bound)
        return loss + VARIANCE_SHARE * (bound / probability).mean()

    def per_image(
        self, network: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, **conditions: Any
    ) -> Tensor:
        """Return the weighted loss of each image without that of a learned variance, float32, shape (B,)."""
        output, target, _ = _output_and_target(
            network, self.process, x0, noise, t, self.predicts, conditions, self.learned_variance
        )
        mean = output[:, : x0.shape[1]]
        return self._weighted((mean.float() - target.float()).square(), t)

    def _weighted(self, squares: Tensor, t: Tensor) -> Tensor:
        """The loss of each image, shape (B,), of the squared errors of its pixels."""
        each = squares.flatten(1).mean(1)
        return each * column(self.weight.on_output(t), each).to(each)


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

    ``E || noise - network(alpha_t x_0 + sigma_t noise, t) ||^2`` per pixel, with t uniform. A network that predicts
    ``edm`` sees x_t and t as EDM preconditions them, see `Parameterisation.input_of`.

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
    output, target, _ = _output_and_target(network, process, x0, noise, t, predicts, conditions)
    return (output.float() - target.float()).square().mean()


def _output_and_target(
    network: nn.Module,
    process: Process,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    predicts: str,
    conditions: Mapping[str, Any],
    learned_variance: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The network's output, what it should have been, and the noised images."""
    alpha, sigma = (column(f(t), x0) for f in (process.alpha, process.sigma))
    x_t = alpha.to(x0) * x0 + sigma.to(x0) * noise
    scale, time = Parameterisation(predicts).input_of(column(t, x0), alpha, sigma)
    inputs = scale.to(x0) * x_t if isinstance(scale, Tensor) else x_t
    output = network(inputs, time.flatten().to(x0), **conditions)
    channels = x0.shape[1] * (2 if learned_variance else 1)
    if output.shape != (len(x0), channels, *x0.shape[2:]):
        raise InvalidInputError(
            f"the network gave the shape {tuple(output.shape)} for images of shape {tuple(x0.shape)}; it must give "
            f"{channels} channels"
            + (", half of them for the learned variance" if learned_variance else "")
        )
    return output, training_target(predicts, x0, noise, alpha, sigma), x_t


def pixelwise_loss(
    process: Process, variance: Tensor, predicts: str = "noise", objective: Objective | None = None
) -> float:
    """Return the loss of the best guess that knows each pixel's mean and variance, but nothing else.

    Given x_t, a pixel of variance v is known up to the variance ``sigma^2 v / (alpha^2 v + sigma^2)``, which is
    weighted and averaged over pixels and times. A network above this loss has learnt nothing of how pixels belong
    together: its pictures are noise. On data with independent normal pixels it is the lowest loss there is. What a
    learned variance adds is left out; it is a thousandth of the bound.

    Args:
        process: The forward process.
        variance: Variance of each pixel over the data set, any shape.
        predicts: Kind of prediction.
        objective: Times and weight; uniform and simple by default.

    >>> from fewstep.process import vp_linear
    >>> pixelwise_loss(vp_linear(), torch.zeros(4))
    0.0
    """
    objective = objective or Objective(process, predicts)
    times, shares = objective.times.nodes()
    alpha, sigma = process.alpha(times)[:, None], process.sigma(times)[:, None]
    weight = objective.weight.on_output(times)[:, None]

    def total(v: Tensor) -> float:
        error = sigma * (v / (alpha**2 * v + sigma**2)).sqrt()
        target = training_target(objective.predicts, error, -alpha * error / sigma, alpha, sigma)
        return float((shares @ (weight * target.square())).sum())

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
