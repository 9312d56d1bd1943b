"""How training and the making of many images scale over workers: `python bench/scaling.py [--out FILE]`.

Runs with one and with more workers take turns, each worker with one thread, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import report

NETWORK = '{"channels": [32, 64], "blocks": 1, "attention": [1]}'
STEPS, BATCH, CALLS, SHARD = 16, 64, 10, 16


def fewstep(workers: int, *words: str) -> None:
    """Run the command on so many workers."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m"]
    command = [sys.executable, "-m", *(launcher if workers > 1 else []), "fewstep", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def training_rate(workers: int, folder: Path) -> float:
    """Images per second after the first steps, as the log tells."""
    words = ["--network-options", NETWORK, "--batch-size", str(BATCH), "--steps", str(STEPS)]
    words += ["--parts", "1", "--precision", "float32", "--log-every", "4", "--sample-every", "0"]
    out = folder / f"run-{time.time_ns()}"
    fewstep(workers, "train", "mnist-1000", "--device", "cpu", "--out", str(out), *words)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return statistics.median(entry["images_per_second"] for entry in entries[1:])


def sampling_rate(workers: int, folder: Path, images: int) -> float:
    """Images per second between the first shards and the last, so without the start of the program."""
    out = folder / f"shards-{time.time_ns()}"
    words = ["--images", str(images), "--steps", str(CALLS), "--shard-size", str(SHARD)]
    fewstep(workers, "sample", "digits", *words, "--out", str(out))
    times = sorted(path.stat().st_mtime for path in out.glob("*.npz"))
    return SHARD * (len(times) - workers) / (times[-1] - times[workers - 1])


def measured(
    rate: Callable[[int, Path], float], counts: list[int], rounds: int
) -> dict[int, float]:
    """Median rate for each number of workers, which take turns."""
    rates: dict[int, list[float]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for count in counts:
                rates[count].append(rate(count, Path(folder)))
    return {count: statistics.median(values) for count, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=128)
    arguments = parser.parse_args()
    counts = sorted({1, *arguments.workers})
    figures = {
        f"training, batches of {BATCH} of 28x28": measured(
            training_rate, counts, arguments.rounds
        ),
        f"`digits`, {CALLS} calls, shards of {SHARD}": measured(
            lambda count, folder: sampling_rate(count, folder, arguments.images),
            counts,
            arguments.rounds,
        ),
    }
    command = "python " + " ".join(["bench/scaling.py", *sys.argv[1:]])
    lines = report.header("Scaling over workers", command, ("torch", "accelerate"))
    lines[5] = lines[5].rpartition(",")[0] + f", {os.cpu_count()} cores; 1 thread for each worker"
    load = os.getloadavg()[2] if hasattr(os, "getloadavg") else 0.0
    lines += [
        f"Medians of {arguments.rounds} rounds in which the numbers of workers take turns; load of the machine in the "
        f"last 15 minutes: {load:.1f}.",
        "",
        "| what | workers | images/s | speed-up | share of the ideal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for what, rates in figures.items():
        for count, rate in rates.items():
            gain = rate / rates[1]
            lines.append(f"| {what} | {count} | {rate:.1f} | {gain:.2f} | {gain / count:.0%} |")
    page = "\n".join([*lines, ""])
    print(page)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
