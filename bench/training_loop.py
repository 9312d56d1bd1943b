"""What a training step spends beside the network's forward and backward pass, as shares of the step.

Three parts of a step are timed in the training loop itself, as it runs:

- *network*: the loss of a batch and its gradient (adding noise to the images belongs to it);
- *optimiser and average*: clipping, the check for NaN, AdamW, the running average of the weights;
- *loop*: all the rest: waiting for the next batch (made by a thread meanwhile), the log, the generator.

`python bench/training_loop.py` prints them for the preset `small` on 28x28 images, batches of 128, in float32 and
bfloat16. On a CPU the three follow one another, so their times add up to the step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

from fewstep.data import load_images
from fewstep.training import Trainer, TrainingConfig
from report import Row

WARM_UP = 1


class Clock:
    """Adds up the time spent in functions.

    Attributes:
        seconds: So far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def shares(precision: str, steps: int, batch_size: int = 128, **settings: Any) -> dict[str, float]:
    """Seconds of a step, and the shares of network, optimiser and loop, on the CPU."""
    config = TrainingConfig(
        data="mnist-1000",
        steps=WARM_UP + steps,
        batch_size=batch_size,
        precision=precision,
        sample_every=0,
        checkpoint_every=10**6,
        log_every=1,
        **settings,
    )
    network, optimiser = Clock(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, folder, images=load_images("mnist-1000"), device="cpu")
        trainer._gradient = network.around(trainer._gradient)
        trainer.state.update = optimiser.around(trainer.state.update)
        facts = trainer.steps()
        for _ in range(WARM_UP):
            next(facts)
        network.seconds = optimiser.seconds = 0.0
        start = time.perf_counter()
        for _ in range(steps - 1):  # the last one also saves the model
            next(facts)
        total = time.perf_counter() - start
        facts.close()
    rest = total - network.seconds - optimiser.seconds
    return {
        "step": total / (steps - 1),
        "network": network.seconds / total,
        "optimiser": optimiser.seconds / total,
        "loop": rest / total,
    }


def rows(steps: int = 9) -> list[Row]:
    """A row for each type of number."""
    return [_row(precision, shares(precision, steps)) for precision in ("float32", "bfloat16")]


def _row(precision: str, share: dict[str, float]) -> Row:
    return Row(
        f"training loop, small, batch 128, {precision}",
        f"{share['loop']:.2%} of a step of {share['step']:.2f} s",
        f"network {share['network']:.1%}, optimiser and average {share['optimiser']:.1%}",
        share["loop"],
        "below 3 %",
        share["loop"] < 0.03,
    )


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=9, help="steps to time")
    for row in rows(parser.parse_args().steps):
        print(f"{row.figure}: {row.ours}; {row.reference}")


if __name__ == "__main__":
    main()
