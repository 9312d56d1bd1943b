"""Denoisers: networks as estimators of x_0, and wrappers that are denoisers again."""

from fewstep.denoisers.denoiser import Denoiser, Wrapper
from fewstep.denoisers.exact import Dataset, GaussianMixture
from fewstep.denoisers.guidance import AutoGuided, ClassifierFree, Guided, Projection
from fewstep.denoisers.limits import Clipped, DynamicThreshold
from fewstep.denoisers.parameterisation import SKIP_OUT, Parameterisation, training_target

__all__ = [
    "SKIP_OUT",
    "AutoGuided",
    "ClassifierFree",
    "Clipped",
    "Dataset",
    "Denoiser",
    "DynamicThreshold",
    "GaussianMixture",
    "Guided",
    "Parameterisation",
    "Projection",
    "Wrapper",
    "training_target",
]
