"""First weights from a model that was trained before."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from fewstep.data import Finding
from fewstep.errors import InvalidInputError
from fewstep.models import Model, ModelConfig, load

LEAST_SHARE = 0.5
"""Share of the weights that has to fit; below it the networks have nothing to do with each other."""

NEVER_COMPUTED = ("dropout", "in_channels", "out_channels", "num_classes", "augment_width")
"""Options that change no output of weights that fit."""


def take_weights(network: nn.Module, model: ModelConfig, source: str) -> list[Finding]:
    """Copy the averaged weights of a trained model into a network, where name and shape are the same.

    Args:
        network: The new network; what does not fit keeps its first weights.
        model: What the network is to become.
        source: A model folder, the folder of a run, a checkpoint, or the name of a bundled model.

    Returns:
        Warnings: what did not fit, and what the two models do not have in common.

    Raises:
        InvalidInputError: Less than half of the weights fit, or there is no such model.
        CheckpointError: The model cannot be read.
    """
    trained = load(source)
    assert isinstance(trained.network, nn.Module)
    given, own = trained.network.state_dict(), network.state_dict()
    fitting = [name for name, w in own.items() if name in given and given[name].shape == w.shape]
    total, taken = (sum(own[name].numel() for name in names) for names in (own, fitting))
    left = [_misfit(name, own, given) for name in own if name not in set(fitting)]
    if taken < LEAST_SHARE * total:
        raise InvalidInputError(
            f"only {taken / total:.0%} of the network's weights are found in {source}, such as {left[0]}; the "
            f"networks differ ({_differences(trained, model)}): give the same --network and --network-options"
        )
    for name in fitting:
        own[name].copy_(given[name])
    findings = [
        Finding(
            "warning",
            f"{len(left)} of {len(own)} tensors do not fit those of {source} and start anew: "
            + "; ".join(left[:3])
            + ("; ..." if len(left) > 3 else ""),
        )
    ] * bool(left)
    if other := _differences(trained, model, leave_out=NEVER_COMPUTED):
        findings.append(
            Finding(
                "warning",
                f"the network is another than that of {source} ({other}): what fits in shape may compute something "
                "else; give the same --network and --network-options to go on from where it was",
            )
        )
    if (trained.config.predicts, dict(trained.config.process)) != (
        model.predicts,
        dict(model.process),
    ):
        findings.append(
            Finding(
                "warning",
                f"{source} predicts {trained.config.predicts} on {trained.config.process['name']}, this run "
                f"{model.predicts} on {model.process['name']}: the weights have to learn anew what to put out",
            )
        )
    return findings


def _misfit(name: str, own: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    if name not in given:
        return f"{name} is not there"
    return f"{name} has shape {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"


def _differences(trained: Model, model: ModelConfig, leave_out: Collection[str] = ()) -> str:
    there, here = trained.config.network.to_dict(), model.network.to_dict()
    return "; ".join(
        f"{name}: {there.get(name)!r} there, {here[name]!r} here"
        for name in here
        if there.get(name) != here[name] and name not in leave_out
    )
