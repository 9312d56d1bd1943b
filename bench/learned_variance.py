"""Whether the variance that a network has learnt pays: few steps of DDPM with it and with DDPM's two, and the bound.

`python bench/learned_variance.py [--steps N] [--n N] [--out FILE]` trains a small model of digits with
`--learned-variance` (some minutes on two cores), makes pictures in 10, 25 and 50 network calls, and prints their
Fréchet distance in the features of the bundled classifier, smaller is nearer; the last row is of real digits, as many.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from torch import Tensor

import fewstep as fs
from fewstep.data import load_images
from fewstep.metrics import digit_distance
from fewstep.training import TrainingConfig, run, variational_bound
from report import header

DATA = "mnist-1000"
NETWORK = {"channels": (16, 32, 64), "blocks": 1, "attention": (2,), "head_width": 32}
CALLS = (10, 25, 50)
WAYS = {
    "ddpm, variance of the posterior": ("ddpm", {}),
    "ddpm, the larger variance": ("ddpm", {"variance": "large"}),
    "ddpm_learned": ("ddpm_learned", {}),
}
BOUND_IMAGES, BOUND_LEVELS = 128, 100


def trained(steps: int) -> fs.Denoiser:
    """A model of digits without classes, with a learnt variance."""
    images = load_images(DATA)
    config = TrainingConfig(
        data=DATA,
        network_options=NETWORK,
        process={"name": "vp_cosine"},
        predicts="velocity",
        learned_variance=True,
        steps=steps,
        batch_size=64,
        learning_rate=3e-3,
        ema_decay=0.995,
        label_dropout=0.1,
        sample_every=0,
        checkpoint_every=steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        for step in run(config, folder, images=images):
            if step.step % 100 == 0:
                print(f"step {step.step}: loss {step.loss:.4f}", flush=True)
        return fs.load(folder)


def distance(model: fs.Denoiser, sampler: str, options: dict, calls: int, n: int) -> float:
    """Of so many pictures, of all classes in turn, to the test images of MNIST."""
    assert model.num_classes
    made = fs.sample(
        model,
        n=n,
        labels=[k % model.num_classes for k in range(n)],
        sampler=sampler,
        sampler_options=options,
        scheduler="trailing",
        steps=calls,
        batch_size=50,
    )
    return digit_distance(made.uint8())


def without_variance(model: fs.Denoiser) -> fs.Denoiser:
    """The same model, whose second half of the channels nobody sees."""

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return model.network(x, t, labels=labels)[:, : x.shape[1]]

    return fs.Denoiser(network, model.process, model.predicts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500, help="of the training")
    parser.add_argument("--n", type=int, default=500, help="pictures for each distance")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    model = trained(given.steps)
    lines = header(
        "A learned variance in few steps",
        f"python bench/learned_variance.py --steps {given.steps} --n {given.n}",
        ("torch",),
    )
    lines += [
        f"A small model of the 1,000 digits of `{DATA}`, {given.steps} steps of 64 images. Fréchet distance of "
        f"{given.n} pictures to MNIST's test",
        "images in the features of the bundled classifier, by network calls.",
        "",
        f"| sampler | {' | '.join(map(str, CALLS))} |",
        f"| --- |{' ---: |' * len(CALLS)}",
    ]
    print("\n".join(lines), flush=True)
    for name, (sampler, options) in WAYS.items():
        found = [distance(model, sampler, options, calls, given.n) for calls in CALLS]
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in found)} |")
        print(lines[-1], flush=True)
    images = load_images(DATA)
    real = digit_distance(images.images[: given.n])
    x0, labels = images.batch(range(BOUND_IMAGES))
    learnt, plain = (
        variational_bound(asked, x0, levels=BOUND_LEVELS, labels=labels).total
        for asked in (model, without_variance(model))
    )
    lines += [
        f"| real digits of the training set | {' | '.join([f'{real:.2f}'] * len(CALLS))} |",
        "",
        f"Variational bound of {BOUND_IMAGES} training images, estimated at {BOUND_LEVELS} levels: {learnt:.3f} bits "
        f"per dimension with the learned variance, {plain:.3f} with that of the posterior.",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
