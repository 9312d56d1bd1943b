"""From a thousand digits to a model that draws them, in a few minutes on two cores: `make train-demo`.

It gives the commands that a user would give, and lets the bundled classifier read what the model draws.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from fewstep import load, sample
from fewstep.data import labelled_sheet, save_image
from fewstep.metrics import label_accuracy

RUN, SHEET = Path("out/train-demo"), Path("out/train-demo.png")
NETWORK = {
    "channels": [16, 32, 64],
    "blocks": 1,
    "attention": [2],
    "head_width": 32,
    "group_width": 16,
}
TRAIN = [
    *("train", "mnist-1000", "--out", str(RUN)),
    *("--network-options", json.dumps(NETWORK), "--predicts", "velocity"),
    *("--steps", "700", "--batch-size", "64", "--learning-rate", "3e-3", "--warmup-steps", "50"),
    *("--ema-decay", "0.99", "--sample-every", "0", "--checkpoint-every", "350"),
]
EACH, STEPS, GUIDANCE, ENOUGH = 10, 20, 2.0, 0.8


def main() -> int:
    """Train, draw ten of each digit, and say how many are read as asked; 1 if these are too few."""
    print(f"$ fewstep {shlex.join(TRAIN)}", flush=True)
    start = time.monotonic()
    training = subprocess.run([sys.executable, "-m", "fewstep", *TRAIN], check=False)
    if training.returncode:  # it has said why
        return training.returncode
    print(f"Trained in {time.monotonic() - start:.0f} s")
    model = load(RUN)
    labels = torch.arange(model.num_classes).repeat_interleave(EACH)
    images = sample(
        model,
        sampler="dpmpp_2m",
        steps=STEPS,
        seed=range(len(labels)),
        labels=labels.tolist(),
        guidance=GUIDANCE,
    ).images
    rows = [(name, images[labels == k]) for k, name in enumerate(model.class_names)]
    save_image(SHEET, labelled_sheet(rows))
    read = label_accuracy(images, labels)
    print(f"{read:.0%} of {len(labels)} digits are read as the digit asked for: {SHEET}")
    return 0 if read >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
