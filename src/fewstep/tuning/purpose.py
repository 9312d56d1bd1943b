"""What a plan was tuned for, kept in the plan itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from fewstep.plan import Plan

OPTION = "tuned_for"
"""The option of a Plan that holds it."""


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

    def signed(self, made: Plan) -> Plan:
        """The plan with this in its options."""
        return replace(made, options={**made.options, OPTION: asdict(self)})


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
    purpose: Any = made.options.get(OPTION)
    if not isinstance(purpose, dict):
        return
    if purpose.get("model") != model:
        yield f"the plan was tuned for the model {purpose.get('model')!r}, not {model!r}"
    if purpose.get("guidance") != guidance:
        yield f"the plan was tuned for guidance {purpose.get('guidance')}, not {guidance}"
