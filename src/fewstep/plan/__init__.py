"""Plans: samplers as coefficient tables, the tape that traces them and the executor that runs them."""

from fewstep.plan.eager import EagerPlan, EagerTape, Solution
from fewstep.plan.executor import DenoiserLike, NoiseSource, Progress
from fewstep.plan.instructions import Combine, Denoise, Differentiate, Draw, Instruction
from fewstep.plan.plan import Plan, trace
from fewstep.plan.tape import Tape, Vector

__all__ = [
    "Combine",
    "Denoise",
    "DenoiserLike",
    "Differentiate",
    "Draw",
    "EagerPlan",
    "EagerTape",
    "Instruction",
    "NoiseSource",
    "Plan",
    "Progress",
    "Solution",
    "Tape",
    "Vector",
    "trace",
]
