"""Denoisers: networks as estimators of x_0, and wrappers that are denoisers again."""

from fewstep.denoisers.base import BaseDenoiser, Wrapper
from fewstep.denoisers.denoiser import Denoiser
from fewstep.denoisers.exact import Dataset, GaussianMixture
from fewstep.denoisers.guidance import AutoGuided, ClassifierFree, Guided, Projection
from fewstep.denoisers.limits import Clipped, DynamicThreshold
from fewstep.denoisers.parameterisation import (
    TARGETS,
    Parameterisation,
    training_target,
    variance_share,
)

__all__ = [
    "TARGETS",
    "AutoGuided",
    "BaseDenoiser",
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
    "variance_share",
]
