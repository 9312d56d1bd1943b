"""How much images look like MNIST, judged by the bundled classifier of its digits."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from importlib.resources.abc import Traversable

import numpy as np
import torch
from torch import Tensor

from fewstep.data import ImageSet, to_uint8
from fewstep.errors import CheckpointError, DataError
from fewstep.metrics.frechet import FeatureStatistics, frechet_distance
from fewstep.networks.classifier import IMAGE_SIZE, Classifier

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
STATISTICS_FILE = "test-statistics.npz"
BATCH_SIZE = 500


def load_classifier(folder: Traversable | None = None) -> Classifier:
    """Load a classifier of digits, float32, on the CPU, in evaluation mode.

    Args:
        folder: Where its ``config.json`` and ``model.safetensors`` lie; None takes the bundled
            one.

    Raises:
        CheckpointError: If a file is missing, damaged or does not belong to a `Classifier`.

    >>> sum(weight.numel() for weight in load_classifier().parameters())
    351626
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = _bundled() if folder is None else folder
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        # Without storage there is no initialisation either, so no random numbers are drawn.
        with torch.device("meta"):
            classifier = Classifier(**config["arguments"])
        weights = load((folder / WEIGHTS_FILE).read_bytes())
        weights = {name: weight.float() for name, weight in weights.items()}
        classifier.load_state_dict(weights, assign=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load a digit classifier from {folder}: {error}; needed are {CONFIG_FILE} and "
            f"{WEIGHTS_FILE} as python -m fewstep.metrics.train_classifier writes them"
        ) from error
    return classifier.eval()


def digit_features(images: Tensor, *, classifier: Classifier | None = None) -> Tensor:
    """Return the classifier's features of images as their 8-bit picture files would show them.

    Args:
        images: (N, 1, 28, 28), floats in [-1, 1] (values beyond are clipped), or uint8.
        classifier: One on the images' device; None takes the bundled one.

    Returns:
        (N, D) float32 on the images' device; D is 64 for the bundled classifier.

    Raises:
        DataError: If the images do not have that shape or range, or there are none.
        NonFiniteError: If a pixel is NaN or infinite.

    >>> digit_features(torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 64])
    """
    judge = _judge(images, classifier)
    return _in_batches(images, judge.features)


def label_accuracy(
    images: Tensor,
    labels: Tensor | np.ndarray | list[int],
    *,
    classifier: Classifier | None = None,
) -> float:
    """Return the share of images, 0..1, that the classifier reads as their label.

    Args:
        images: (N, 1, 28, 28), floats in [-1, 1] (values beyond are clipped), or uint8.
        labels: (N,) integers 0..9: the digit each image shows, or was asked to show.
        classifier: One on the images' device; None takes the bundled one.

    Raises:
        DataError: If images or labels do not fit.
        NonFiniteError: If a pixel is NaN or infinite.

    >>> from fewstep.data import load_images
    >>> digits = load_images("mnist-1000")
    >>> label_accuracy(digits.images, digits.labels) > 0.99
    True
    """
    wanted = torch.as_tensor(labels, device=images.device)
    if wanted.is_floating_point() or wanted.dtype == torch.bool or wanted.shape != (len(images),):
        raise DataError(
            f"labels are {wanted.dtype} of shape {tuple(wanted.shape)}; needed are integers of "
            f"shape ({len(images)},), one for each image"
        )
    judge = _judge(images, classifier)
    logits = _in_batches(images, judge)
    if not 0 <= int(wanted.min()) <= int(wanted.max()) < judge.classes:
        raise DataError(
            f"labels run from {int(wanted.min())} to {int(wanted.max())}; the classifier knows "
            f"0..{judge.classes - 1}: drop the images of other classes"
        )
    return float((logits.argmax(1) == wanted).double().mean())


def digit_statistics() -> FeatureStatistics:
    """Return the bundled classifier's feature statistics of MNIST's 10,000 test images."""
    with (_bundled() / STATISTICS_FILE).open("rb") as file:
        return FeatureStatistics.load(file)


def digit_distance(images: Tensor) -> float:
    """Return the Fréchet distance of images to MNIST's test set in the classifier's features.

    The space is this classifier's own: compare the figure with others of this function from as
    many images, never with distances in Inception features. The classifier's model card gives
    the figures of MNIST's training images.

    Args:
        images: (N, 1, 28, 28), floats in [-1, 1] (values beyond are clipped), or uint8; some
            thousand at least, in the classes' natural proportions.

    Returns:
        The distance, 0 or more.

    Raises:
        DataError: If there are fewer than 2 images, or they have another shape or range.
        NonFiniteError: If a pixel is NaN or infinite.

    Source: Heusel et al. 2017, arXiv 1706.08500.

    >>> from fewstep.data import load_images
    >>> digits = load_images("mnist-1000").images
    >>> digit_distance(digits) < digit_distance(255 - digits)
    True
    """
    return frechet_distance(digit_features(images), digit_statistics())


def _bundled() -> Traversable:
    return resources.files("fewstep") / "bundled" / "mnist-classifier"


def _judge(images: Tensor, classifier: Classifier | None) -> Classifier:
    return load_classifier().to(images.device) if classifier is None else classifier


def _in_batches(images: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    pictures = ImageSet(_as_bytes(images))
    with torch.no_grad():
        return torch.cat(
            [
                read(pictures.batch(range(start, min(start + BATCH_SIZE, len(pictures))))[0])
                for start in range(0, len(pictures), BATCH_SIZE)
            ]
        )


def _as_bytes(images: Tensor) -> Tensor:
    shape = (1, IMAGE_SIZE, IMAGE_SIZE)
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or len(images) == 0:
        raise DataError(
            f"images of shape {tuple(images.shape)}; the digit classifier reads one or more of "
            f"shape {shape}: turn them grey and resize them first"
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DataError(
            f"images are {images.dtype}; allowed are floats in [-1, 1] and torch.uint8: convert "
            "whole numbers 0..255 with images.to(torch.uint8)"
        )
    if images.min() >= 0 and images.max() > 2:
        raise DataError(
            f"float images run from {float(images.min()):g} to {float(images.max()):g}; they "
            "belong into [-1, 1]: divide 0..255 by 127.5 and subtract 1"
        )
    return to_uint8(images)
