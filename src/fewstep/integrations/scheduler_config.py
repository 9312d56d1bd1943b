"""A forward process as the scheduler configuration of diffusers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.errors import InvalidInputError, unknown_name
from fewstep.process import DiscreteVP, Process, from_dict, vp_from_betas

PREDICTIONS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "data"}
"""What diffusers calls the kinds of prediction that it knows on such processes."""

BETA_SCHEDULES = {"vp_linear": "linear", "vp_scaled_linear": "scaled_linear"}
"""What diffusers calls our processes with two ends; the cosine has a name too, others are given as a table of betas."""

COSINE = "squaredcos_cap_v2"

_DDPM, _LATENT = (1e-4, 0.02, "linear"), (0.00085, 0.012, "linear")
SCHEDULERS: dict[str, tuple[float, float, str]] = {
    "DDIMInverseScheduler": _DDPM,
    "DDIMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDPMScheduler": _DDPM,
    "DEISMultistepScheduler": _DDPM,
    "DPMSolverMultistepScheduler": _DDPM,
    "DPMSolverSinglestepScheduler": _DDPM,
    "EulerAncestralDiscreteScheduler": _DDPM,
    "EulerDiscreteScheduler": _DDPM,
    "HeunDiscreteScheduler": _LATENT,
    "KDPM2AncestralDiscreteScheduler": _LATENT,
    "KDPM2DiscreteScheduler": _LATENT,
    "LMSDiscreteScheduler": _DDPM,
    "PNDMScheduler": _DDPM,
    "SASolverScheduler": _DDPM,
    "UniPCMultistepScheduler": _DDPM,
}
"""Schedulers whose configuration holds a table of betas, with their defaults of its ends and its form."""


def process_to_scheduler(process: Process) -> dict[str, Any]:
    """Return a process on a table as diffusers is told of it.

    Raises:
        InvalidInputError: It is no variance-preserving process on a table.

    >>> from fewstep.process import vp_cosine
    >>> process_to_scheduler(vp_cosine(steps=500))["beta_schedule"]
    'squaredcos_cap_v2'
    """
    if not isinstance(process, DiscreteVP):
        raise InvalidInputError(
            f"the process {process.name} has no counterpart among the schedulers of diffusers that are told betas, "
            f"only tables have: {', '.join([*BETA_SCHEDULES, 'vp_cosine', 'vp_from_betas'])} and the like"
        )
    options: Mapping[str, Any] = process.options
    told: dict[str, Any] = {
        "num_train_timesteps": process.training_steps,
        "rescale_betas_zero_snr": options["zero_terminal_snr"],
    }
    if process.name in BETA_SCHEDULES:
        ends = {name: options[name] for name in ("beta_start", "beta_end")}
        return {
            **told,
            "beta_schedule": BETA_SCHEDULES[process.name],
            **ends,
            "trained_betas": None,
        }
    if process.name == "vp_cosine" and (options["offset"], options["max_beta"]) == (0.008, 0.999):
        return {**told, "beta_schedule": COSINE, "trained_betas": None}
    if process.name == "vp_from_betas":
        return {**told, "trained_betas": list(options["betas"])}
    # The table before its end is moved to pure noise, which diffusers does by itself.
    before = from_dict({**process.to_dict(), "zero_terminal_snr": False})
    assert isinstance(before, DiscreteVP)
    return {**told, "trained_betas": before.betas.tolist()}


def process_from_scheduler(config: Mapping[str, Any]) -> tuple[Process, str]:
    """Return the process and the kind of prediction that a scheduler's configuration tells of.

    Args:
        config: The content of a ``scheduler_config.json``.

    Raises:
        InvalidInputError: A scheduler, a form of the betas or a prediction that has no counterpart here.

    >>> process_from_scheduler({"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"})[1]
    'velocity'
    """
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in SCHEDULERS:
        raise unknown_name(
            "scheduler class",
            kind,
            SCHEDULERS,
            "Only those on a table of betas can be read; else give the process and what the network predicts",
        )
    if config.get("use_flow_sigmas"):
        raise _refused("use_flow_sigmas", True, "false")
    prediction = config.get("prediction_type", "epsilon")
    if config.get("predict_epsilon") is False:  # before prediction_type there was this
        prediction = "sample"
    if prediction not in PREDICTIONS:
        raise _refused("prediction_type", prediction, ", ".join(PREDICTIONS))
    return _process(config, *SCHEDULERS[kind]), PREDICTIONS[prediction]


def _process(config: Mapping[str, Any], beta_start: float, beta_end: float, form: str) -> Process:
    zero = {"zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False))}
    if config.get("trained_betas") is not None:
        return vp_from_betas(config["trained_betas"], **zero)
    form = config.get("beta_schedule", form)
    common = {"steps": config.get("num_train_timesteps", 1000), **zero}
    if form == COSINE:
        return from_dict({"name": "vp_cosine", **common})
    names = {theirs: ours for ours, theirs in BETA_SCHEDULES.items()}
    names["sigmoid"] = "vp_sigmoid_beta"
    if form not in names:
        raise _refused("beta_schedule", form, ", ".join([*names, COSINE]))
    ends = {
        "beta_start": config.get("beta_start", beta_start),
        "beta_end": config.get("beta_end", beta_end),
    }
    return from_dict({"name": names[form], **common, **ends})


def _refused(name: str, value: Any, known: str) -> InvalidInputError:
    return InvalidInputError(
        f"the scheduler's {name} = {value!r} has no counterpart here, only {known}; "
        "give the process and what the network predicts"
    )
