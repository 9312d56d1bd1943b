"""What a training step and a forward pass get out of a device: their operations a second beside those of a product.

`python bench/share_of_peak.py [--device cuda] [--out FILE] [--sizes 1.6M ...] [--batch N] [--plain]`: our U-Net in
several sizes at 32x32 RGB, a training step (loss, gradient, clipping, AdamW, running average) and a forward pass, as it
is and under `torch.compile`, in bfloat16 (autocast) and float32. A pass is counted as the operations of its
convolutions, products and attention, two for a multiplication and addition. The peak is the best rate of a product of
two square matrices in the same type, measured in the same run; an accelerator's convolutions may use a shorter type
for float32 and exceed it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

import report
from fewstep.networks import UNet
from fewstep.networks.cost import cost
from networks import EDGE, OURS, SIZES, Case, Subject, build

EDGES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Edges of the square matrices."""

BATCHES = {"1.6M": 1024, "6M": 1024, "35.7M": 512, "36M": 512}
"""Batches for an accelerator; a processor takes those of the other bench."""


def rate(function: Callable[[], object], device: str, rounds: int) -> float:
    """Calls a second, the median of rounds of several calls."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def several() -> None:
        for _ in range(calls):
            function()
        wait()

    calls = 1
    several(), several()
    calls = max(1, round(0.3 / report.seconds(several)))
    return calls / statistics.median(report.seconds(several) for _ in range(rounds))


def peak(kind: torch.dtype, device: str, rounds: int) -> float:
    """The most operations a second of a product of matrices."""
    best = 0.0
    for edge in EDGES[device]:
        a, b = torch.randn(2, edge, edge, device=device).to(kind)
        best = max(best, 2 * edge**3 * rate(lambda a=a, b=b: a @ b, device, rounds))
    return best


def operations(size: str) -> dict[str, int]:
    """Of a pass of one image, by task."""
    network = build(OURS, SIZES[size])
    assert isinstance(network, UNet)
    counted = cost(network.config, EDGE)
    return {"train": counted.training_flops, "forward": counted.flops}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=EDGES)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="leave torch.compile out")
    parser.add_argument("--batch", type=int, help="images in a batch, for all sizes")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    given = parser.parse_args()
    name = torch.cuda.get_device_name() if given.device == "cuda" else "a processor"
    lines = report.header(
        f"Share of the peak of {name}",
        f"python bench/share_of_peak.py --device {given.device} --sizes {' '.join(given.sizes)}"
        + (" --plain" if given.plain else ""),
        ("torch",),
    )
    peaks = {
        kind: peak(kind, given.device, given.rounds) for kind in (torch.bfloat16, torch.float32)
    }
    lines += [
        "Peak, measured with products of square matrices: "
        + ", ".join(
            f"{value / 1e12:.2f} TFLOP/s in {_name(kind)}" for kind, value in peaks.items()
        )
        + ".",
        "",
        "| parameters | batch | task | type | compiled | images/s | TFLOP/s | share of the peak |",
        "| --- | ---: | --- | --- | --- | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    threads = torch.get_num_threads()
    for size in given.sizes:
        batch = given.batch or (BATCHES[size] if given.device == "cuda" else None)
        for task, needed in operations(size).items():
            for kind in peaks:
                for compiled in (False,) if given.plain else (False, True):
                    bfloat16 = kind == torch.bfloat16
                    case = Case(OURS, size, bfloat16, True, task, given.device, batch, compiled)
                    torch.set_num_threads(threads)  # a training shares them out
                    subject = Subject(case)
                    images = case.images * rate(subject.run, given.device, given.rounds)
                    done = images * needed
                    lines.append(
                        f"| {size} | {case.images} | {task} | {_name(kind)} | "
                        f"{'yes' if compiled else 'no'} | {images:.1f} | {done / 1e12:.3f} | "
                        f"{done / peaks[kind]:.0%} |"
                    )
                    print(lines[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


if __name__ == "__main__":
    main()
