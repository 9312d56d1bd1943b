"""What can be said of the runs below a folder, from their files alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.checkpoints import has_writer, load_json
from fewstep.errors import CheckpointError
from fewstep.models import CONFIG_FILE, checkpoints_of
from fewstep.training.log import Log
from fewstep.training.trainer import LOG_FILE, SAMPLES, SETTINGS_FILE


@dataclass(frozen=True)
class RunSummary:
    """A run as its folder tells it; None where it says nothing.

    Args:
        name: The folder, relative to where it was looked for.
        state: ``"complete"``, ``"running"`` (a living process holds it), ``"stopped"``, or ``"unreadable"``.
        step: Steps done; those of the newest checkpoint, or of the log while it is running.
        steps: Steps in all.
        loss: Last logged loss.
        error_unseen: Last logged error on held-out images.
        distance: Last measured distance of samples to data.
        images_per_second: Last logged rate.
        seconds: Time spent on training up to the newest checkpoint.
        written: When the log or a checkpoint was last written, seconds since 1970.
        data: Where the images came from.
        network: Preset of the network.
        sheet: The newest sheet of samples.
    """

    name: str
    state: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    error_unseen: float | None = None
    distance: float | None = None
    images_per_second: float | None = None
    seconds: float | None = None
    written: float | None = None
    data: str | None = None
    network: str | None = None
    sheet: str | None = None


def find_runs(folder: Path) -> list[RunSummary]:
    """Return the runs at or below a folder, by name; folders without a run, and hidden ones, are passed over."""
    return [_summary(run, folder) for run in sorted(_run_folders(folder))]


def _run_folders(folder: Path) -> Iterator[Path]:
    for place, below, files in os.walk(folder):
        if SETTINGS_FILE in files:
            below.clear()  # no run lies within another
            yield Path(place)
        below[:] = [name for name in below if not name.startswith(".")]


def _summary(run: Path, root: Path) -> RunSummary:
    name = run.relative_to(root).as_posix() if run != root else run.resolve().name
    settings = _read(run / SETTINGS_FILE)
    if not isinstance(settings.get("settings"), dict):
        return RunSummary(name, "unreadable")
    config, data = settings["settings"], settings.get("data")
    saved = _newest_record(run)
    last: dict[str, Any] = {}
    for entry in _entries(run):
        last.update(entry)
    done, steps = _whole(saved.get("step")), _whole(config.get("steps"))
    state = "stopped"
    if has_writer(run):
        state, done = "running", max(done or 0, _whole(last.get("step")) or 0)
    elif done is not None and steps is not None and done >= steps:
        state = "complete"
    return RunSummary(
        name=name,
        state=state,
        step=done or 0,
        steps=steps,
        loss=_number(last.get("loss")),
        error_unseen=_number(last.get("error_unseen")),
        distance=_number(last.get("distance")),
        images_per_second=_number(last.get("images_per_second")),
        seconds=_number(saved.get("seconds")),
        written=max(map(_written, (run / SETTINGS_FILE, run / LOG_FILE, *checkpoints_of(run)))),
        data=str(data["source"]) if isinstance(data, dict) and "source" in data else None,
        network=str(config["network"]) if "network" in config else None,
        sheet=next(
            (str(path) for path in sorted((run / SAMPLES).glob("*.png"), reverse=True)), None
        ),
    )


def _entries(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of the log; none if it cannot be read."""
    with suppress(CheckpointError):
        yield from Log(run / LOG_FILE).entries()


def _newest_record(run: Path) -> dict[str, Any]:
    """What the newest readable checkpoint says of its training."""
    for path in reversed(checkpoints_of(run)):
        record = _read(path / CONFIG_FILE).get("training")
        if isinstance(record, dict):
            return record
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return load_json(path)
    except CheckpointError:
        return {}


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None
