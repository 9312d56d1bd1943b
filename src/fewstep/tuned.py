"""Plans that were tuned to a model: what each was tuned for, where they lie, and which one fits.

They are files of Plans in the folder `plans` of the model's folder. Those of a training run lie beside its
checkpoints, which come and go; those of a bundled model come with the package.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fewstep.errors import InvalidInputError
from fewstep.models import CHECKPOINTS, Model, bundled_models
from fewstep.plan import Plan

OPTION = "tuned_for"
"""The option of a Plan that holds what it was tuned for."""

FOLDER = "plans"


@dataclass(frozen=True)
class Purpose:
    """What a plan was tuned for, and what that gained: plain data in the plan's options.

    Attributes:
        model: Name of the model.
        guidance: Scale of classifier-free guidance; 1 is off.
        method: How the plan was found, see `fewstep.Tuning`.
        error: Root mean square distance of its results to the converged ones.
        start: Name of the best untuned plan of as many calls.
        start_error: The distance of that one.
    """

    model: str
    guidance: float
    method: str
    error: float
    start: str
    start_error: float

    @property
    def gain(self) -> float:
        """How many times nearer the plan comes than the best untuned one."""
        return self.start_error / self.error if self.error else math.inf

    def signed(self, made: Plan) -> Plan:
        """The plan with this in its options."""
        return replace(made, options={**made.options, OPTION: asdict(self)})

    @classmethod
    def of(cls, made: Plan) -> Purpose | None:
        """What a plan was tuned for; None for one that was not tuned.

        Raises:
            InvalidInputError: If what the plan says of it is not usable.
        """
        if OPTION not in made.options:
            return None
        told = made.options[OPTION]
        facts = {}
        for entry in dataclasses.fields(cls):
            value = told.get(entry.name) if isinstance(told, dict) else None
            if not (isinstance(value, str) if entry.type == "str" else _is_number(value)):
                raise InvalidInputError(
                    f"its {OPTION} says {entry.name}={value!r}; tune the plan again"
                )
            facts[entry.name] = value
        return cls(**facts)


@dataclass(frozen=True)
class TunedPlan:
    """A file among the plans of a model.

    Attributes:
        file: The file.
        plan: Its plan, if it can be read.
        purpose: What the plan was tuned for, if that is this model.
        fault: Why it is not used: it cannot be read, or is for something else.
    """

    file: Path
    plan: Plan | None = None
    purpose: Purpose | None = None
    fault: str = ""


def mismatches(made: Plan, model: str, guidance: float) -> Iterator[str]:
    """Say, in a sentence each, where a plan was tuned for something else than it is used for.

    Args:
        made: Any plan; one that was not tuned fits everywhere.
        model: Name of the model it is used with.
        guidance: Its guidance scale.

    >>> import fewstep as fs
    >>> made = fs.plan("ddim", fs.Grid.from_ratios(fs.process.edm(), [3, 2, 1]))
    >>> tuned = Purpose("cats", 1.0, "none", 0.2, "ddim", 0.2).signed(made)
    >>> list(mismatches(tuned, "dogs", 1.0))
    ["the plan was tuned for the model 'cats', not 'dogs'"]
    """
    try:
        purpose = Purpose.of(made)
    except InvalidInputError as error:
        yield f"it is not known what the plan was tuned for: {error}"
        return
    if purpose is None:
        return
    if purpose.model != model:
        yield f"the plan was tuned for the model {purpose.model!r}, not {model!r}"
    if purpose.guidance != guidance:
        yield f"the plan was tuned for guidance {purpose.guidance}, not {guidance}"


def plans_folder(model: Model) -> Path | None:
    """Where the plans of a model lie; None for a model that was not loaded from a folder."""
    folder = model.folder
    if folder is None:
        return None
    run = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder
    return run / FOLDER


def plan_file(model: Model, steps: int, guidance: float = 1.0) -> Path:
    """The file in which `fewstep tune` keeps the plan of so many network calls and this guidance scale.

    Raises:
        InvalidInputError: If the model has no folder that can be written to.
    """
    folder = plans_folder(model)
    if folder is None or model.folder in bundled_models().values():
        kind = "model in memory" if folder is None else "bundled model"
        raise InvalidInputError(
            f"the {kind} {model.name} cannot be written to; give --out tuned-{steps}.json"
        )
    suffix = "" if guidance == 1 else f"-guidance-{guidance_text(guidance)}"
    return folder / f"tuned-{steps}{suffix}.json"


def guidance_text(guidance: float) -> str:
    """A guidance scale in the fewest digits that tell it from every other."""
    return repr(float(guidance)).removesuffix(".0")


def plans_of(model: Model) -> list[TunedPlan]:
    """Everything among the plans of a model, in the order of calls and guidance; what is not usable comes last.

    >>> import fewstep as fs
    >>> [entry.fault for entry in plans_of(fs.load("digits")) if entry.fault]
    []
    """
    folder = plans_folder(model)
    files = [] if folder is None else sorted(folder.glob("*.json"))
    # A hidden file is one that is being written.
    entries = [_read(file, model) for file in files if not file.name.startswith(".")]
    return sorted(entries, key=_rank)


def plan_for(model: Model, steps: int, guidance: float = 1.0) -> Plan | None:
    """The plan that was tuned to a model for exactly so many network calls and this guidance scale.

    Args:
        model: A loaded model.
        steps: Network calls.
        guidance: Scale of classifier-free guidance; 1 is off.

    Returns:
        The plan, the one with the smallest distance if there are several; or None. A warning names each file that
        cannot be read.
    """
    entries = plans_of(model)
    for entry in entries:
        if entry.plan is None:
            warnings.warn(f"{entry.file} is not used: {entry.fault}", stacklevel=4)
    fitting = [pair for pair in _tuned_for(entries, guidance) if pair[1].calls == steps]
    return min(fitting, key=lambda pair: pair[0].error)[1] if fitting else None


def plan_below(model: Model, steps: int, guidance: float = 1.0) -> Plan | None:
    """The plan with the most calls, but fewer than ``steps``, that was tuned to a model for this guidance scale.

    >>> import fewstep as fs
    >>> plan_below(fs.load("digits"), 5).calls
    4
    """
    below = [plan for _, plan in _tuned_for(plans_of(model), guidance) if plan.calls < steps]
    return max(below, key=lambda plan: plan.calls, default=None)


def _tuned_for(entries: list[TunedPlan], guidance: float) -> list[tuple[Purpose, Plan]]:
    """The usable plans for a guidance scale, with what they were tuned for."""
    usable = [(entry.purpose, entry.plan) for entry in entries if entry.purpose and entry.plan]
    return [(purpose, plan) for purpose, plan in usable if purpose.guidance == guidance]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read(file: Path, model: Model) -> TunedPlan:
    """A file among the plans of a model."""
    try:
        plan = Plan.from_json(file)
    except InvalidInputError as error:
        return TunedPlan(file, fault=str(error))
    try:
        purpose = Purpose.of(plan)
    except InvalidInputError as error:
        return TunedPlan(file, plan, fault=str(error))
    if purpose is None:
        return TunedPlan(file, plan, fault="the plan was not tuned to a model")
    if plan.process != model.process:
        return TunedPlan(
            file, plan, fault=f"the plan is for {plan.process.name}, not the model's process"
        )
    if fault := next(mismatches(plan, model.name, purpose.guidance), ""):
        return TunedPlan(file, plan, fault=fault)
    return TunedPlan(file, plan, purpose)


def _rank(entry: TunedPlan) -> tuple[bool, int, float, str]:
    if entry.plan is None or entry.purpose is None:
        return True, 0, 0.0, entry.file.name
    return False, entry.plan.calls, entry.purpose.guidance, entry.file.name
