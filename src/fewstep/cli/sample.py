"""`fewstep sample`: pictures from a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fewstep.bulk import TURNS
from fewstep.cli.bulk import fill_folder, means
from fewstep.errors import InvalidInputError
from fewstep.models import Model, load
from fewstep.plan import Plan
from fewstep.sampling import (
    DEFAULT_SAMPLER,
    DEFAULT_SCHEDULER,
    DEFAULT_STEPS,
    USUAL_SAMPLER,
    USUAL_SCHEDULER,
)
from fewstep.sampling import sample as make
from fewstep.schedulers import Grid
from fewstep.team import Team
from fewstep.tuned import mismatches


def sample(
    model: Annotated[
        str,
        typer.Argument(help="A bundled model such as digits, a model folder, or a training run."),
    ],
    out: Annotated[
        str,
        typer.Option(
            help="A picture of all images (.png keeps the settings), or a folder, which gets shards of them and can "
            "be gone on with."
        ),
    ] = "samples.png",
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            "--images",
            min=1,
            help="Number of images; torchrun takes the first form for its own.",
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="A class for all images, or one for each: 7, or 0,1,2; names work too. In a folder a list takes "
            "turns, as all classes do without it; none: no labels."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps.")] = DEFAULT_STEPS,
    sampler: Annotated[
        str,
        typer.Option(
            help="See: fewstep samplers. auto: the plan tuned to the model for these steps and this guidance, if "
            f"--scheduler is auto too and there is one (fewstep info MODEL lists them); else {USUAL_SAMPLER}."
        ),
    ] = DEFAULT_SAMPLER,
    scheduler: Annotated[
        str,
        typer.Option(
            help=f"See: fewstep schedulers. auto: that of the tuned plan, else {USUAL_SCHEDULER}."
        ),
    ] = DEFAULT_SCHEDULER,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first image; the next one has the next.")
    ] = 0,
    guidance: Annotated[
        float, typer.Option(help="Classifier-free guidance scale; 1 is off.")
    ] = 1.0,
    clip: Annotated[
        bool, typer.Option("--clip", help="Clip the estimates of x_0 to the image range.")
    ] = False,
    sampler_option: Annotated[
        list[str] | None,
        typer.Option(help="Option of the sampler as name=value; may be given again."),
    ] = None,
    scheduler_option: Annotated[
        list[str] | None,
        typer.Option(help="Option of the scheduler as name=value; may be given again."),
    ] = None,
    sigmas: Annotated[
        str | None,
        typer.Option(help="Falling sigma/alpha values, run as given: 14.6,3.9,1.2,0.3,0"),
    ] = None,
    times: Annotated[
        str | None, typer.Option(help="Falling times, then clean data: 999,700,400,100")
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(help="A file with a plan, as fewstep tune writes it, in place of --sampler."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images that go through the network together; by default 8 of 28x28."
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="ema (averaged); of training runs also raw, or a further average: ema-0.9999."
        ),
    ] = "ema",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps...")] = "cpu",
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images in a shard of a folder; by default 1000."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="Shards of a folder: npz (default), tar (WebDataset), or png (a sub-folder of single files)."
        ),
    ] = None,
) -> None:
    """Make images from noise."""
    team = Team.launched()
    into_folder = _is_folder(out)
    if not into_folder and (shard_size is not None or format is not None or team.size > 1):
        raise InvalidInputError(
            f"--out {out} is a single picture; --shard-size, --format and several workers need a folder, such as "
            "--out shards/"
        )
    trained = load(model, device=team.device(device) or device, weights=weights)
    labels = _labels(trained, label)
    grid = _grid(trained, sigmas, times)
    ready = None
    if plan is not None:
        usual = (DEFAULT_SAMPLER, DEFAULT_SCHEDULER, DEFAULT_STEPS)
        if grid is not None or (sampler, scheduler, steps) != usual:
            raise InvalidInputError(
                "--plan holds sampler and levels; leave --sampler, --scheduler, --steps, --sigmas and --times out"
            )
        ready = Plan.from_json(plan)
        for mismatch in mismatches(ready, trained.name, guidance):
            typer.echo(f"Warning: {mismatch}", err=True)
    how = {
        "sampler": sampler,
        "scheduler": grid or scheduler,
        "steps": steps,
        "seed": seed,
        "guidance": guidance,
        "clip": clip,
        "sampler_options": _options(sampler_option),
        "scheduler_options": _options(scheduler_option),
        "plan": ready,
        "batch_size": batch_size,
    }
    if into_folder:
        if n is None:
            n = len(labels) if isinstance(labels, list) else 1
        how["labels"] = TURNS if label is None else labels
        fill_folder(trained, n, Path(out), shard_size or 1000, format or "npz", how, team)
        return
    with calls_bar() as on_step:
        samples = make(trained, n, labels=labels, on_step=on_step, **how)
    files = samples.save(out)
    record = samples.record
    typer.echo(
        f"{len(samples)} images with {means(record)}, {_calls(record)} network calls each: {files[0]}"
    )


def _is_folder(out: str) -> bool:
    return out.endswith(("/", os.sep)) or not Path(out).suffix or Path(out).is_dir()


@contextmanager
def calls_bar() -> Any:
    """A progress bar over network calls, as an `on_step` callback; nothing where the output is no terminal."""
    columns = TextColumn("network calls"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda step: bar.update(task, completed=step.call, total=step.calls or None)


def _calls(record: dict[str, Any]) -> str:
    """How many calls a picture took; a sampler that chooses its steps by the data may take more for some."""
    counts = record["network_calls"]
    if isinstance(counts, int):
        return str(counts)
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _labels(model: Model, text: str | None) -> int | list[int] | None:
    if text is None or text == "none":
        return None
    names = {name: k for k, name in enumerate(model.class_names)}
    labels = [
        names[word] if word in names else _number(word, "label", int) for word in text.split(",")
    ]
    return labels if len(labels) > 1 else labels[0]


def _grid(model: Model, sigmas: str | None, times: str | None) -> Grid | None:
    if sigmas and times:
        raise InvalidInputError("give either --sigmas or --times, not both")
    if sigmas:
        return Grid.from_ratios(
            model.process, [_number(v, "sigma", float) for v in sigmas.split(",")]
        )
    if times:
        return Grid.from_times(
            model.process, [_number(v, "time", float) for v in times.split(",")]
        )
    return None


def _number(text: str, what: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text.strip())
    except ValueError:
        raise InvalidInputError(
            f"{what} {text.strip()!r} is not a number; write a list like 1,2,3"
        ) from None


def _options(pairs: list[str] | None) -> dict[str, str]:
    options = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator:
            raise InvalidInputError(f"option {pair!r} has no value; write name=value")
        options[name.strip()] = value.strip()
    return options
