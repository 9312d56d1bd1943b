"""Train the digit classifier: ``python -m fewstep.metrics.train_classifier --help``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.data import load_images
from fewstep.errors import CheckpointError, FewstepError
from fewstep.metrics.classifier_card import measure, write_card
from fewstep.metrics.classifier_training import Epoch, Recipe, save_classifier, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, save, measure and describe a classifier; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except FewstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    recipe = Recipe(epochs=options.epochs, seed=options.seed, bf16=options.bf16)
    train_set = load_images(options.data, split="train")
    test_set = load_images(options.data, split="test")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        classifier, history = train(train_set, test_set, recipe, _print_epoch)
        save_classifier(classifier, options.out)
        figures = measure(options.out, train_set, test_set)
        write_card(options.out, recipe, history, figures, _origin(options))
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {options.out}: {error.strerror or error}; give --out a folder with "
            "room and write permission"
        ) from error
    print(
        f"test accuracy {figures['test_accuracy']}, distance of the training set to the test set "
        f"{figures['train_distance']}; wrote {options.out}"
    )


def _print_epoch(epoch: Epoch) -> None:
    print(
        f"epoch {epoch.number}: loss {epoch.loss:.4f}, test accuracy {epoch.test_accuracy:.2%}, "
        f"{epoch.seconds:.0f} s",
        flush=True,
    )


def _origin(options: argparse.Namespace) -> dict[str, str]:
    """Say how to repeat the run, without the folders of the machine it ran on."""
    data, out = Path(options.data).name, options.out.resolve().name
    command = f"python -m fewstep.metrics.train_classifier --data {data} --out {out}"
    command += f" --epochs {options.epochs} --seed {options.seed}" + " --bf16" * options.bf16
    return {"command": command, "data": f"`{data}`", "hardware": options.hardware}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fewstep.metrics.train_classifier",
        description="Train the digit classifier, measure it and write its model card.",
    )
    parser.add_argument("--data", required=True, help="an .npz file with both splits, or mnist")
    parser.add_argument("--out", required=True, type=Path, help="folder for weights and card")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="default: %(default)s")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument(
        "--hardware",
        default=f"{torch.get_num_threads()} thread(s) on {platform.machine()}",
        help="what the model card says it was trained on; default: %(default)s",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
