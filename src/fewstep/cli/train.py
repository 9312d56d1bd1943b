"""`fewstep train`: from images to a model."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from fewstep.cli.folders import for_a_run
from fewstep.cli.launched import (
    INTERRUPTED,
    PLAIN_LINE_SECONDS,
    Seldom,
    clock,
    main_speaks,
    stop_on_signal,
)
from fewstep.cli.loading import progress_lines, report_skipped
from fewstep.cli.reading import json_object
from fewstep.team import Team, leave
from fewstep.training.config import TrainingConfig
from fewstep.training.settings import settings_of

if TYPE_CHECKING:
    from fewstep.data import ImageSet
    from fewstep.training import Step, Trainer

OVERFIT_STEPS = 200
OVERFIT_FALL = 0.5

JSON_SETTINGS = {
    "network_options": "{}",
    "process": "vp_linear",
    "times": "uniform",
    "weight": "simple",
}
"""Settings that are typed as JSON, with their defaults; where the default is a name, a name will do."""


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every setting of a training run, made from what the setting says of itself."""
    kinds, settings = get_type_hints(TrainingConfig), settings_of(TrainingConfig)
    parameters = []
    for field in dataclasses.fields(TrainingConfig):
        setting, kind, default = settings[field.name], kinds[field.name], field.default
        if field.name in JSON_SETTINGS:
            kind, default = str, JSON_SETTINGS[field.name]
        if kind == tuple[float, ...]:  # an option that may be given several times
            kind, default = list[float], []
        if default is dataclasses.MISSING:
            declared = typer.Argument(help=setting.help)
            default = inspect.Parameter.empty
        else:
            # One flag for a bool that is off by default; a value for everything else.
            flags = [_flag(field.name)] if default is False else []
            declared = typer.Option(*flags, help=setting.help, rich_help_panel=setting.group)
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind, declared],
            )
        )
    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.kind != p.VAR_KEYWORD
    ]
    command.__signature__ = inspect.Signature([*parameters, *own])  # pyright: ignore[reportFunctionMemberAccess]
    return command


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@_with_settings
def train(
    *,
    out: Annotated[
        Path, typer.Option(help="Folder of the run. If it holds a run, that run goes on.")
    ] = Path("runs/mine"),
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, ...; by default CUDA if there is any."),
    ] = None,
    overfit: Annotated[
        bool,
        typer.Option(
            "--overfit",
            help="Only try whether the loss falls on a single batch: at most "
            f"{OVERFIT_STEPS} steps, nothing is saved.",
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Go on with a run although its settings or images were others."
        ),
    ] = False,
    **settings: Any,
) -> None:
    """Train a model on images. Started again on the same folder, it goes on where it was."""
    config = TrainingConfig(**_read_settings(settings))
    with main_speaks(Team.launched()):
        interrupted = _train(config, out, device, overfit, force)
    leave()
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _train(
    config: TrainingConfig, out: Path, device: str | None, overfit: bool, force: bool
) -> bool:
    """Train and tell of it; say whether it was interrupted."""
    from fewstep.training import Trainer

    for_a_run(out, config.data)
    trainer = Trainer(
        config,
        out,
        device=device,
        resume=not overfit,
        force=force,
        on_progress=progress_lines(),
    )
    _introduce(trainer)
    report_skipped(trainer.images, out if trainer.group.is_main and not overfit else None)
    if overfit:
        _try_one_batch(trainer, min(config.steps, OVERFIT_STEPS))
        return False
    if trainer.is_complete:
        typer.echo(
            f"All {trainer.state.step} steps are done already; give more --steps to go on. The model: {out}"
        )
        return False
    with stop_on_signal(trainer.group, "this step") as stopping:
        for fact in _with_progress(trainer.steps(stopping), trainer):
            _report(fact, trainer)
    if not trainer.is_complete:
        again = (
            "give the same command again"
            if trainer.group.size == 1
            else "launch it again, on any number of workers"
        )
        typer.echo(
            f"Stopped after step {trainer.state.step}; a checkpoint is saved. To go on, {again}:\n"
            f"  {shlex.join(['fewstep', *sys.argv[1:]])}"
        )
        return True
    typer.echo(f"Done. Try: fewstep sample {out} --out grid.png")
    return False


def _read_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn what was typed into what the settings take."""
    return {
        **options,
        **{
            name: json_object(_flag(name), options[name])
            if "{" in options[name] + default  # where the default is a name, a name will do
            else {"name": options[name]}
            for name, default in JSON_SETTINGS.items()
        },
    }


def _introduce(trainer: Trainer) -> None:
    images, state = trainer.images, trainer.state
    channels, height, width = images.shape
    parameters = sum(p.numel() for p in state.network.parameters())
    typer.echo(
        f"{len(images)} images of {width}x{height}, {channels} channel{'s' if channels > 1 else ''}, "
        f"{images.num_classes or 'no'} classes{_captions(images)}; network of {parameters:,} parameters "
        f"on {trainer.device}, {trainer.precision}"
        + (f", {trainer.group.size} workers" if trainer.group.size > 1 else "")
    )
    if len(trainer.held_out_rows):
        typer.echo(f"{len(trainer.held_out_rows)} of the images are kept from training")
    for finding in trainer.findings:
        typer.echo(f"Warning: {finding.message}", err=True)
    for change in trainer.changes:
        typer.echo(f"Changed: {change}")
    if state.step and not trainer.is_complete:
        typer.echo(f"Going on after step {state.step} of {trainer.config.steps}")


def _captions(images: ImageSet) -> str:
    count = sum(caption is not None for caption in images.captions)
    return f", {count} captions (not used in training)" if count else ""


def _report(fact: Step, trainer: Trainer) -> None:
    """Say what was skipped, measured and written, and whether pictures can be expected to show anything yet."""
    if fact.skipped:
        typer.echo(
            f"step {fact.step}: {fact.skipped} steps were skipped, their loss or gradient being NaN or infinite; "
            f"the learning rate is at {trainer.state.guard.factor:g} of its plan"
        )
    if fact.measurement is not None:
        measured = fact.measurement
        typer.echo(
            f"step {fact.step}: distance {measured.distance:.4g} in {measured.features} features, of "
            f"{measured.samples} samples to {measured.reference} (data themselves: {measured.floor:.4g})"
        )
    if fact.preview is None:
        return
    typer.echo(f"step {fact.step}: samples in {fact.preview}")
    if fact.held_out is not None:
        typer.echo(
            f"  Error in the noise: {fact.held_out.unseen:.4f} on images kept from training, "
            f"{fact.held_out.seen:.4f} on others"
        )
    if fact.loss > trainer.pixelwise_loss:
        typer.echo(
            f"  They are still expected to be noise: the loss, {fact.loss:.4f}, is above "
            f"{trainer.pixelwise_loss:.4f}, which needs no more than each pixel's mean and variance."
        )


def _try_one_batch(trainer: Trainer, steps: int) -> None:
    losses = [fact.loss for fact in _with_progress(trainer.overfit(steps), trainer)]
    first, last = losses[0], sum(losses[-5:]) / len(losses[-5:])
    typer.echo(f"One batch, {len(losses)} steps: the loss went from {first:.4f} to {last:.4f}")
    if not last <= OVERFIT_FALL * first:
        typer.echo(
            "It should fall to less than half. Try a higher --learning-rate, fewer --warmup-steps or a larger "
            "--network, or look at the data: something does not fit."
        )
        raise typer.Exit(1)
    typer.echo("It falls as it should: data, network and optimiser work together.")


def _with_progress(facts: Iterable[Step], trainer: Trainer) -> Iterator[Step]:
    """Pass facts on; show a bar on a terminal, and a plain line now and then elsewhere."""
    show = _bar if sys.stdout.isatty() else _plain_lines
    return show(facts, trainer)


def _plain_lines(facts: Iterable[Step], trainer: Trainer) -> Iterator[Step]:
    due = Seldom(PLAIN_LINE_SECONDS, at_once=True)
    for fact in facts:
        if due(anyway=fact.step == trainer.config.steps):
            left = _seconds_left(fact, trainer.config)
            typer.echo(
                f"step {fact.step}/{trainer.config.steps}  loss {fact.loss:.4f}  "
                f"{fact.images_per_second:.0f} images/s  {clock(left)} left"
            )
            sys.stdout.flush()
        yield fact


def _bar(facts: Iterable[Step], trainer: Trainer) -> Iterator[Step]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(
            "", total=trainer.config.steps, completed=trainer.state.step, facts=""
        )
        for fact in facts:
            left = clock(_seconds_left(fact, trainer.config))
            text = f"loss {fact.loss:.4f}  {fact.images_per_second:.0f} images/s  {left} left"
            progress.update(task, completed=fact.step, facts=text)
            yield fact


def _seconds_left(fact: Step, config: TrainingConfig) -> float:
    return (config.steps - fact.step) * config.batch_size / fact.images_per_second
