"""Options that several samplers share."""

from __future__ import annotations

import math
from typing import Annotated

from fewstep.registry import Option

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
Churn = Annotated[
    float, Option("noise that is added and removed again over all steps together", 0, math.inf)
]
ChurnFrom = Annotated[float, Option("smallest sigma/alpha at which noise is added", 0, math.inf)]
ChurnTo = Annotated[float, Option("largest sigma/alpha at which noise is added", 0, math.inf)]
