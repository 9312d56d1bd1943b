"""Options that several samplers share."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from fewstep.registry import Option
from fewstep.samplers.steps import Form

AncestralEta = Annotated[
    float,
    Option(
        "share of fresh noise: 0 is deterministic, 1 the posterior of the forward process", 0, 10
    ),
]
SdeEta = Annotated[
    float,
    Option("strength of the reverse SDE: 0 is the ODE, 1 the usual SDE", 0, 10),
]
NoiseFactor = Annotated[
    float, Option("factor on the fresh noise; anything but 1 changes the noise level", 0, 10)
]
SolverType = Annotated[
    Literal["midpoint", "heun"],
    Option("how the second-order step weighs the slope: by half of the estimate's, or exactly"),
]
Corrected = Annotated[
    bool,
    Option("the method of the order that its name promises, in place of the published formula"),
]
LowerOrderFinal = Annotated[
    bool, Option("below 15 steps: end with a step of order 2 and one of order 1")
]
Variable = Annotated[
    Form,
    Option("what a step is measured in: sigma/alpha, or the flow time sigma/(alpha+sigma)"),
]
Stage = Annotated[float, Option("place of the stage in the step, in log_snr", 0.1, 1)]
NewestWeight = Annotated[
    float, Option("weight of the newest noise; 1 is Euler, 1.5 is iPNDM of order 2", 0, 10)
]
Churn = Annotated[
    float, Option("noise that is added and removed again over all steps together", 0, math.inf)
]
ChurnFrom = Annotated[float, Option("smallest sigma/alpha at which noise is added", 0, math.inf)]
ChurnTo = Annotated[float, Option("largest sigma/alpha at which noise is added", 0, math.inf)]
