"""`fewstep train`: from images to a model."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.errors import InvalidInputError
from fewstep.training.config import TrainingConfig

if TYPE_CHECKING:
    from fewstep.training import Step, Trainer

INTERRUPTED = 130
PLAIN_LINE_SECONDS = 10.0
OVERFIT_STEPS = 200
OVERFIT_FALL = 0.5


def train(
    data: Annotated[
        str,
        typer.Argument(
            help="Images: a folder (sub-folders are classes), an .npz file, or a name such as "
            "mnist-1000."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the run. If it holds a run, that run goes on.")
    ] = Path("runs/mine"),
    size: Annotated[
        int | None,
        typer.Option(help="Edge of the square images in pixels; by default as they are."),
    ] = TrainingConfig.size,
    channels: Annotated[
        int | None, typer.Option(help="1 (grey) or 3 (RGB); by default as they are.")
    ] = TrainingConfig.channels,
    network: Annotated[str, typer.Option(help="Preset of the U-Net.")] = TrainingConfig.network,
    network_options: Annotated[
        str,
        typer.Option(help="What differs from the preset, as JSON: '{\"channels\": [32, 64]}'."),
    ] = "{}",
    process: Annotated[
        str,
        typer.Option(
            help='Forward process: a name, or JSON: \'{"name": "vp_cosine", "steps": 500}\'.'
        ),
    ] = "vp_linear",
    predicts: Annotated[
        str, typer.Option(help="What the network outputs: noise, data, velocity or flow.")
    ] = TrainingConfig.predicts,
    steps: Annotated[
        int, typer.Option(help="Updates of the weights in all.")
    ] = TrainingConfig.steps,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = TrainingConfig.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of AdamW.")
    ] = TrainingConfig.learning_rate,
    warmup_steps: Annotated[
        int, typer.Option(help="Steps over which the learning rate rises from zero.")
    ] = TrainingConfig.warmup_steps,
    decay: Annotated[
        str, typer.Option(help="Learning rate afterwards: cosine (falls to zero) or constant.")
    ] = TrainingConfig.decay,
    weight_decay: Annotated[
        float, typer.Option(help="Decoupled weight decay of AdamW.")
    ] = TrainingConfig.weight_decay,
    gradient_clip: Annotated[
        float, typer.Option(help="Longest gradient, as Euclidean norm; 0: no limit.")
    ] = TrainingConfig.gradient_clip,
    ema_decay: Annotated[
        float, typer.Option(help="Share of the averaged weights kept in each step, below 1.")
    ] = TrainingConfig.ema_decay,
    label_dropout: Annotated[
        float, typer.Option(help="Share of images shown without label, 0 to 1, for guidance.")
    ] = TrainingConfig.label_dropout,
    horizontal_flip: Annotated[
        bool, typer.Option("--horizontal-flip", help="Mirror half of the images.")
    ] = TrainingConfig.horizontal_flip,
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto (bfloat16 where it is native).")
    ] = TrainingConfig.precision,
    parts: Annotated[
        int, typer.Option(help="Parts of a batch, each with its own thread on a CPU.")
    ] = TrainingConfig.parts,
    seed: Annotated[
        int, typer.Option(help="Decides every random number of the run.")
    ] = TrainingConfig.seed,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between checkpoints.")
    ] = TrainingConfig.checkpoint_every,
    sample_every: Annotated[
        int, typer.Option(help="Steps between sheets of samples; 0: none.")
    ] = TrainingConfig.sample_every,
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
) -> None:
    """Train a model on images. Started again on the same folder, it goes on where it was."""
    from fewstep.training import Trainer

    config = TrainingConfig(
        data=data,
        size=size,
        channels=channels,
        network=network,
        network_options=_json_object("network-options", network_options),
        process=_json_object("process", process) if "{" in process else {"name": process},
        predicts=predicts,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        decay=decay,
        weight_decay=weight_decay,
        gradient_clip=gradient_clip,
        ema_decay=ema_decay,
        label_dropout=label_dropout,
        horizontal_flip=horizontal_flip,
        precision=precision,
        parts=parts,
        seed=seed,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
    )
    trainer = Trainer(config, out, device=device, resume=not overfit)
    _introduce(trainer)
    if overfit:
        _try_one_batch(trainer, min(steps, OVERFIT_STEPS))
        return
    if trainer.is_complete:
        typer.echo(
            f"All {trainer.state.step} steps are done already; give more --steps to go on. The model: {out}"
        )
        return
    with _stop_on_signal() as stopping:
        for fact in _with_progress(trainer.steps(stopping), trainer):
            _report(fact, trainer)
        interrupted = stopping() and not trainer.is_complete
    if interrupted:
        typer.echo(
            f"Stopped after step {trainer.state.step}; a checkpoint is saved. To go on, give the same command "
            f"again:\n  {shlex.join(['fewstep', *sys.argv[1:]])}"
        )
        raise typer.Exit(INTERRUPTED)
    typer.echo(f"Done. Try: fewstep sample {out} --out grid.png")


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidInputError(f"--{option} {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInputError(
            f"--{option} {text!r} is not a JSON object; give names and values, such as '{{\"name\": 1}}'"
        )
    return value


def _introduce(trainer: Trainer) -> None:
    images, state = trainer.images, trainer.state
    channels, height, width = images.shape
    parameters = sum(p.numel() for p in state.network.parameters())
    typer.echo(
        f"{len(images)} images of {width}x{height}, {channels} channel{'s' if channels > 1 else ''}, "
        f"{images.num_classes or 'no'} classes; network of {parameters:,} parameters on {trainer.device}, "
        f"{trainer.precision}"
    )
    for finding in trainer.findings:
        typer.echo(f"Warning: {finding.message}", err=True)
    if state.step:
        typer.echo(f"Going on after step {state.step} of {trainer.config.steps}")


def _report(fact: Step, trainer: Trainer) -> None:
    """Say what was written, and whether pictures can be expected to show anything yet."""
    if fact.preview is None:
        return
    typer.echo(f"step {fact.step}: samples in {fact.preview}")
    if fact.loss > trainer.pixelwise_loss:
        typer.echo(
            f"  They are still expected to be noise: the loss, {fact.loss:.4f}, is above "
            f"{trainer.pixelwise_loss:.4f}, which needs no more than each pixel's mean and variance."
        )


def _try_one_batch(trainer: Trainer, steps: int) -> None:
    losses = [fact.loss for fact in _with_progress(trainer.overfit(steps), trainer)]
    first, last = losses[0], sum(losses[-5:]) / len(losses[-5:])
    typer.echo(f"One batch, {len(losses)} steps: the loss went from {first:.4f} to {last:.4f}")
    if last > OVERFIT_FALL * first:
        typer.echo(
            "It should fall to less than half. Try a higher --learning-rate or a larger --network, or look at "
            "the data: something does not fit."
        )
        raise typer.Exit(1)
    typer.echo("It falls as it should: data, network and optimiser work together.")


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and a polite kill end the run after the step at hand; a second one ends it at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        typer.echo("Stopping after this step ...", err=True)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, note) for number in signals]
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _with_progress(facts: Iterable[Step], trainer: Trainer) -> Iterator[Step]:
    """Pass facts on; show a bar on a terminal, and a plain line now and then elsewhere."""
    show = _bar if sys.stdout.isatty() else _plain_lines
    return show(facts, trainer)


def _plain_lines(facts: Iterable[Step], trainer: Trainer) -> Iterator[Step]:
    shown = -PLAIN_LINE_SECONDS
    for fact in facts:
        now = time.monotonic()
        if now - shown >= PLAIN_LINE_SECONDS or fact.step == trainer.config.steps:
            shown = now
            left = _seconds_left(fact, trainer.config)
            typer.echo(
                f"step {fact.step}/{trainer.config.steps}  loss {fact.loss:.4f}  "
                f"{fact.images_per_second:.0f} images/s  {_clock(left)} left"
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
            left = _clock(_seconds_left(fact, trainer.config))
            text = f"loss {fact.loss:.4f}  {fact.images_per_second:.0f} images/s  {left} left"
            progress.update(task, completed=fact.step, facts=text)
            yield fact


def _seconds_left(fact: Step, config: TrainingConfig) -> float:
    return (config.steps - fact.step) * config.batch_size / fact.images_per_second


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
