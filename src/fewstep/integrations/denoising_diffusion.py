"""Checkpoints of denoising-diffusion-pytorch: their process and prediction; their network is another than ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.errors import InvalidInputError
from fewstep.integrations.foreign_files import tensors_in
from fewstep.process import (
    DiscreteVP,
    Process,
    vp_cosine,
    vp_from_betas,
    vp_linear,
    vp_sigmoid,
)

MARK = "init_conv.weight"
OF_PROCESS = {"betas", "loss_weight", "alphas_cumprod"}
"""What tells of the process and the prediction."""

CLOSE = 1e-5
"""Largest difference of betas, which the checkpoints hold in float32, from a named process."""

STRANGE = {
    "block1.norm.g": "RMS norms, after the convolutions",
    "mem_kv": "learned keys and values in attention",
    "to_qkv.weight": "linear attention",
}
"""Weights of its networks, by a part of their names, for which our U-Net has no counterpart."""


def is_denoising_diffusion(content: Any) -> bool:
    """Say whether the content of a file is such a checkpoint, or the weights of such a network."""
    return any(name.endswith(MARK) for name in _state(content))


def read_process(content: Any, path: Path) -> tuple[Process, str]:
    """Return the process of a checkpoint and what its network predicts, which the weights of its loss tell.

    Raises:
        InvalidInputError: It holds the network alone.
    """
    state = _state(content)
    if not state.keys() >= OF_PROCESS:
        raise InvalidInputError(
            f"{path.name} holds a network without its process; give the file of a whole GaussianDiffusion"
        )
    betas = state["betas"].double().numpy()
    return _process(betas), _prediction(
        state["alphas_cumprod"].double().numpy(), state["loss_weight"].double().numpy()
    )


def refuse_network(content: Any, path: Path) -> InvalidInputError:
    """Build the error that says why the network cannot become ours, and what can be done with it."""
    state = _state(content)
    reasons = [why for part, why in STRANGE.items() if any(part in name for name in state)]
    reasons.append("one more skip, from the first convolution to the last block")
    told = ""
    if state.keys() >= OF_PROCESS:
        process, predicts = read_process(content, path)
        told = f" Its process is {process.name} with {process.training_steps} steps, and it predicts {predicts}:"
    return InvalidInputError(
        f"{path.name} is of denoising-diffusion-pytorch, whose network cannot become our U-Net: "
        f"{'; '.join(reasons)}.{told} sample it as it is, with its own code: process, predicts = "
        f"fewstep.integrations.import_process({path.name!r}); fewstep.Denoiser(unet, process, predicts)"
    )


def _state(content: Any) -> dict[str, Tensor]:
    """The tensors of the diffusion, whether they stand alone or in the file of a trainer."""
    inner = content.get("model") if isinstance(content, dict) else None
    return tensors_in(inner if isinstance(inner, dict) else content)


def _process(betas: np.ndarray) -> Process:
    """The named process whose betas these are, or else their table."""
    steps = len(betas)
    scale = 1000 / steps
    for make in (
        lambda: vp_linear(steps, scale * 1e-4, scale * 0.02),
        lambda: vp_cosine(steps),
        lambda: vp_sigmoid(steps),
    ):
        try:
            process: DiscreteVP = make()
        except InvalidInputError:  # few steps make betas above 1
            continue
        if np.abs(process.betas - betas).max() < CLOSE:
            return process
    return vp_from_betas(betas)


def _prediction(alpha_bar: np.ndarray, weight: np.ndarray) -> str:
    """What is predicted: a loss on noise has the weight 1, on data the ratio snr, on velocity snr / (snr + 1).

    All of them may be cut off where the ratio is large; so it is read where it is about 1/2.
    """
    snr = alpha_bar / (1 - alpha_bar)
    at = int(np.abs(snr - 0.5).argmin())
    expected = {"noise": 1.0, "data": snr[at], "velocity": snr[at] / (snr[at] + 1)}
    return min(expected, key=lambda kind: abs(expected[kind] - weight[at]))
