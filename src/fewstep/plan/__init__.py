"""Plans: samplers as coefficient tables, the tape that traces them and the executor that runs them."""

from fewstep.plan.executor import DenoiserLike, NoiseSource, Progress
from fewstep.plan.instructions import Combine, Denoise, Draw, Instruction
from fewstep.plan.plan import Plan, trace
from fewstep.plan.tape import Tape, Vector

__all__ = [
    "Combine",
    "Denoise",
    "DenoiserLike",
    "Draw",
    "Instruction",
    "NoiseSource",
    "Plan",
    "Progress",
    "Tape",
    "Vector",
    "trace",
]
