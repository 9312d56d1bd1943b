"""The front door: from a model to pictures."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.denoisers import BaseDenoiser, ClassifierFree, Clipped
from fewstep.errors import InvalidInputError
from fewstep.models import Model
from fewstep.noise import Noise
from fewstep.plan import EagerPlan, Plan, Progress
from fewstep.process import Process
from fewstep.samplers import plan as make_plan
from fewstep.schedulers import Grid, make_grid
from fewstep.tuned import OPTION, plan_for

Numbers = int | Sequence[int] | np.ndarray | Tensor
"""One whole number, or several."""

BATCH_SIZE = 8
AUTO = "auto"
"""As sampler and scheduler: the plan tuned to the model where there is one for as many calls, else the usual ones."""

DEFAULT_SAMPLER, DEFAULT_SCHEDULER, DEFAULT_STEPS = AUTO, AUTO, 20
USUAL_SAMPLER, USUAL_SCHEDULER = "dpmpp_2m", "trailing"


@dataclass(frozen=True)
class Samples:
    """Pictures and how they were made.

    Attributes:
        images: Shape (n, C, H, W), nominally in [-1, 1], on the CPU.
        record: Everything needed to make them again; saved inside every PNG.
    """

    images: Tensor
    record: dict[str, Any]

    def uint8(self) -> Tensor:
        """The pictures as bytes, shape (n, C, H, W), 0..255."""
        from fewstep.data import to_uint8

        return to_uint8(self.images)

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write one picture of all images, or, for a path without a suffix, one file each into that folder.

        Returns:
            The files.

        Raises:
            DataError: If a file cannot be written; files that existed before survive.
        """
        from fewstep.data import image_grid, save_folder, save_image

        target = Path(path)
        if target.suffix and not os.fspath(path).endswith(("/", os.sep)):
            save_image(target, image_grid(self.images), self.record)
            return [target]
        return save_folder(target, self.images, [self.record_of(k) for k in range(len(self))])

    def __len__(self) -> int:
        return len(self.images)

    def record_of(self, k: int) -> dict[str, Any]:
        """The record of a single picture."""
        each = ("seeds", "labels", "network_calls", "rejected_steps")
        own = {
            name: [self.record[name][k]]
            for name in each
            if isinstance(self.record.get(name), list)
        }
        return {**self.record, **own}


def sample(
    model: BaseDenoiser,
    n: int | None = None,
    *,
    shape: Sequence[int] | None = None,
    sampler: str | Callable[..., Any] = DEFAULT_SAMPLER,
    scheduler: str | Callable[..., Grid] | Grid = DEFAULT_SCHEDULER,
    steps: int = DEFAULT_STEPS,
    seed: Numbers = 0,
    labels: Numbers | None = None,
    guidance: float = 1.0,
    clip: bool = False,
    sampler_options: Mapping[str, Any] | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
    plan: Plan | EagerPlan | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Samples:
    """Make pictures from noise.

    Args:
        model: A model from `fewstep.load`, any `fewstep.Denoiser`, a wrapper around one, or an exact denoiser.
            Conditions that it has already, one for each picture, are shared out with the pictures.
        n: How many; by default as many as there are seeds or labels, else 1.
        shape: Shape of one picture, (C, H, W); a loaded model knows its own. A shape (n, C, H, W) gives n as well.
        sampler: Name of a sampler, or a function `(tape, grid, **options)` of your own. "auto", with the scheduler
            "auto" too and neither options nor clipping: the plan tuned to the loaded model for exactly these steps and
            this guidance, if there is one. Otherwise "auto" is "dpmpp_2m".
        scheduler: Name of a scheduler, a function `(process, steps, **options)` of your own, or a `Grid`, which is run
            as given. "auto" without a tuned plan is "trailing".
        steps: Number of steps; not used with a Grid or a plan.
        seed: The first picture's seed, the next one's being one higher; or one seed for each picture. A picture
            depends on its own seed alone, not on the others or their order.
        labels: A class for all pictures, or one for each; None for none.
        guidance: Classifier-free guidance scale for models with labels; 1 is off.
        clip: Whether the estimates of x_0 are clipped to [-1, 1].
        sampler_options: Options of the sampler.
        scheduler_options: Options of the scheduler.
        plan: A ready Plan, in place of sampler, scheduler and steps.
        batch_size: Pictures that go through the network together; by default 8, fewer for pictures above 28x28. The
            last batch is filled up, because a network's rounding depends on the size of its batch: so a picture is
            the same to the bit alone and among others. A large number is faster for many pictures, 1 for one. With a
            sampler that chooses its steps by the data the default is 1, for a batch shares its steps.
        device: Where to compute; by default where the model is.
        on_step: Called after each network call of each batch.

    Returns:
        The pictures and their record.

    Raises:
        UnknownNameError: If a sampler, scheduler or option does not exist; names the nearest.
        InvalidInputError: If something is out of range or does not fit together.
        NonFiniteError: If the network's output is not finite.

    >>> import fewstep as fs
    >>> denoiser = fs.exact.GaussianMixture(torch.zeros(1, 2), 1.0, process=fs.process.vp_linear())
    >>> fs.sample(denoiser, n=4, steps=5).images.shape
    torch.Size([4, 2])
    """
    first_or_all = _whole("seed", seed)
    one_or_all = None if labels is None else _whole("labels", labels)
    n, shape = _count_and_shape(model, n, shape, seed=first_or_all, labels=one_or_all)
    seeds = (
        first_or_all if isinstance(first_or_all, list) else [first_or_all + k for k in range(n)]
    )
    classes = [one_or_all] * n if isinstance(one_or_all, int) else one_or_all
    _check_labels(model, classes)
    plan = choose_plan(
        model,
        sampler=sampler,
        scheduler=scheduler,
        steps=steps,
        guidance=guidance,
        clip=clip,
        sampler_options=sampler_options,
        scheduler_options=scheduler_options,
        plan=plan,
    )
    size = usual_batch_size(plan, shape) if batch_size is None else _one("batch_size", batch_size)
    where = _device(model, device)
    Noise(seeds, ())  # a seed that cannot be used is refused before any picture is made
    denoiser = _conditioned(model, classes, guidance, where)
    images, calls, rejected = [], [], []
    for rows, own in _batches(Clipped(denoiser) if clip else denoiser, n, size):
        noise = Noise([seeds[k] for k in rows], shape, where)
        x = plan.levels[0].sigma * noise.initial()
        wanted = len(set(rows))
        if isinstance(plan, EagerPlan):
            solution = plan.solve(own, x, noise, _first(wanted, on_step))
            calls += [solution.calls] * wanted
            rejected += [solution.rejected] * wanted
            images.append(solution.x[:wanted].cpu())
        else:
            images.append(plan.run(own, x, noise, _first(wanted, on_step))[:wanted].cpu())
    record = {
        "software": f"fewstep {version('fewstep')}",
        "model": model.name,
        **plan_record(plan),
        "network_calls": calls if isinstance(plan, EagerPlan) else plan.calls,
        "passes_per_call": denoiser.passes,
        "guidance": guidance,
        "clip": clip,
        "seeds": seeds,
        "labels": classes,
    }
    if isinstance(plan, EagerPlan):
        record["rejected_steps"] = rejected
    return Samples(torch.cat(images), _plain(record))


def choose_plan(
    model: BaseDenoiser,
    *,
    sampler: str | Callable[..., Any] = DEFAULT_SAMPLER,
    scheduler: str | Callable[..., Grid] | Grid = DEFAULT_SCHEDULER,
    steps: int = DEFAULT_STEPS,
    guidance: float = 1.0,
    clip: bool = False,
    sampler_options: Mapping[str, Any] | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
    plan: Plan | EagerPlan | None = None,
) -> Plan | EagerPlan:
    """Return the plan that `sample` runs with these arguments.

    Raises:
        InvalidInputError: Something does not fit together, or the plan does not fit the model.
    """
    options = dict(sampler_options or {}), dict(scheduler_options or {})
    if plan is None and not clip and not any(options) and (sampler, scheduler) == (AUTO, AUTO):
        plan = _tuned(model, _one("steps", steps), guidance)
    if plan is None:
        grid = _grid(
            USUAL_SCHEDULER if scheduler == AUTO else scheduler, model.process, steps, options[1]
        )
        plan = make_plan(USUAL_SAMPLER if sampler == AUTO else sampler, grid, **options[0])
    elif sampler_options or scheduler_options:
        raise InvalidInputError(
            "a ready plan has its options in it; leave sampler_options and scheduler_options out"
        )
    if plan.process != model.process:
        raise InvalidInputError(
            f"the plan is for {plan.process}, the model has {model.process}; make the plan for the model's"
        )
    return plan


def plan_record(plan: Plan | EagerPlan) -> dict[str, Any]:
    """Return what records say of a plan, as plain data."""
    record = {
        "sampler": plan.sampler,
        "sampler_options": plan.options,
        "scheduler": plan.scheduler,
        "scheduler_options": plan.scheduler_options,
        "steps": len(plan.levels) - 1,
        "times": [level.t for level in plan.levels],
        # The ratio of two float64 numbers may be off in its last digit.
        "sigma_over_alpha": [float(f"{level.ratio:.15g}") for level in plan.levels],
    }
    if (
        isinstance(plan, Plan) and OPTION in plan.options
    ):  # names and options do not make such a plan again
        record["plan"] = plan.to_dict()
    return _plain(record)


def usual_batch_size(plan: Plan | EagerPlan, shape: Sequence[int]) -> int:
    """Return how many pictures go through the network together by default.

    Eight of 28x28, or as many as hold that many pixels; 1 with a sampler that may choose its steps by the data.
    """
    if isinstance(plan, EagerPlan) and plan.adaptive:
        return 1
    pixels = math.prod(shape[1:])
    return max(1, min(BATCH_SIZE, BATCH_SIZE * 28 * 28 // pixels))


def _whole(name: str, value: Any) -> int | list[int]:
    """A whole number, or a list of them, from Python, NumPy or torch."""
    given = value.tolist() if hasattr(value, "tolist") else value
    try:
        return (
            [operator.index(v) for v in given]
            if isinstance(given, Iterable)
            else operator.index(given)
        )
    except TypeError as error:
        raise InvalidInputError(
            f"{name}={given!r} is neither a whole number nor a list of whole numbers"
        ) from error


def _one(name: str, value: Any) -> int:
    number = _whole(name, value)
    if isinstance(number, list) or number < 1:
        raise InvalidInputError(f"{name} must be a whole number >= 1, got {value!r}")
    return number


def _count_and_shape(
    model: BaseDenoiser, n: Any, shape: Any, **numbers: int | list[int] | None
) -> tuple[int, tuple[int, ...]]:
    own = model.shape
    if shape is None and own is None:
        raise InvalidInputError(
            "this denoiser does not know the shape of its pictures; give shape=(channels, height, width)"
        )
    full = own if shape is None else tuple(_one("shape", edge) for edge in shape)
    assert full is not None
    counts = {name: len(v) for name, v in numbers.items() if isinstance(v, list)}
    if n is not None:
        counts["n"] = _one("n", n)
    if len(full) == (4 if own is None else len(own) + 1):
        counts["shape"], full = full[0], full[1:]
    if own is not None and full != own:
        raise InvalidInputError(f"shape {full} does not fit a model of {own}; leave shape out")
    if len(set(counts.values())) > 1:
        asked = ", ".join(f"{name} asks for {count}" for name, count in counts.items())
        raise InvalidInputError(f"{asked} pictures; let them agree, or leave some of them out")
    count = next(iter(counts.values()), 1)
    return _one("the number of seeds or labels", count), full


def _check_labels(model: BaseDenoiser, classes: list[int] | None) -> None:
    known = model.num_classes
    if classes is None or known is None:
        return
    if known == 0:
        raise InvalidInputError("this model was trained without labels; leave labels out")
    if bad := [c for c in classes if not 0 <= c < known]:
        raise InvalidInputError(f"label {bad[0]} is not one of the model's classes 0..{known - 1}")


def _grid(
    scheduler: str | Callable[..., Grid] | Grid,
    process: Process,
    steps: Any,
    options: dict[str, Any],
) -> Grid:
    if isinstance(scheduler, Grid):
        if options:
            raise InvalidInputError("a Grid is run as given; leave scheduler_options out")
        return scheduler
    count = _one("steps", steps)
    if callable(scheduler):
        return scheduler(process, count, **options)
    return make_grid(scheduler, process, count, **options)


def _tuned(model: BaseDenoiser, steps: int, guidance: float) -> Plan | None:
    """The plan tuned to a model; a wrapper around one is another model."""
    return plan_for(model, steps, guidance) if isinstance(model, Model) else None


def _device(model: BaseDenoiser, device: torch.device | str | None) -> torch.device:
    own = model.device
    if device is None:
        return own or torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise InvalidInputError(f"device={device!r} does not exist: {error}") from error
    if own is None:
        return wanted
    if wanted.type != own.type or wanted.index not in (None, own.index):
        raise InvalidInputError(
            f"device={str(wanted)!r}, but the model is on {str(own)!r}; move it there first: "
            "fewstep.load(..., device=...), or network.to(...)"
        )
    return own


def _conditioned(
    model: BaseDenoiser, classes: list[int] | None, guidance: float, where: torch.device
) -> BaseDenoiser:
    if classes is None:
        if guidance != 1:
            raise InvalidInputError(
                f"guidance={guidance} needs labels to push towards; give labels, or guidance=1"
            )
        return model
    denoiser = model.with_conditions(labels=torch.tensor(classes, device=where))
    if guidance == 1:
        return denoiser
    if model.num_classes is None:
        raise InvalidInputError(
            "only a loaded model knows its null label; wrap this one in fewstep.ClassifierFree yourself"
        )
    return ClassifierFree(denoiser, guidance, null={"labels": model.num_classes})


def _batches(
    denoiser: BaseDenoiser, n: int, size: int
) -> Iterator[tuple[list[int], BaseDenoiser]]:
    """Numbers of the pictures in each batch, and the denoiser with their share of the conditions.

    Every batch has the same size: the last picture fills up the last one.
    """
    for first in range(0, n, size):
        rows = [min(k, n - 1) for k in range(first, first + size)]
        shares = {
            name: value[rows]
            for name, value in denoiser.conditions.items()
            if isinstance(value, Tensor) and value.ndim and len(value) == n
        }
        yield rows, denoiser.with_conditions(**shares)


def _first(
    count: int, on_step: Callable[[Progress], None] | None
) -> Callable[[Progress], None] | None:
    """The callback without the pictures that only fill up a batch."""
    if on_step is None:
        return None
    return lambda p: on_step(replace(p, x=p.x[:count], denoised=p.denoised[:count]))


def _plain(value: Any) -> Any:
    """The value as JSON can hold it; an infinity becomes text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(v) for name, v in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    finite = isinstance(value, bool | int | str) or (
        isinstance(value, float) and math.isfinite(value)
    )
    return value if value is None or finite else str(value)
