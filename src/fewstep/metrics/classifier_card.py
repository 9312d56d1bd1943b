"""The model card of the digit classifier, and the figures in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

import numpy as np
import torch
from torch import Tensor

from fewstep.data import ImageSet
from fewstep.errors import DataError
from fewstep.metrics.classifier_training import Epoch, Recipe
from fewstep.metrics.digits import (
    STATISTICS_FILE,
    WEIGHTS_FILE,
    digit_features,
    label_accuracy,
    load_classifier,
)
from fewstep.metrics.frechet import FeatureStatistics, frechet_distance

CARD_FILE = "README.md"
PART_SIZE = 1000

CARD = Template("""\
# Model card: `mnist-classifier`

A small convolutional network that reads handwritten digits: 28x28 grey images in [-1, 1] in,
ten logits out, and before them $dimensions features. It is the judge of generated digits: which
digit an image shows, and how far a set of images lies from MNIST in feature space.

```python
from fewstep.data import load_images
from fewstep.metrics import digit_distance, label_accuracy

digits = load_images("mnist-1000")
print(label_accuracy(digits.images, digits.labels), digit_distance(digits.images))
```

| file | content |
| --- | --- |
| `model.safetensors` | $parameters weights in float16, $weights_size kB; loaded as float32 |
| `config.json` | the arguments of `fewstep.networks.classifier.Classifier` |
| `test-statistics.npz` | the test images' features: count, mean, covariance; $statistics_size kB |

## Figures

All with the float16 weights as shipped.

| figure | value |
| --- | --- |
| test images read correctly ($test_count) | **$test_accuracy** |
| training images read correctly ($train_count) | $train_accuracy |
| Fréchet distance to the test images, all training images | **$train_distance** |
| Fréchet distance to the test images, $part_size training images | $part_distance |
| the same for $balanced_size, equally many of each digit | $balanced_distance |
| variance of the test images' features, summed over dimensions | $variance |

The last two are means over disjoint random parts of the training set, with the standard
deviation between parts: what as many images of a perfect generator would get, asked for digits at
random or for equally many of each.

## Training

```text
$command
```

- Data: $data. Its $train_count training images, rotated by up to $degrees degrees, resized by
  up to $stretch and shifted by up to $pixels pixels at random. Its $test_count test images
  serve the tables on this page alone.
- Hardware: $hardware; $seconds seconds beside other work.
- AdamW, one cycle of the learning rate up to $learning_rate, weight decay $weight_decay,
  batches of $batch_size, $precision; the weights are those of the last step.

| epoch | training loss | test images read correctly |
| --- | --- | --- |
$history

## Use and limits

- Meant for measuring: how often an asked digit is drawn, and distances between sets of digits.
  Its features know digits and nothing else; of other pictures the distances say little.
- Distances in different features cannot be compared: a figure from here is not an FID in
  Inception features.
- Fréchet distances fall as the number of images grows: compare equal numbers only.
- It names a digit for every image, even for noise, and was not made to read post codes or cheques.

## Licence and attribution

Trained on the MNIST database of handwritten digits by Yann LeCun, Corinna Cortes and
Christopher J. C. Burges, licensed under
[CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/). The distance is that of Heusel
et al. 2017, arXiv:1706.08500.
""")


def measure(folder: Path, train_set: ImageSet, test_set: ImageSet) -> dict[str, str]:
    """Measure the saved weights, save the test statistics, and return the card's figures."""
    classifier = load_classifier(folder)
    train_features = digit_features(train_set.images, classifier=classifier)
    test_statistics = FeatureStatistics.of(digit_features(test_set.images, classifier=classifier))
    test_statistics.save(folder / STATISTICS_FILE)
    labels = _known_labels(train_set)
    # Neighbours in the training set often come from one writer, so the parts are drawn at random.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = disjoint_parts(torch.zeros_like(labels))
    balanced_parts = disjoint_parts(labels[order])

    def distance(parts: Iterable[Tensor]) -> str:
        each = [frechet_distance(train_features[order[part]], test_statistics) for part in parts]
        return f"{np.mean(each):.1f} ± {np.std(each):.1f}"

    def accuracy(data: ImageSet) -> str:
        share = label_accuracy(data.images, _known_labels(data), classifier=classifier)
        return f"{share:.2%}"

    return {
        "dimensions": str(classifier.feature_dim),
        "parameters": f"{sum(weight.numel() for weight in classifier.parameters()):,}",
        "weights_size": _kilobytes(folder / WEIGHTS_FILE),
        "statistics_size": _kilobytes(folder / STATISTICS_FILE),
        "train_count": f"{len(train_set):,}",
        "test_count": f"{len(test_set):,}",
        "part_size": f"{len(parts[0]):,}",
        "balanced_size": f"{len(balanced_parts[0]):,}",
        "test_accuracy": accuracy(test_set),
        "train_accuracy": accuracy(train_set),
        "train_distance": f"{frechet_distance(train_features, test_statistics):.3f}",
        "part_distance": distance(parts),
        "balanced_distance": distance(balanced_parts),
        "variance": f"{float(test_statistics.covariance.trace()):.1f}",
    }


def disjoint_parts(labels: Tensor, size: int = PART_SIZE) -> list[Tensor]:
    """Split images into as many parts as possible with equally many of each label.

    Args:
        labels: (N,) integers.
        size: Images in a part, rounded down to a multiple of the number of labels; fewer if there
            are not enough.

    Returns:
        The indices of each part, which keep the images' order within each label.

    >>> [part.tolist() for part in disjoint_parts(torch.tensor([0, 1, 1, 0, 0, 1, 1]), size=2)]
    [[0, 1], [3, 2], [4, 5]]
    """
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    fewest = min(len(indices) for indices in members)
    share = min(size // len(members), fewest)
    return [
        torch.cat([indices[start : start + share] for indices in members])
        for start in range(0, fewest - share + 1, share)
    ]


def write_card(
    folder: Path,
    recipe: Recipe,
    history: Sequence[Epoch],
    figures: Mapping[str, str],
    origin: Mapping[str, str],
) -> None:
    """Write ``README.md``.

    Args:
        folder: Where the weights lie.
        recipe: How they were trained.
        history: What happened in each epoch.
        figures: What `measure` found.
        origin: ``command``, ``data`` and ``hardware`` of the run.
    """
    card = CARD.substitute(
        figures,
        **origin,
        degrees=f"{recipe.degrees:g}",
        stretch=f"{recipe.stretch:.0%}",
        pixels=f"{recipe.pixels:g}",
        learning_rate=f"{recipe.learning_rate:g}",
        weight_decay=f"{recipe.weight_decay:g}",
        batch_size=recipe.batch_size,
        precision="bfloat16 autocast" if recipe.bf16 else "float32",
        seconds=f"{sum(epoch.seconds for epoch in history):.0f}",
        history="\n".join(
            f"| {epoch.number} | {epoch.loss:.4f} | {epoch.test_accuracy:.2%} |"
            for epoch in history
        ),
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _known_labels(data: ImageSet) -> Tensor:
    if data.labels is None:
        raise DataError(f"{data.source} has no labels; give labelled images, such as mnist")
    return data.labels


def _kilobytes(path: Path) -> str:
    return f"{path.stat().st_size / 1000:.0f}"
