"""The schedulers of diffusers with all their settings, and a run of one on any denoiser.

A run hands the network exactly the level that the scheduler itself computes with. A pipeline would hand it the nearest
time of the table where a scheduler rounds its times; this way no peer loses anything to that.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers import schedulers as peers
from torch import Tensor

from fewstep.plan.executor import DenoiserLike
from fewstep.process import Process

diffusers.utils.logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="diffusers")

Values = Mapping[str, tuple[Any, ...]]
BOTH = (False, True)
SIGMAS = ("", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SPACINGS = ("linspace", "leading", "trailing")
FINAL = ("zero", "sigma_min")
SOME_STEPS = 10
SIGMA_KIND = "sigmas"
"""Not a setting of diffusers: which one of its `use_..._sigmas` is on, since no two can be."""


@dataclass(frozen=True)
class Family:
    """A class of diffusers and the values of its settings.

    Attributes:
        name: The class.
        grid: Settings that decide the levels.
        solver: All others of the class.
        step: Arguments of its method `step`.
        random: Values of a setting of solver or step that make it draw noise; `{}` if it always does, None if never.
    """

    name: str
    grid: Values
    solver: Values = field(default_factory=dict)
    step: Values = field(default_factory=dict)
    random: Values | None = None

    def draws(self, given: Mapping[str, Any]) -> bool:
        """Whether it draws noise with these settings of solver and step."""
        if self.random is None:
            return False
        return all(given[name] in values for name, values in self.random.items())


def _grid(rescale: bool, kinds: tuple[str, ...] = SIGMAS, final: bool = False) -> Values:
    values: dict[str, tuple[Any, ...]] = {
        "timestep_spacing": SPACINGS,
        "steps_offset": (0, 1),
        SIGMA_KIND: kinds,
    }
    if rescale:
        values["rescale_betas_zero_snr"] = BOTH
    if final:
        values["final_sigmas_type"] = FINAL
    return values


PLAIN = ("",)
CLIP = {"clip_sample": BOTH}
THRESHOLD = {"thresholding": BOTH}
DPM_GRID = _grid(True, (*SIGMAS, "use_lu_lambdas"), final=True)
EDM_GRID = {
    "sigma_schedule": ("karras", "exponential"),
    "rho": (7.0, 5.0, 3.0),
    "final_sigmas_type": FINAL,
}
FAMILIES = (
    Family(
        "DDIMScheduler",
        {**_grid(True, PLAIN), "set_alpha_to_one": BOTH},
        {**CLIP, **THRESHOLD},
        {"eta": (0.0, 0.5, 1.0), "use_clipped_model_output": BOTH},
        {"eta": (0.5, 1.0)},
    ),
    Family(
        "DDPMScheduler",
        _grid(True, PLAIN),
        {**CLIP, **THRESHOLD, "variance_type": ("fixed_small", "fixed_small_log", "fixed_large")},
        random={},
    ),
    Family(
        "PNDMScheduler",
        {**_grid(False, PLAIN), "set_alpha_to_one": BOTH},
        {"skip_prk_steps": (True, False)},
    ),
    Family(
        "EulerDiscreteScheduler",
        {**_grid(True, final=True), "interpolation_type": ("linear", "log_linear")},
        step={"s_churn": (0.0, 10.0)},
        random={"s_churn": (10.0,)},
    ),
    Family("EulerAncestralDiscreteScheduler", _grid(True, PLAIN), random={}),
    Family("HeunDiscreteScheduler", _grid(False), CLIP),
    Family("KDPM2DiscreteScheduler", _grid(False)),
    Family("KDPM2AncestralDiscreteScheduler", _grid(False), random={}),
    Family("LMSDiscreteScheduler", _grid(False), step={"order": (4, 3, 2, 1)}),
    Family(
        "DEISMultistepScheduler",
        _grid(False),
        {"solver_order": (2, 3, 1), "lower_order_final": (True, False), **THRESHOLD},
    ),
    Family(
        "DPMSolverMultistepScheduler",
        DPM_GRID,
        {
            "solver_order": (2, 3, 1),
            "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"),
            "solver_type": ("midpoint", "heun"),
            "lower_order_final": (True, False),
            "euler_at_final": BOTH,
            **THRESHOLD,
        },
        random={"algorithm_type": ("sde-dpmsolver++", "sde-dpmsolver")},
    ),
    Family(
        "DPMSolverSinglestepScheduler",
        {SIGMA_KIND: SIGMAS, "final_sigmas_type": FINAL},
        {
            "solver_order": (2, 3, 1),
            "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++"),
            "solver_type": ("midpoint", "heun"),
            "lower_order_final": BOTH,
            **THRESHOLD,
        },
        random={"algorithm_type": ("sde-dpmsolver++",)},
    ),
    Family(
        "UniPCMultistepScheduler",
        _grid(True, final=True),
        {
            "solver_order": (2, 3, 1, 4),
            "solver_type": ("bh2", "bh1"),
            "predict_x0": (True, False),
            "lower_order_final": (True, False),
            "disable_corrector": ([], [0], [0, 1]),
            **THRESHOLD,
        },
    ),
    Family(
        "SASolverScheduler",
        _grid(False),
        {
            "predictor_order": (2, 1, 3),
            "corrector_order": (2, 1, 3, 4),
            "algorithm_type": ("data_prediction", "noise_prediction"),
            "lower_order_final": (True, False),
            **THRESHOLD,
        },
        random={},
    ),
    Family("EDMEulerScheduler", EDM_GRID),
    Family(
        "EDMDPMSolverMultistepScheduler",
        EDM_GRID,
        {
            "solver_order": (2, 3, 1),
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "solver_type": ("midpoint", "heun"),
            "lower_order_final": (True, False),
            "euler_at_final": BOTH,
            **THRESHOLD,
        },
        random={"algorithm_type": ("sde-dpmsolver++",)},
    ),
    Family("IPNDMScheduler", {}),
    Family("LCMScheduler", {"original_inference_steps": (50, 100)}, CLIP, random={}),
    Family(
        "TCDScheduler",
        {"original_inference_steps": (50, 100)},
        CLIP,
        {"eta": (0.3, 0.0, 1.0)},
        {"eta": (0.3, 1.0)},
    ),
)
"""All classes for models with a table of noise levels, whatever they are of; not those for flow models, for other
kinds of data, or with the arithmetic of another one of these. `DPMSolverSDEScheduler` and
`CosineDPMSolverMultistepScheduler` need a further package, and draw noise."""


class Refused(Exception):
    """A class of diffusers does not take these settings."""


@functools.cache
def defaults(family: str) -> dict[str, Any]:
    """What a class takes where nothing is given, by the names of its settings and of the arguments of `step`."""
    kind = getattr(peers, family)
    known = [inspect.signature(function).parameters for function in (kind.step, kind.__init__)]
    return {name: p.default for parameters in known for name, p in parameters.items()}


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Whatever a class of diffusers raises for settings that do not go together, of which there are many kinds."""
    try:
        yield
    except Exception as error:
        raise Refused from error


@dataclass(frozen=True)
class PeerRun:
    """A scheduler of diffusers with as many steps as so many network calls pay for.

    Attributes:
        family: Its class.
        config: Settings of the class.
        step: Arguments of `step`.
        draws: Whether it draws noise.
        process: The forward process of the model.
        budget: Network calls at most.
    """

    family: str
    config: Mapping[str, Any]
    step: Mapping[str, Any]
    draws: bool
    process: Process
    budget: int

    @property
    def calls(self) -> int:
        """Network calls; 0 if they pay for no step, or the class refuses the settings."""
        try:
            return len(self.scheduler().timesteps)
        except Refused:
            return 0

    def scheduler(self) -> Any:
        """A new scheduler, at its first step.

        Raises:
            Refused: If the class does not take the settings, or the calls pay for no step.
        """
        config = dict(self.config)
        if kind := config.pop(SIGMA_KIND, ""):
            config[kind] = True
        config |= _model_facts(self.family, self.process)
        with _refusing():
            scheduler = _built(getattr(peers, self.family), config)
            for steps in range(self.budget, 0, -1):
                scheduler.set_timesteps(steps)
                if 0 < len(scheduler.timesteps) <= self.budget:
                    return _refined(scheduler)
        raise Refused

    def run(self, denoiser: DenoiserLike, start: Tensor, seed: int) -> Tensor:
        """The result from `sigma * start` at the scheduler's first level, with one network call a listed time.

        The network's answer is given as the velocity `alpha noise - sigma x_0` at the scheduler's own level.

        Raises:
            Refused: If the scheduler fails when it steps.
        """
        scheduler, step = self.scheduler(), dict(self.step)
        if self.draws:
            step["generator"] = torch.Generator().manual_seed(seed)
        high, low = self.process.noisiest.ratio, self.process.least_noisy.ratio
        one = torch.ones((), dtype=torch.float64)
        x: Tensor | None = None
        for t in scheduler.timesteps:
            with _refusing():
                scale = float(scheduler.scale_model_input(one, t))
                alpha, sigma = _level(scheduler, t, scale)
                ratio = min(max(sigma / alpha, low), high) if alpha else high
                (level,) = self.process.levels_at([ratio])
            if x is None:
                x = start * (sigma / scale)
            point = x * scale
            velocity = (alpha * point - denoiser(point, level)) / sigma
            with _refusing():
                x = scheduler.step(velocity, t, x, **step).prev_sample
        assert x is not None
        return x


def _built(kind: Any, config: Mapping[str, Any]) -> Any:
    """A scheduler; some make a grid of 1000 steps when they are built, which takes a second and is not used."""
    given = kind.set_timesteps
    with mock.patch.object(kind, "set_timesteps", lambda self, *_: given(self, SOME_STEPS)):
        return kind(**config)


def _model_facts(family: str, process: Process) -> dict[str, Any]:
    """What a scheduler has to know of the model. Velocity is well-conditioned at both ends of the path."""
    if family == "IPNDMScheduler":
        return {"num_train_timesteps": process.training_steps}
    if family.startswith("EDM"):
        return {
            "sigma_data": 1.0,
            "sigma_min": process.least_noisy.ratio,
            "sigma_max": process.noisiest.ratio,
            "prediction_type": "v_prediction",
        }
    return {
        "num_train_timesteps": process.training_steps,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "v_prediction",
    }


def _refined(scheduler: Any) -> Any:
    """With its tables in float64, so that no digits are lost between them and our levels; and at its first step."""
    for name in ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "alphas_cumprod"):
        if isinstance(getattr(scheduler, name, None), Tensor):
            setattr(scheduler, name, getattr(scheduler, name).double())
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


def _level(scheduler: Any, t: Tensor, scale: float) -> tuple[float, float]:
    """The scheduler's own alpha and sigma, with squares that add up to 1, at the time where it asks the network.

    Schedulers whose state is x / alpha scale it by alpha for the network.
    """
    if scale != 1.0:
        return scale, math.sqrt(1 - scale**2)
    if isinstance(scheduler, peers.IPNDMScheduler):
        index = scheduler.step_index or 0
        return float(scheduler.alphas[index]), float(scheduler.betas[index])
    if hasattr(scheduler, "sigmas"):
        ratio = float(scheduler.sigmas[scheduler.step_index or 0])
        return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
    square = float(scheduler.alphas_cumprod[int(t)])
    return math.sqrt(square), math.sqrt(1 - square)


def products(values: Values) -> Iterator[dict[str, Any]]:
    """Every combination of values, the first ones first."""
    for chosen in itertools.product(*values.values()):
        yield dict(zip(values, chosen, strict=True))
