"""Fewstep beside other programs: what it found out, in the form that they take."""

from fewstep.integrations.sigmas import Program, export_sigmas

__all__ = ["Program", "export_sigmas"]
