"""`fewstep tune`: the best plan of a few calls for a model."""

from __future__ import annotations

import os
import shlex
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fewstep.cli.launched import INTERRUPTED, PLAIN_LINE_SECONDS, Seldom
from fewstep.errors import CheckpointError, InvalidInputError
from fewstep.models import Model, load

if TYPE_CHECKING:
    from fewstep.plan import Plan
    from fewstep.tuning import Stage, Tuning
    from fewstep.tuning.losses import Loss

HUBER_WIDTH = 0.05
"""In pixels that go from -1 to 1."""


def tune(
    model: Annotated[
        str,
        typer.Argument(help="A model folder, a training run, or a bundled model such as digits."),
    ],
    steps: Annotated[int, typer.Option(help="Network calls of the plan, 2 or more.")] = 5,
    guidance: Annotated[
        float, typer.Option(help="Classifier-free guidance that the plan is meant for; 1 is off.")
    ] = 1.0,
    method: Annotated[
        Literal["learn", "search"],
        typer.Option(help="learn, or search, which changes nothing but levels."),
    ] = "learn",
    loss: Annotated[
        Literal["pixels", "pseudo-huber", "features"],
        typer.Option(
            help="What near means: pixels; pseudo-huber, which gives up images that are far off; or features of the "
            "digit classifier, for models of 1x28x28."
        ),
    ] = "pixels",
    iterations: Annotated[int, typer.Option(help="Iterations of each fit at most.")] = 80,
    images: Annotated[int, typer.Option(help="Images that the plan is fitted on.")] = 96,
    held_out: Annotated[int, typer.Option(help="Other images, on which plans are compared.")] = 48,
    batch_size: Annotated[
        int, typer.Option(help="Images that go through the network together.")
    ] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write; by default plans/tuned-STEPS.json beside the model."
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="ema (averaged); of training runs also raw, or a further average: ema-0.9999."
        ),
    ] = "ema",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps...")] = "cpu",
) -> None:
    """Tune a plan of a few network calls to a model. The best so far is always on disk; started again, it goes on."""
    from fewstep.tuned import plan_below, plan_file
    from fewstep.tuning import tune as find

    trained = load(model, device=device, weights=weights)
    file = plan_file(trained, steps, guidance) if out is None else out
    before = _before(file, trained, guidance) or plan_below(trained, steps, guidance)
    _make_room(file)
    kept: list[Tuning] = []
    try:
        with _progress() as show:

            def on_stage(stage: Stage) -> None:
                if stage.best is not None and stage.best not in kept:
                    _write(stage.best.plan, file)  # so that a kill loses nothing
                    kept[:] = [stage.best]
                show(stage)

            tuned = find(
                trained,
                steps,
                guidance=guidance,
                method=method,
                loss=_loss(loss, trained),
                start=before,
                iterations=iterations,
                images=images,
                held_out=held_out,
                batch_size=batch_size,
                seed=seed,
                on_stage=on_stage,
            )
    except KeyboardInterrupt:
        if kept:
            typer.echo(f"Stopped; the best plan so far is written. {kept[0]}: {file}")
        else:
            typer.echo("Stopped before there was any plan; nothing is written.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _write(tuned.plan, file)
    _tell(tuned, file, model, guidance, found_by_itself=out is None)


def _loss(name: str, model: Model) -> Loss:
    """The loss of a name.

    Raises:
        InvalidInputError: If there are no features for the model's pictures.
    """
    from fewstep.tuning import features, pixels, pseudo_huber

    if name == "features":
        from fewstep.metrics import digit_features, load_classifier
        from fewstep.networks.classifier import IMAGE_SIZE

        if model.shape != (1, IMAGE_SIZE, IMAGE_SIZE):
            raise InvalidInputError(
                f"--loss features knows features of digits of 1x{IMAGE_SIZE}x{IMAGE_SIZE}, and not of pictures of "
                f"{model.shape}; use fewstep.tune with loss=fewstep.tuning.features(your own), or --loss pseudo-huber"
            )
        classifier = load_classifier().to(model.device)
        return features(lambda x: digit_features(x, classifier=classifier))
    return pseudo_huber(HUBER_WIDTH) if name == "pseudo-huber" else pixels


def _before(file: Path, model: Model, guidance: float) -> Plan | None:
    """The plan that an earlier run left, to go on from; another one is not overwritten."""
    from fewstep.plan import Plan
    from fewstep.tuned import mismatches

    if not file.exists():
        return None
    plan = Plan.from_json(file)
    if mismatch := next(mismatches(plan, model.name, guidance), None):
        raise InvalidInputError(f"{file} exists, and {mismatch}; give another --out")
    typer.echo(f"Going on from {file}")
    return plan


def _write(plan: Plan, file: Path) -> None:
    """Write a plan; a file that exists stays as it is until the new one is complete."""
    temporary = file.with_name(f".tmp-{uuid.uuid4().hex}-{file.name}")
    try:
        plan.to_json(temporary)
        os.replace(temporary, file)
    except (OSError, InvalidInputError) as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(file, error) from error


def _make_room(file: Path) -> None:
    """Make the folder, so that what cannot be written is told before all the work."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot write {file}: {error}; give another --out")


def _tell(
    tuned: Tuning, file: Path, model: str, guidance: float, *, found_by_itself: bool
) -> None:
    from fewstep.tuned import guidance_text

    for note in tuned.notes:
        typer.echo(f"Note: {note}", err=True)
    typer.echo(f"distance to the converged images, {tuned}")
    typer.echo(f"Written to {file}")
    chosen = ["--steps", str(tuned.plan.calls)] if found_by_itself else ["--plan", str(file)]
    words = ["fewstep", "sample", model, *chosen]
    if guidance != 1:
        words += ["--label", "0", "--guidance", guidance_text(guidance)]
    typer.echo(f"Use it: {shlex.join(words)}")
    if tuned.method == "search":
        words = ["fewstep", "export", str(file), "--to", "comfyui"]
        typer.echo(f"For other programs, here ComfyUI: {shlex.join(words)}")


@contextmanager
def _progress() -> Iterator[Callable[[Stage], None]]:
    """Show stages: a bar on a terminal, and a plain line now and then elsewhere."""
    if not sys.stdout.isatty():
        yield _PlainLines()
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(*columns, TextColumn("{task.fields[gain]}"), transient=True) as bar:
        task = bar.add_task("", total=1.0, gain="")

        def show(stage: Stage) -> None:
            bar.update(task, description=stage.name, completed=stage.done, gain=_gain(stage))

        yield show


class _PlainLines:
    """A line for each stage, and another one every few seconds."""

    def __init__(self) -> None:
        self.name, self.due = "", Seldom(PLAIN_LINE_SECONDS)

    def __call__(self, stage: Stage) -> None:
        if self.due(anyway=stage.name != self.name):
            self.name = stage.name
            gain = _gain(stage)
            typer.echo(f"{stage.name}: {stage.done:.0%}{'  ' + gain if gain else ''}")
            sys.stdout.flush()


def _gain(stage: Stage) -> str:
    if stage.best is None:
        return ""
    return f"distance {stage.best.error:.4f}, {stage.best.gain:.2f} times nearer"
