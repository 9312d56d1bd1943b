"""Which of a run's averages is best, by measurement."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import InvalidInputError, NonFiniteError
from fewstep.models import WEIGHT_FILES, Model, averages_in, load
from fewstep.training.objective import Objective
from fewstep.training.randomness import generator


@dataclass(frozen=True)
class AverageChoice:
    """What was measured of each set of weights of a checkpoint.

    Args:
        measured: A figure for each name, lowest first; lower is better.
    """

    measured: dict[str, float]

    @property
    def best(self) -> str:
        """The name of the weights with the lowest figure, for `fewstep.load(run, weights=...)`."""
        return next(iter(self.measured))


def choose_average(
    run: str | os.PathLike[str],
    measure: Callable[[Model], float],
    device: str | torch.device = "cpu",
) -> AverageChoice:
    """Measure every set of weights of a checkpoint: the main average, the raw ones, and all further averages.

    Args:
        run: A training run, of which the newest checkpoint counts, or a checkpoint.
        measure: What a model is judged by, lower is better: `held_out_loss` with images of yours, or a Fréchet
            distance of its samples.
        device: Where the models go.

    Raises:
        NonFiniteError: A figure is NaN or infinite.
        CheckpointError: The folder holds no readable model.

    Source: choosing the length of the average after training, Karras et al. 2024, arXiv:2312.02696, section 3.
    """
    first = load(run, device=device)
    folder = first.folder
    assert folder is not None
    known = [name for name, file in WEIGHT_FILES.items() if (folder / file).exists()]
    figures: dict[str, float] = {}
    for name in [*known, *averages_in(folder)]:
        figure = float(measure(load(folder, device=device, weights=name)))
        if figure != figure or abs(figure) == float("inf"):
            raise NonFiniteError(
                f"the measure gave {figure} for the weights {name!r} of {folder}; every figure must be finite: look "
                "at that model's samples"
            )
        figures[name] = figure
    return AverageChoice(dict(sorted(figures.items(), key=lambda item: item[1])))


@torch.no_grad()
def held_out_loss(
    model: Model,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    levels: int = 8,
    seed: int = 0,
    batch_size: int = 64,
) -> float:
    """Return the loss of a model on images, at fixed noise levels and with fixed noise, so that models compare.

    The weight is min(SNR, 5) on the error of x_0, at ``levels`` equally likely times for each image.

    Args:
        model: The model.
        images: Images in [-1, 1] that it was not trained on, shape (N, C, H, W).
        labels: Their classes, int64, shape (N,).
        levels: Times for each image.
        seed: Decides the noise.
        batch_size: Images that go through the network together.

    Raises:
        InvalidInputError: There are no images.
    """
    if not len(images) or levels < 1:
        raise InvalidInputError(
            f"a loss of {len(images)} images at {levels} levels; give one or more"
        )
    learned = model.config.network.out_channels == 2 * model.shape[0]
    objective = Objective(
        model.process,
        model.predicts,
        weight={"name": "min_snr"} if not model.process.noisiest.is_pure_noise else None,
        learned_variance=learned,
    )
    network = model.network
    assert isinstance(network, torch.nn.Module)
    times = objective.times.quantile((torch.arange(levels, dtype=torch.float64) + 0.5) / levels)
    total = 0.0
    for first in range(0, len(images), batch_size):
        x0 = images[first : first + batch_size].to(model.device or "cpu")
        given = (
            {} if labels is None else {"labels": labels[first : first + batch_size].to(x0.device)}
        )
        for k, t in enumerate(times):
            noise = torch.randn(x0.shape, generator=generator(seed, f"held out {k}", first))
            each = objective.per_image(network, x0, noise.to(x0), t.expand(len(x0)), **given)
            total += float(each.double().sum())
    return total / (len(images) * levels)
