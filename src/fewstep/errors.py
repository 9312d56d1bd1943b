"""Everything Fewstep raises on purpose: each message names the value, what is allowed, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FewstepError(Exception):
    """Base of all errors that Fewstep raises on purpose; the command line prints it in one line."""


class InvalidInputError(FewstepError, ValueError):
    """An argument is outside what is allowed."""


class UnknownNameError(InvalidInputError, LookupError):
    """A sampler, scheduler, model, preset or option of that name does not exist."""


class NonFiniteError(FewstepError, ArithmeticError):
    """A NaN or an infinity appeared; names the component, the network call and the noise level."""


class CallLimitError(FewstepError, RuntimeError):
    """An adaptive sampler did not arrive within the network calls that it was allowed."""


class DataError(InvalidInputError):
    """Images, labels or a data source that cannot be used."""


class CheckpointError(FewstepError, OSError):
    """A checkpoint that cannot be read or written."""


class MemoryLimitError(FewstepError, MemoryError):
    """A batch needs more memory than there is; says which batch would fit."""


class WorkerError(FewstepError, RuntimeError):
    """A run on several workers cannot go on, because another worker has ended or failed."""


class CheckFailedError(FewstepError, AssertionError):
    """A conformance check of `fewstep.testing` found a fault."""


def unknown_name(
    kind: str, name: object, known: Iterable[str], hint: str = ""
) -> UnknownNameError:
    """Build the error for a name that does not exist, with the nearest names and all legal ones.

    Args:
        kind: What is being looked up, such as ``"sampler"``.
        name: The value that was given.
        known: Every legal name.
        hint: The remedy, such as a command that lists the names.

    >>> print(unknown_name("sampler", "dimm", ["ddim", "ddpm", "euler"]))
    unknown sampler 'dimm'; did you mean 'ddim', 'ddpm'? Known: ddim, ddpm, euler
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name).lower(), names, n=3, cutoff=0.5)
    guess = f"; did you mean {', '.join(repr(n) for n in near)}?" if near else ";"
    message = f"unknown {kind} {str(name)!r}{guess} Known: {', '.join(names) or 'none'}"
    return UnknownNameError(f"{message}. {hint}" if hint else message)


def no_guidance(name: str) -> InvalidInputError:
    """Build the error for a denoiser that has no second, weaker estimate."""
    return InvalidInputError(
        f"this sampler follows the guided and the unguided estimate at once, but {name} is not guided; wrap it in "
        "fewstep.ClassifierFree, or give labels and a guidance other than 1"
    )


def no_learned_variance(name: str) -> InvalidInputError:
    """Build the error for a denoiser whose network gives no variance."""
    return InvalidInputError(
        f"this sampler draws with the variance that a network has learnt, but {name} gives none; "
        "train with --learned-variance, or take the sampler ddpm"
    )


def not_differentiable(name: str, why: str) -> InvalidInputError:
    """Build the error for a denoiser whose estimate has no derivative."""
    return InvalidInputError(
        f"this sampler needs the derivative of the estimate, but {name} cannot be differentiated ({why}); "
        "take a sampler that does without, such as dpmpp_2m"
    )
