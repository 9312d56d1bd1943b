"""Draw the bundled subset of MNIST: 100 training images of each digit, in a fixed random order.

    python tools/make_mnist_1000.py path/to/mnist.npz

The argument is an ``.npz`` file with ``train_images`` and ``train_labels`` in the official order.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fewstep.data import load_images

SEED = 0
PER_CLASS = 100
TARGET = Path(__file__).parent.parent / "src" / "fewstep" / "data" / "mnist-1000.npz"


def main() -> None:
    """Read MNIST, choose, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mnist", type=Path, help="the .npz file with all of MNIST")
    mnist = load_images(parser.parse_args().mnist)
    if mnist.labels is None:
        parser.error("the file has no train_labels")
    labels = mnist.labels.numpy()
    rng = np.random.default_rng(SEED)
    chosen = np.concatenate(
        [
            rng.choice(np.flatnonzero(labels == digit), PER_CLASS, replace=False)
            for digit in range(10)
        ]
    )
    chosen = rng.permutation(chosen)
    np.savez_compressed(
        TARGET,
        images=mnist.images.numpy()[chosen, 0],
        labels=labels[chosen].astype(np.uint8),
        class_names=np.array([str(digit) for digit in range(10)]),
    )
    print(f"{TARGET}: {len(chosen)} images, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
