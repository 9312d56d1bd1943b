"""What becomes of a model of 10, 100 and 1000 images: copies, and the gap between seen and unseen images.

    python bench/few_images.py --data mnist --out runs/few-images

trains six small models of 8x8 digits (a few minutes on one processor core) and writes docs/results/few-images.md
and a sheet of nearest neighbours for each model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import fewstep as fs
from fewstep.data import ImageSet, load_images, save_image
from fewstep.metrics import COPY_RATIO, loss_by_level, nearest_images
from fewstep.training import TrainingConfig, run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "few-images.md"
COUNTS, PROBABILITIES = (10, 100, 1000), (0.0, 0.3)
UNSEEN, SAMPLES, CALLS, SIZE = 200, 64, 20, 8
NETWORK = {"channels": (16, 32), "blocks": 1, "attention": (), "head_width": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/few-images"))
    options = parser.parse_args()
    digits = load_images(options.data, size=SIZE)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    unseen = without_labels(digits, order[-UNSEEN:])
    rows = []
    for count in COUNTS:
        images = without_labels(digits, order[:count])
        for probability in PROBABILITIES:
            rows.append(measured(images, unseen, probability, options.steps, options.out))
            print(rows[-1], flush=True)
    PAGE.write_text(page(rows, options.steps), encoding="utf-8")


def without_labels(images: ImageSet, rows: torch.Tensor) -> ImageSet:
    return ImageSet(images.images[rows], source="digits")


def measured(
    images: ImageSet, unseen: ImageSet, probability: float, steps: int, out: Path
) -> dict[str, float]:
    """Train a model and return its row of the table."""
    name = f"{len(images)}-{probability:g}"
    config = TrainingConfig(
        data="digits",
        network_options=NETWORK,
        steps=steps,
        batch_size=32,
        learning_rate=3e-3,
        ema_decay=0.995,
        augment=probability,
        precision="float32",
        parts=1,
        log_every=100,
        checkpoint_every=steps,
        sample_every=0,
    )
    started = time.perf_counter()
    loss = [fact.loss for fact in run(config, out / name, images=images, device="cpu")][-1]
    seconds = time.perf_counter() - started
    model = fs.load(out / name)
    errors = []
    for some in (images, unseen):
        few = torch.linspace(0, len(some) - 1, min(len(some), UNSEEN)).round().long()
        losses = loss_by_level(model, some.batch(few)[0], seed=1)
        errors.append(sum(level.noise_error for level in losses) / len(losses))
    samples = fs.sample(model, n=SAMPLES, steps=CALLS, seed=0).images.clamp(-1, 1)
    found = nearest_images(samples, images)
    real = nearest_images(unseen.batch(range(UNSEEN))[0], images)
    save_image(out / f"{name}.png", found.sheet(images))
    return {
        "images": len(images),
        "augment": probability,
        "loss": loss,
        "seen": errors[0],
        "unseen": errors[1],
        "copies": found.copies,
        "ratio": found.ratios.median().item(),
        "real": real.copies,
        "real ratio": real.ratios.median().item(),
        "seconds": seconds,
    }


def page(rows: list[dict[str, float]], steps: int) -> str:
    lines = [
        "# Few images, measured",
        "",
        f"Made by `bench/few_images.py`: networks of 8x8 digits of MNIST, widths {NETWORK['channels']}, no labels, "
        f"{steps} steps of 32 images. Errors are squared errors in the noise per pixel, the mean of ten levels, of "
        f"the averaged weights, on up to {UNSEEN} seen and on {UNSEEN} unseen images under noise of the same seeds. A "
        f"copy is one of {SAMPLES} samples ({CALLS} steps) whose nearest training image is nearer than "
        f"{COPY_RATIO:g} of the median distance of training images to their own nearest neighbour; the columns on the "
        f"right say the same of {UNSEEN} unseen real digits. What this means is said in "
        "[Few images](../few-images.md).",
        "",
        "| images | `--augment` | error, seen | error, unseen | unseen / seen | copies | median ratio "
        "| copies, unseen real | median ratio |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['images']} | {row['augment']:g} | {row['seen']:.4f} | {row['unseen']:.4f} | "
            f"{row['unseen'] / row['seen']:.2f} | {row['copies']:.0%} | {row['ratio']:.2f} | {row['real']:.0%} | "
            f"{row['real ratio']:.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
