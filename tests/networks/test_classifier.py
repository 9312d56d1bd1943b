from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.errors import InvalidInputError
from fewstep.networks.classifier import Classifier


@pytest.fixture
def classifier() -> Classifier:
    return Classifier()


def noise(count: int) -> Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_shapes_and_size(classifier: Classifier) -> None:
    assert classifier.features(noise(3)).shape == (3, 64)
    assert classifier(noise(3)).shape == (3, 10)
    assert 150_000 <= sum(weight.numel() for weight in classifier.parameters()) <= 400_000


@pytest.mark.global_rng
def test_sizes_are_as_asked() -> None:
    classifier = Classifier(channels=(4, 8, 12), feature_dim=5, classes=3)
    assert classifier.features(noise(2)).shape == (2, 5)
    assert classifier(noise(2)).shape == (2, 3)


def test_logits_depend_on_the_features_alone(classifier: Classifier) -> None:
    features = classifier.features(noise(3))
    last = classifier.read_out[1]
    assert isinstance(last, torch.nn.Linear)
    expected = features.clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(classifier(noise(3)), expected)


def test_an_image_is_read_alone_and_the_same_in_training(classifier: Classifier) -> None:
    together = classifier.train()(noise(5))
    for k, image in enumerate(noise(5)):
        torch.testing.assert_close(classifier.eval()(image[None])[0], together[k])


def test_initial_weights_keep_the_scale(classifier: Classifier) -> None:
    # Six layers: weights off by a factor of 1.4 each would leave this range.
    assert 0.3 < float(classifier.features(noise(64)).detach().std()) < 3


def test_every_weight_is_trained(classifier: Classifier) -> None:
    classifier(noise(8)).square().sum().backward()
    for name, weight in classifier.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_channels_last_and_bfloat16(classifier: Classifier) -> None:
    images = noise(4)
    expected = classifier(images)
    as_last = classifier(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(as_last, expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = classifier(images)
    torch.testing.assert_close(low.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 3, 28, 28), (2, 1, 32, 32)])
def test_other_shapes_are_refused(classifier: Classifier, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match=r"\(B, 1, 28, 28\).*resize"):
        classifier(torch.zeros(shape))


@pytest.mark.parametrize(
    "sizes", [{"channels": (8, 8)}, {"channels": (8, 0, 8)}, {"feature_dim": 0}, {"classes": -1}]
)
def test_impossible_sizes_are_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match="at least 1"):
        Classifier(**sizes)  # pyright: ignore[reportArgumentType]
