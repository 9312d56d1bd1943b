"""Small classifiers, trained here, whose penultimate layer is the feature space of a Frechet distance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.training.precision import autocast

HELD_OUT = 5
"""One picture in so many is kept to measure the accuracy on."""

BATCH = 256


class Judge(nn.Module):
    """A body that gives features, and a linear read-out of their positive parts.

    Args:
        body: From pictures (B, ...) to features (B, width).
        width: Number of features.
        classes: Number of classes.
    """

    def __init__(self, body: nn.Module, width: int, classes: int = 10) -> None:
        super().__init__()
        self.body, self.width = body, width
        self.read_out = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        return self.read_out(self.body(images).relu())

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The features before their activation, in float32."""
        return torch.cat([self.body(part) for part in images.split(BATCH)])


def grey_classifier(images: Tensor, labels: Tensor, noise: float) -> tuple[Judge, float]:
    """A perceptron for tiny pictures with this much noise on them, trained in seconds, and its accuracy."""
    pixels = images[0].numel()

    def body() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 32))

    def noisy(batch: Tensor, generator: torch.Generator) -> Tensor:
        return batch + noise * torch.randn(batch.shape, generator=generator)

    return _trained(lambda: Judge(body(), 32), images, labels, 40, 2e-3, noisy)


def colour_classifier(
    images: Tensor, labels: Tensor, store: Path, epochs: int = 10
) -> tuple[Judge, float]:
    """A convolutional network for pictures of 32x32, trained in minutes and then kept, and its accuracy."""

    def judge() -> Judge:
        layers: list[nn.Module] = []
        for before, after in ((3, 48), (48, 96), (96, 192)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 64)]
        return Judge(nn.Sequential(*layers).to(memory_format=torch.channels_last), 64)  # pyright: ignore[reportCallIssue]

    if store.exists():
        kept = torch.load(store, weights_only=True)
        made = judge().eval()
        made.load_state_dict(kept["weights"])
        return made, kept["accuracy"]
    made, accuracy = _trained(judge, images, labels, epochs, 4e-3, _moved)
    store.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": made.state_dict(), "accuracy": accuracy}, store)
    return made, accuracy


def _moved(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures mirrored, all of them shifted by up to 4 pixels."""
    mirrored = torch.rand(len(batch), generator=generator) < 0.5
    batch = torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(-1), batch)
    down, right = torch.randint(9, (2,), generator=generator).tolist()
    height, width = batch.shape[-2:]
    padded = F.pad(batch, (4, 4, 4, 4), mode="reflect")
    return padded[..., down : down + height, right : right + width]


@torch.enable_grad()
def _trained(
    build: Callable[[], Judge],
    images: Tensor,
    labels: Tensor,
    epochs: int,
    rate: float,
    changed: Callable[[Tensor, torch.Generator], Tensor],
) -> tuple[Judge, float]:
    """A classifier, and the share of the pictures it was not trained on that it reads rightly."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    test, train = order[: len(images) // HELD_OUT], order[len(images) // HELD_OUT :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = build()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=rate, weight_decay=0.05)
    batches = max(1, len(train) // BATCH)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * batches)
    for _ in range(epochs):
        mixed = train[torch.randperm(len(train), generator=generator)]
        for rows in mixed[: batches * BATCH].split(BATCH):
            batch = changed(images[rows], generator).contiguous(memory_format=torch.channels_last)
            with autocast("auto", torch.device("cpu")):
                logits = judge(batch)
            loss = F.cross_entropy(logits.float(), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            cycle.step()
    judge.eval().requires_grad_(False)
    with torch.no_grad():
        right = [judge(images[rows]).argmax(1) == labels[rows] for rows in test.split(BATCH)]
    return judge, float(torch.cat(right).double().mean())
