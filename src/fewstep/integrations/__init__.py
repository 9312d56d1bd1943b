"""Fewstep beside other programs: their checkpoints as our models, our models and plans in their form."""

from fewstep.integrations.found import NullClass, Weights
from fewstep.integrations.importing import import_checkpoint, import_process
from fewstep.integrations.pipeline import export_pipeline
from fewstep.integrations.sigmas import Program, export_sigmas

__all__ = [
    "NullClass",
    "Program",
    "Weights",
    "export_pipeline",
    "export_sigmas",
    "import_checkpoint",
    "import_process",
]
