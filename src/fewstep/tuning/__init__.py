"""Plans tuned to a model: where to call the network and how to mix its answers, for as few calls as possible."""

from fewstep.tuning.losses import features, pixels, pseudo_huber
from fewstep.tuning.tuner import Stage, Tuning, tune

__all__ = ["Stage", "Tuning", "features", "pixels", "pseudo_huber", "tune"]
