"""A plan for ComfyUI, diffusers or k-diffusion: one of their samplers, and the list of sigmas to give it.

Only plans that are a sampler on a list of levels can be run elsewhere. Which sampler of the other program that is, is
not taken on trust: a plan matches a name if tracing the name on the plan's levels gives the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np

from fewstep.errors import InvalidInputError, unknown_name
from fewstep.integrations.scheduler_config import process_to_scheduler
from fewstep.plan import Plan
from fewstep.plan.rules import Row, expand
from fewstep.process import DiscreteVP
from fewstep.samplers import SAMPLERS
from fewstep.samplers import plan as make_plan
from fewstep.schedulers import Grid

Program = Literal["comfyui", "diffusers", "k-diffusion"]

TOLERANCE = 1e-9
"""Largest difference between coefficients of tables that are the same."""

FUNCTIONS = ("sample_euler", "sample_heun", "sample_dpm_2", "sample_dpmpp_2m")
"""Samplers of k-diffusion, and so of ComfyUI, that run any list of sigmas as Fewstep does."""


def export_sigmas(plan: Plan, to: Program) -> dict[str, Any]:
    """Write a plan for another program: which of its samplers to take, and the sigmas to give it.

    Args:
        plan: A known sampler on a list of levels, without noise: any saved plan that was not tuned, or one that tuning
            found by search.
        to: "comfyui", "diffusers" or "k-diffusion".

    Returns:
        Plain data, ready for JSON. Of all programs `program`; `exact`, whether the picture is the plan's up to
        rounding; and `notes`, what else to know.

        - "comfyui": `sampler`, the name in its menu; `sigmas`, the text for the node ManualSigmas.
        - "k-diffusion": `function`, and its `sigmas`, which are `sigma / alpha`; the point it works on is `x / alpha`,
          and starts at `start` times standard normal noise.
        - "diffusers": `scheduler`, the class; `config`, for `from_config` or the constructor; `set_timesteps`, the
          arguments of that method; for classes that take no list as it is also `assign`, attributes to set after it,
          and perhaps `nearest`, arguments that come close, as the network is asked at whole timesteps; `start`, the
          noise's size in the first point.

    Raises:
        InvalidInputError: If no sampler of the program gives the plan's picture.
        UnknownNameError: If there is no such program.

    >>> import fewstep as fs
    >>> plan = fs.plan("ddim", fs.Grid.from_ratios(fs.process.vp_linear(), [80, 5, 0.5, 0]))
    >>> told = export_sigmas(plan, "comfyui")
    >>> told["sampler"], told["sigmas"]
    ('euler', '80, 5, 0.5, 0')
    """
    programs: dict[str, Callable[[Plan], dict[str, Any]]] = {
        "comfyui": _comfyui,
        "diffusers": _diffusers,
        "k-diffusion": _k_diffusion,
    }
    if to not in programs:
        raise unknown_name("program", to, get_args(Program))
    if plan.draws:
        raise InvalidInputError(
            f"{plan.name} draws noise, which {to} draws in its own way, so that it cannot make the same picture; "
            "export a plan without noise"
        )
    if not _is(plan, plan.sampler, _own_options(plan)):
        raise InvalidInputError(
            f"{plan.name} has mixing weights of its own, which no list of sigmas can tell {to}; Fewstep runs it: "
            "fewstep sample MODEL --plan FILE. For a plan that other programs can run, tune with --method search"
        )
    return {"program": to, **programs[to](plan)}


def _k_diffusion(plan: Plan) -> dict[str, Any]:
    function = next((name for name in FUNCTIONS if _is(plan, name)), None)
    if function is None:
        raise _no_counterpart(plan, "k-diffusion", FUNCTIONS)
    _check_finite(plan, "k-diffusion")
    ratios = [level.ratio for level in plan.levels]
    return {
        "function": function,
        "sigmas": ratios,
        "start": ratios[0],
        "exact": True,
        "notes": ["the point is x / alpha, and the model gives the estimate of x_0"],
    }


def _comfyui(plan: Plan) -> dict[str, Any]:
    flow = plan.process.name == "flow"
    if not flow:
        _check_finite(plan, "ComfyUI")
    name, notes = _comfyui_sampler(plan, flow)
    # The sigma of its flow models is the flow time, that of all others sigma / alpha.
    sigmas = [level.sigma if flow else level.ratio for level in plan.levels]
    return {
        "sampler": name,
        "sigmas": ", ".join(f"{sigma:.9g}" for sigma in sigmas),
        "exact": not notes,
        "notes": notes,
    }


def _comfyui_sampler(plan: Plan, flow: bool) -> tuple[str, list[str]]:
    """The name in ComfyUI's menu, and where its picture differs."""
    for function in FUNCTIONS:
        name = function.removeprefix("sample_")
        if _is(plan, f"flow_{name}" if flow else function):
            return name, []
    if flow and _is(plan, "sample_dpmpp_2m"):
        return "dpmpp_2m", [
            "on flow models ComfyUI extrapolates along the logarithm of the flow time, Fewstep along log_snr: "
            "the picture will differ"
        ]
    if plan.sampler == "unipc" and not flow:
        options = SAMPLERS.find(plan.sampler).resolve(_own_options(plan))
        preset = f"uni_pc_{options['variant']}"
        notes = ["ComfyUI ends at sigma 0.001 in place of 0: the picture will differ a little"]
        if not _is(plan, preset):
            notes.append(
                f"ComfyUI runs it with order {SAMPLERS.find(preset).resolve({})['order']}, this plan has order "
                f"{options['order']}: the picture will differ"
            )
        return "uni_pc" if preset == "uni_pc_bh1" else preset, notes
    raise _no_counterpart(plan, "ComfyUI", [*FUNCTIONS, "uni_pc", "uni_pc_bh2"])


def _diffusers(plan: Plan) -> dict[str, Any]:
    flow = plan.process.name == "flow"
    if not flow and not isinstance(plan.process, DiscreteVP):
        raise InvalidInputError(
            f"no scheduler of diffusers takes a list of levels of the process {plan.process.name}; only those of "
            "flow and of variance-preserving processes on a table can be exported to it"
        )
    if not plan.levels[-1].is_clean:
        raise InvalidInputError(
            f"{plan.name} ends with noise, where diffusers goes on to clean data; end the levels with 0"
        )
    if not flow:
        _check_finite(plan, "diffusers")
    for scheduler, form in _SCHEDULERS.items():
        entry = SAMPLERS.find(scheduler)
        own = entry.name == plan.sampler
        if own or _is(plan, scheduler):
            told = form(plan, entry.resolve(_own_options(plan) if own else {}), flow)
            return {**told, "start": plan.levels[0].sigma, "notes": told["notes"]}
    raise _no_counterpart(plan, "diffusers", _SCHEDULERS)


def _euler(plan: Plan, options: Mapping[str, Any], flow: bool) -> dict[str, Any]:
    if flow:
        return {
            "scheduler": "FlowMatchEulerDiscreteScheduler",
            "config": {"shift": 1.0, "use_dynamic_shifting": False, **_LIST_AS_GIVEN},
            "set_timesteps": {"sigmas": [level.sigma for level in plan.levels[:-1]]},
            "exact": True,
            "notes": [],
        }
    return {
        "scheduler": "EulerDiscreteScheduler",
        "config": {**process_to_scheduler(plan.process), **_SPACING, **_LIST_AS_GIVEN},
        "set_timesteps": {"sigmas": [level.ratio for level in plan.levels]},
        "exact": True,
        "notes": [_PREDICTION, "the point is x / alpha, so it starts at start / alpha"],
    }


def _dpmpp_2m(plan: Plan, options: Mapping[str, Any], flow: bool) -> dict[str, Any]:
    config = {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": options["solver_type"],
    }
    told = _multistep(plan, flow, "DPMSolverMultistepScheduler", config)
    times = [level.t for level in plan.levels[:-1]]
    whole = [round(t) for t in times]
    if flow or len(set(whole)) < len(whole):
        return told
    if whole == times:
        del told["assign"]
        return {**told, "set_timesteps": {"timesteps": whole}, "notes": [_PREDICTION]}
    return {**told, "nearest": {"timesteps": whole}}


def _unipc(plan: Plan, options: Mapping[str, Any], flow: bool) -> dict[str, Any]:
    if options["variant"] != "bh2" or not options["lower_order_final"]:
        raise InvalidInputError(
            "diffusers divides by zero in the last step of UniPC unless variant=bh2 and lower_order_final=true; "
            f"this plan has variant={options['variant']} and lower_order_final={options['lower_order_final']}"
        )
    config = {
        "predict_x0": True,
        "solver_order": options["order"],
        "solver_type": "bh2",
        "lower_order_final": True,
    }
    told = _multistep(plan, flow, "UniPCMultistepScheduler", config)
    if not flow:
        return told
    if plan.levels[0].is_pure_noise:
        raise InvalidInputError(
            f"{plan.name} starts at pure noise, where the UniPC of diffusers divides by zero; start a little below it"
        )
    # The class takes a list on flow models, but asks the network at whole timesteps then.
    told["notes"].append(
        "the sigmas under nearest must be a NumPy array: on a plain list it fails"
    )
    return {**told, "nearest": {"sigmas": told["assign"]["sigmas"][:-1]}}


def _multistep(plan: Plan, flow: bool, scheduler: str, config: dict[str, Any]) -> dict[str, Any]:
    """A class of diffusers that takes no list as it is: its attributes are set in place of one."""
    levels = plan.levels
    if flow:
        config |= {
            "use_flow_sigmas": True,
            "flow_shift": 1.0,
            "prediction_type": "flow_prediction",
        }
        sigmas = [level.sigma for level in levels]
        times = [1000 * level.sigma for level in levels[:-1]]
    else:
        config |= {**process_to_scheduler(plan.process), "use_flow_sigmas": False}
        sigmas = [level.ratio for level in levels]
        times = [level.t for level in levels[:-1]]
    return {
        "scheduler": scheduler,
        "config": {**config, **_SPACING, **_LIST_AS_GIVEN},
        "set_timesteps": {"num_inference_steps": len(times)},
        "assign": {"timesteps": times, "sigmas": sigmas},
        "exact": True,
        "notes": [
            *([] if flow else [_PREDICTION]),
            f"{scheduler} takes no list of such levels: after set_timesteps, set its attributes timesteps and sigmas "
            "to the lists under assign, as float32 tensors on the CPU. A pipeline calls set_timesteps by itself, so "
            "it takes a subclass whose set_timesteps does both",
        ],
    }


_SCHEDULERS: dict[str, Callable[[Plan, Mapping[str, Any], bool], dict[str, Any]]] = {
    "EulerDiscreteScheduler": _euler,
    "DPMSolverMultistepScheduler": _dpmpp_2m,
    "UniPCMultistepScheduler": _unipc,
}
"""Schedulers of diffusers whose levels can be told; the registry knows which sampler each is."""

_SPACING = {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}
_LIST_AS_GIVEN = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_PREDICTION = (
    "prediction_type stays the model's own: use from_config(pipe.scheduler.config, **config)"
)


def _own_options(plan: Plan) -> dict[str, Any]:
    """Options of a plan that are its sampler's."""
    if plan.sampler not in SAMPLERS.names():
        return {}
    known = {option.name for option in SAMPLERS.find(plan.sampler).options}
    return {name: value for name, value in plan.options.items() if name in known}


def _is(plan: Plan, sampler: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a plan without noise is a sampler of ours on the plan's levels: the same points from the same outputs."""
    try:
        other = make_plan(sampler, Grid(plan.process, plan.levels), **(options or {}))
    except InvalidInputError:
        return False
    return (
        isinstance(other, Plan)
        and not other.draws
        and _same(list(_rows(plan)), list(_rows(other)))
    )


def _rows(plan: Plan) -> Iterator[Row]:
    return expand(plan.instructions, plan.result, plan.levels[-1])


def _same(rows: list[Row], others: list[Row]) -> bool:
    def numbers(row: Row) -> np.ndarray:
        scalars = [row.level.alpha, row.level.sigma, row.start]
        return np.concatenate([scalars, row.outputs, row.slopes])

    return len(rows) == len(others) and all(
        numbers(a).shape == numbers(b).shape
        and np.allclose(numbers(a), numbers(b), rtol=TOLERANCE, atol=TOLERANCE)
        for a, b in zip(rows, others, strict=True)
    )


def _check_finite(plan: Plan, program: str) -> None:
    if plan.levels[0].is_pure_noise:
        raise InvalidInputError(
            f"{plan.name} starts at pure noise, where the sigma of {program} is infinite; start a little below it"
        )


def _no_counterpart(plan: Plan, program: str, known: Any) -> InvalidInputError:
    ours = dict.fromkeys(SAMPLERS.find(name).name for name in known)
    return InvalidInputError(
        f"{program} has no sampler that makes the picture of {plan.sampler} with {dict(plan.options)} from a list of "
        f"sigmas; it can be told of {', '.join(ours)}, and of ddim without noise"
    )
