"""Making many pictures: every one a function of its number."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.bulk.formats import FORMATS, Content
from fewstep.bulk.shards import Shards
from fewstep.checkpoints import only_writer
from fewstep.denoisers import BaseDenoiser
from fewstep.errors import InvalidInputError, unknown_name
from fewstep.models import Model
from fewstep.plan import EagerPlan, Plan
from fewstep.sampling import (
    DEFAULT_SAMPLER,
    DEFAULT_SCHEDULER,
    DEFAULT_STEPS,
    choose_plan,
    plan_record,
    sample,
    usual_batch_size,
)
from fewstep.schedulers import Grid
from fewstep.team import Team

TURNS = "turns"
"""As labels: the classes take turns."""


def sample_many(
    model: BaseDenoiser,
    n: int,
    folder: str | os.PathLike[str],
    *,
    shard_size: int = 1000,
    format: str = "npz",
    seed: int = 0,
    labels: int | Sequence[int] | str | None = TURNS,
    sampler: str | Callable[..., Any] = DEFAULT_SAMPLER,
    scheduler: str | Callable[..., Grid] | Grid = DEFAULT_SCHEDULER,
    steps: int = DEFAULT_STEPS,
    guidance: float = 1.0,
    clip: bool = False,
    sampler_options: Mapping[str, Any] | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
    plan: Plan | EagerPlan | None = None,
    batch_size: int | None = None,
    team: Team | None = None,
    on_batch: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Shards:
    """Make pictures 0 to n - 1 into a folder of shards, or go on with what the folder holds.

    Picture k has the seed ``seed + k`` and a label that follows from k, so the files are the same to the byte however
    the work is shared out, and however often it is broken off. Shard j is made by the worker ``j mod workers``; a shard
    appears under its name once it is complete, and what is there is not made again. A larger n extends the folder.

    Args:
        model: A model from `fewstep.load`, or any denoiser that knows the shape of its pictures.
        n: Number of pictures, at least 1.
        folder: Gets ``shards.json`` and the shards ``00000``, ``00001``, ...
        shard_size: Pictures in a shard.
        format: ``"npz"``; ``"tar"``, the layout of WebDataset; or ``"png"``, a sub-folder of single files.
        seed: Seed of picture 0.
        labels: A class for all; a list whose entries take turns; "turns": the classes of the model do; None: no labels.
        sampler: See `fewstep.sample`, also for what follows.
        scheduler: Likewise.
        steps: Likewise.
        guidance: Likewise.
        clip: Likewise.
        sampler_options: Likewise.
        scheduler_options: Likewise.
        plan: Likewise.
        batch_size: Pictures that go through the network together. Part of the settings, since a batch of another size
            rounds differently.
        team: Which worker of how many this is; None: as the launcher says, see `fewstep.team`.
        on_batch: Called after each batch with the number of pictures in it.
        stop: Asked after each batch; once it says True, the shard at hand is given up and the call returns.

    Returns:
        The folder; ``list(shards.missing())`` is empty once it is complete.

    Raises:
        InvalidInputError: An argument is out of range, or the folder is for something else.
        DataError: A file cannot be written; complete shards are kept.
        CheckpointError: Another run is writing to the folder.

    >>> import tempfile
    >>> import fewstep as fs
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     shards = sample_many(fs.load("digits"), 3, folder, steps=1, shard_size=2)
    ...     len(shards), list(shards.missing()), shards.path(1).name
    (2, [], '00001.npz')
    """
    team = team or Team.launched()
    made = choose_plan(
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
    shape = _image_shape(model)
    for name, value in (("n", n), ("shard_size", shard_size), ("batch_size", batch_size or 1)):
        if not isinstance(value, int) or value < 1:
            raise InvalidInputError(f"{name} must be a whole number >= 1, got {value!r}")
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if isinstance(made, EagerPlan) and made.adaptive and batch_size not in (None, 1):
        raise InvalidInputError(
            f"batch_size = {batch_size}, but {made.sampler} may choose its steps by the data, which a batch shares; "
            "leave batch_size out, so that a picture does not depend on its neighbours"
        )
    size = batch_size or usual_batch_size(made, shape)
    turns = _turns(model, labels)
    settings = {
        "software": f"fewstep {version('fewstep')}",
        "model": {"name": model.name, "digest": _digest_of(model)},
        "plan": {**plan_record(made), "digest": _digest_of_plan(made)},
        "seed": seed,
        "labels": turns,
        "guidance": guidance,
        "clip": clip,
        "shape": list(shape),
        "shard_size": shard_size,
        "format": format,
        "batch_size": size,
        "device": model.device.type if model.device else "cpu",
    }
    shards = Shards(Path(folder), n, settings)

    def pictures(numbers: range) -> Content | None:
        images, records, rows = [], [], list(numbers)
        for first in range(0, len(rows), size):
            own = rows[first : first + size]
            samples = sample(
                model,
                seed=[seed + k for k in own],
                labels=[turns[k % len(turns)] for k in own] if turns else None,
                guidance=guidance,
                clip=clip,
                plan=made,
                batch_size=size,
                device=model.device,
            )
            images.append(samples.uint8())
            records += [samples.record_of(k) for k in range(len(own))]
            if on_batch is not None:
                on_batch(len(own))
            if stop():
                return None
        return Content(
            numbers,
            torch.cat(images),
            [seed + k for k in rows],
            [turns[k % len(turns)] for k in rows] if turns else None,
            getattr(model, "class_names", ()),
            records,
        )

    with only_writer(shards.folder) if team.is_main else nullcontext():
        shards.open()
        for shard in range(team.rank, len(shards), team.size):
            if shards.holds(shard):
                continue
            content = None if stop() else pictures(shards.numbers(shard))
            if content is None:
                break
            shards.write(shard, content)
    return shards


def _image_shape(model: BaseDenoiser) -> tuple[int, ...]:
    shape = model.shape
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        raise InvalidInputError(
            f"shards hold pictures of 1 or 3 channels, but this model makes {shape or 'an unknown shape'}; "
            "use fewstep.sample"
        )
    return tuple(shape)


def _turns(model: BaseDenoiser, labels: int | Sequence[int] | str | None) -> list[int] | None:
    """The labels of the first pictures, after which they begin anew."""
    if labels == TURNS:
        return list(range(model.num_classes or 0)) or None
    if labels is None:
        return None
    if isinstance(labels, int):
        return [labels]
    try:
        turns = [int(label) for label in labels]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"labels = {labels!r} is neither a class, a list of classes, 'turns' nor None"
        ) from error
    if not turns:
        raise InvalidInputError("labels is an empty list; give at least one, or None for none")
    return turns


def _digest_of(model: BaseDenoiser) -> str | None:
    """A digest of a network's weights, for a model of the same name may have been trained further."""
    if not isinstance(model, Model) or not isinstance(model.network, nn.Module):
        return None
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.network.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest_of_plan(plan: Plan | EagerPlan) -> str | None:
    """A digest of a table, which may be another under the same names; None for a plan that is none."""
    if isinstance(plan, EagerPlan):
        return None
    text = json.dumps(plan.to_dict(), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
