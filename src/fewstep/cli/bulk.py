"""The part of `fewstep sample` that fills a folder: progress, stopping, and what is said at the end."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from fewstep.bulk import Shards, sample_many
from fewstep.cli.launched import (
    INTERRUPTED,
    PLAIN_LINE_SECONDS,
    Seldom,
    clock,
    main_speaks,
    stop_on_signal,
)
from fewstep.models import Model
from fewstep.team import Team
from fewstep.tuned import OPTION


def fill_folder(
    model: Model,
    n: int,
    folder: Path,
    shard_size: int,
    format: str,
    how: Mapping[str, Any],
    team: Team,
) -> None:
    """Make images into a folder, tell how it goes on, and say at the end what there is."""
    with stop_on_signal(team, "this batch") as stopping, main_speaks(team):
        with _progress(n, team) as on_batch:
            shards = sample_many(
                model,
                n,
                folder,
                shard_size=shard_size,
                format=format,
                team=team,
                on_batch=on_batch,
                stop=stopping,
                **how,
            )
        missing = list(shards.missing())
        own = [shard for shard in missing if shard % team.size == team.rank]
        if own:
            typer.echo(
                f"Stopped; {len(shards) - len(missing)} of {len(shards)} shards are complete. To go on, give the same "
                f"command again, on any number of workers:\n  {shlex.join(['fewstep', *sys.argv[1:]])}"
            )
        elif missing:
            typer.echo(
                f"The shards of this worker are complete; {len(missing)} of the others' are not yet"
            )
    if own:
        raise typer.Exit(INTERRUPTED)
    if not missing:
        typer.echo(_summary(shards))


def means(record: Mapping[str, Any]) -> str:
    """What images were made with."""
    purpose = record["sampler_options"].get(OPTION)
    if isinstance(purpose, dict) and "model" in purpose:
        return f"the plan tuned for {purpose['model']}"
    return f"{record['sampler']}/{record['scheduler']}"


def _summary(shards: Shards) -> str:
    count = len(shards)
    where = (
        str(shards.path(0)) if count == 1 else f"{shards.path(0)} .. {shards.path(count - 1).name}"
    )
    return f"{shards.n} images with {means(shards.settings['plan'])}: {where}"


@contextmanager
def _progress(n: int, team: Team) -> Iterator[Callable[[int], None]]:
    """Images per second and time left, as a bar on a terminal and as a plain line now and then elsewhere.

    What others do is not seen, so the main worker speaks of its own share.
    """
    whose = "" if team.size == 1 else f" by each of {team.size} workers"
    total, start, done = -(-n // team.size), time.monotonic(), 0

    def text() -> str:
        rate = done / max(time.monotonic() - start, 1e-9)
        left = clock(max(0, total - done) / max(rate, 1e-9))
        return f"{rate:.1f} images/s{whose}  at most {left} left"

    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("images"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task("", total=total, facts="")

            def show(count: int) -> None:
                nonlocal done
                done += count
                bar.update(task, completed=done, facts=text())

            yield show
        return
    due = Seldom(PLAIN_LINE_SECONDS)

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if due():
            print(f"{done}/{total} images  {text()}", flush=True)

    yield tell
