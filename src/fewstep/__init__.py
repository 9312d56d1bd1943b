"""Fewstep: train diffusion models, and sample them in as few network calls as the mathematics allows.

>>> import fewstep as fs
>>> grid = fs.schedulers.karras(fs.process.vp_linear(), steps=10)
>>> print(fs.plan("dpmpp_2m", grid))
dpmpp_2m/karras-10: 10 network calls, 0 noise draws
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewstep import denoisers, errors, process, samplers, schedulers
from fewstep.denoisers import (
    AutoGuided,
    ClassifierFree,
    Clipped,
    Denoiser,
    DynamicThreshold,
    Projection,
    exact,
)
from fewstep.errors import FewstepError
from fewstep.noise import Noise
from fewstep.plan import Plan, Progress, Tape, Vector
from fewstep.process import Level, Process
from fewstep.samplers import plan
from fewstep.schedulers import Grid

if TYPE_CHECKING:
    __version__: str
    from fewstep import data, integrations, metrics, networks, testing, training
    from fewstep.bulk import sample_many
    from fewstep.models import Model, load
    from fewstep.sampling import Samples, sample
    from fewstep.tuning import Tuning, tune

_LATER = {
    "Model": "models",
    "load": "models",
    "Samples": "sampling",
    "sample": "sampling",
    "sample_many": "bulk",
    "Tuning": "tuning",
    "tune": "tuning",
    "data": "",
    "integrations": "",
    "metrics": "",
    "networks": "",
    "testing": "",
    "training": "",
}
"""Names that are imported when they are first used, so that `import fewstep` stays light."""

__all__ = [
    "AutoGuided",
    "ClassifierFree",
    "Clipped",
    "Denoiser",
    "DynamicThreshold",
    "FewstepError",
    "Grid",
    "Level",
    "Model",
    "Noise",
    "Plan",
    "Process",
    "Progress",
    "Projection",
    "Samples",
    "Tape",
    "Tuning",
    "Vector",
    "data",
    "denoisers",
    "errors",
    "exact",
    "integrations",
    "load",
    "metrics",
    "networks",
    "plan",
    "process",
    "sample",
    "sample_many",
    "samplers",
    "schedulers",
    "testing",
    "training",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # the package's metadata take a while to read
        from importlib.metadata import version

        return version("fewstep")
    if name not in _LATER:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    if not _LATER[name]:
        return import_module(f"fewstep.{name}")
    return getattr(import_module(f"fewstep.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return __all__
