"""Make the bundled model `digits` from a finished run of `fewstep train`, with its model card.

    python tools/bundle_digits.py runs/digits --data mnist.npz --command "fewstep train mnist.npz ..." --hardware "..."

Writes the averaged weights as float16 with their settings, measures them, and writes the card and its pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fewstep as fs
from fewstep.data import labelled_sheet, load_images, save_image
from fewstep.metrics import digit_distance, label_accuracy
from fewstep.models import Model, load

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "src" / "fewstep" / "bundled" / "digits"
PICTURES = ROOT / "docs" / "images"
IMAGES, CALLS = 1000, 50


def main() -> None:
    """Save, measure, describe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the finished run")
    parser.add_argument("--data", required=True, help="mnist.npz, for the distance of real images")
    parser.add_argument("--command", required=True, help="the command of the run, for the card")
    parser.add_argument("--hardware", required=True, help="what it ran on, for the card")
    arguments = parser.parse_args()
    bundled = _save(load(arguments.run))
    log = [json.loads(line) for line in (arguments.run / "log.jsonl").read_text().splitlines()]
    PICTURES.mkdir(parents=True, exist_ok=True)
    _plot_loss(log, PICTURES / "digits-loss.png")
    card = _card(arguments, bundled, log, _figures(bundled, arguments.data))
    (FOLDER / "README.md").write_text(card, encoding="utf-8")
    print(card)


def _save(trained: Model) -> Model:
    """Write the weights as float16, and give back what a user will load; paths of this machine stay out of it."""
    training = dict(trained.config.training)
    training["settings"] = {**training["settings"], "data": "mnist.npz"}
    training["data"] = {**training["data"], "source": "mnist.npz"}
    config = dataclasses.replace(trained.config, name="digits", training=training)
    shutil.rmtree(FOLDER, ignore_errors=True)
    Model(trained.network, config).save(FOLDER, dtype=torch.float16)
    return load("digits")


def _figures(model: Model, data: str) -> dict[str, float]:
    """How the samples are read, and their distance to the test set beside that of as many real images."""
    labels = [k % model.num_classes for k in range(IMAGES)]
    samples = fs.sample(
        model, sampler="ddim", steps=CALLS, seed=range(IMAGES), labels=labels, batch_size=100
    )
    rows = [
        (model.class_names[c], samples.images[[k for k in range(120) if labels[k] == c]])
        for c in range(10)
    ]
    save_image(PICTURES / "digits-samples.png", labelled_sheet(rows))
    real = load_images(data, split="train").images
    return {
        "read": label_accuracy(samples.images, labels),
        "distance": digit_distance(samples.images),
        "distance of train": digit_distance(load_images("mnist-1000").images),
        "distance of all train": digit_distance(real),
    }


def _plot_loss(log: list[dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.loglog([r["step"] for r in log], [r["loss"] for r in log], linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss", title="digits: training loss")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


def _losses(log: list[dict[str, float]]) -> str:
    """Mean loss over the ten records up to some steps."""
    last = int(log[-1]["step"])
    marks = sorted({min(last, step) for step in (100, 200, 500, 1000, 2000, 3000, 4000, last)})
    rows = []
    for mark in marks:
        recent = [r["loss"] for r in log if r["step"] <= mark][-10:]
        rows.append(f"| {mark} | {sum(recent) / len(recent):.4f} |")
    return "\n".join(rows)


def _card(
    arguments: argparse.Namespace,
    model: Model,
    log: list[dict[str, float]],
    figures: dict[str, float],
) -> str:
    training = model.config.training
    size = (FOLDER / "model.safetensors").stat().st_size
    parameters = sum(p.numel() for p in model.network.parameters())  # type: ignore[union-attr]
    return f"""# Model card: `digits`

A class-conditional diffusion model of handwritten digits, 28x28 grey, for trying samplers on something real and fast.

```python
import fewstep as fs

fs.sample(fs.load("digits"), n=4, labels=7, steps=10).save("sevens.png")
```

| file | content |
| --- | --- |
| `model.safetensors` | {parameters:,} averaged weights in float16, {size / 1e6:.1f} MB; loaded as float32 |
| `config.json` | network, process, prediction, and every setting of the training |

## Figures

All with the float16 weights as shipped; {IMAGES:,} samples by DDIM in {CALLS} network calls, guidance 1,
seeds 0..{IMAGES - 1}. Digits are read, and distances measured, by the bundled `mnist-classifier`.

| figure | value |
| --- | --- |
| samples read as the digit that was asked for | **{figures["read"]:.1%}** |
| Fréchet distance to the test set, {IMAGES:,} samples | **{figures["distance"]:.2f}** |
| Fréchet distance to the test set, 1,000 training images (`mnist-1000`) | {figures["distance of train"]:.2f} |
| Fréchet distance to the test set, all 60,000 training images | {figures["distance of all train"]:.2f} |

Fréchet distances fall as the number of images grows; compare equal numbers only.

## Training

```text
{arguments.command}
```

- Data: MNIST's 60,000 training images.
- {training["step"]:,} steps of {training["settings"]["batch_size"]} images, {training["images_seen"] / 60000:.1f}
  passes over the data; {training["seconds"] / 60:.0f} minutes on {arguments.hardware}, beside other work.
- Process `{model.config.process["name"]}`; the network predicts {model.predicts}.
- One in ten labels is dropped in training, so classifier-free guidance works; label 10 is "none".

| step | loss (mean of the ten records before) |
| --- | --- |
{_losses(log)}

## Use and limits

- Meant for learning, for demonstrations and for measuring samplers.
- It draws MNIST's digits and nothing else; a small share of its samples cannot be read.

## Licence and attribution

Trained on the MNIST database of handwritten digits by Yann LeCun, Corinna Cortes and Christopher J. C. Burges,
licensed under [CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/). Sources: Ho, Jain, Abbeel 2020,
arXiv:2006.11239; Salimans, Ho 2022, arXiv:2202.00512; Fréchet distance: Heusel et al. 2017, arXiv:1706.08500.
"""


if __name__ == "__main__":
    main()
