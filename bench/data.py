"""What a large set of images costs before its first training step: time, memory, and how long nothing is heard.

`python bench/data.py --files 20000` makes so many small JPEG files in a temporary folder (hard links to a few hundred
pictures), reads them in four ways, each time as a first start that decodes them into a cache and as a second start that
finds the cache, and removes everything again:

- *class folders*: the label is the sub-folder;
- *CSV*: labels from a file with a row for each image;
- *captions*: a text file beside each image (a tenth of the images);
- *tar shards*: the same pictures in archives, each with a `.cls` file.

Each start is a process of its own. *Silence* is the longest time between two reports of progress in loading, *memory*
the peak of what the process holds for itself (pages of the mapped file are the system's), above what the imports took;
*checks* those before training. A *batch* is 128 images at random places, as floats, made by one thread.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from report import header

PICTURES = 500
CLASSES = 1000
SHARD = 100_000
SIZE = 32
BATCHES, BATCH_SIZE = 200, 128
SAMPLE_SECONDS = 0.01
MIB = 2**20
KINDS = ("class folders", "CSV", "captions", "tar shards")


def pictures() -> list[bytes]:
    """JPEG files of smooth colours, all different."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(PICTURES):
        colours = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(colours).resize((40, 36), Image.Resampling.BICUBIC).save(file, "JPEG")
        made.append(file.getvalue())
    return made


def names(count: int) -> Iterator[tuple[str, int]]:
    """The place of each file in its class folder, and which picture it is."""
    classes = min(CLASSES, max(1, count // 10))
    for number in range(count):
        yield f"class{number * classes // count:04d}/image{number:07d}.jpg", number % PICTURES


def make_folder(root: Path, distinct: Path, count: int, captions: bool = False) -> None:
    """So many files in class folders, as hard links."""
    distinct.mkdir(exist_ok=True)
    for number, content in enumerate(pictures()):
        (distinct / str(number)).write_bytes(content)
    for name, picture in names(count):
        target = root / name
        if not target.parent.exists():
            target.parent.mkdir(parents=True)
        os.link(distinct / str(picture), target)
        if captions:
            target.with_suffix(".txt").write_text(f"a blur of colours, number {name[-11:-4]}")


def make_table(path: Path, count: int) -> None:
    """A label file for the files of `make_folder`."""
    with path.open("w") as file:
        file.write("file_name,label\n")
        file.writelines(f"{name},kind {picture % 100}\n" for name, picture in names(count))


def make_shards(root: Path, count: int) -> None:
    """The same pictures in archives, with their classes in side files."""
    root.mkdir()
    contents, archive = pictures(), None
    for number, (name, picture) in enumerate(names(count)):
        if number % SHARD == 0:
            if archive is not None:
                archive.close()
            archive = tarfile.open(root / f"train-{number // SHARD:04d}.tar", "w")
        assert archive is not None
        archive.members = []  # tarfile would keep every header
        for ending, content in (("jpg", contents[picture]), ("cls", name[5:9].encode())):
            member = tarfile.TarInfo(f"{number:07d}.{ending}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if archive is not None:
        archive.close()


class Memory:
    """The peak of this process's own memory since the start, sampled by a thread (Linux)."""

    def __init__(self) -> None:
        self.start = self.peak = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self._now())
            time.sleep(SAMPLE_SECONDS)

    def _now(self) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

    def rise(self) -> float:
        """MiB above the start."""
        return self.peak - self.start


class Silence:
    """The longest time between two reports of progress."""

    def __init__(self) -> None:
        self.longest, self._last = 0.0, time.perf_counter()

    def __call__(self, *_: object) -> None:
        now = time.perf_counter()
        self.longest, self._last = max(self.longest, now - self._last), now


def started(source: str, cache: str, labels: str | None) -> dict[str, float]:
    """Load the images in this process and draw batches; the figures of it."""
    from fewstep.data import check_images, load_images

    torch.set_num_threads(1)  # as in the thread that makes the batches of a training run
    load_images("mnist-1000").batch([0])
    memory, silence = Memory(), Silence()
    figures: dict[str, float] = {}

    def timed(what: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        figures[what] = time.perf_counter() - start
        return result

    images = timed(
        "load",
        lambda: load_images(
            source, size=SIZE, channels=3, labels=labels, cache=cache, on_progress=silence
        ),
    )
    silence()
    figures["silence"], figures["memory"] = silence.longest, memory.rise()
    timed("check", lambda: check_images(images))
    random = np.random.default_rng(0)
    rows = random.integers(0, len(images), (BATCHES, BATCH_SIZE))
    timed("batches", lambda: sum(len(images.batch(row)[0]) for row in rows))
    figures["memory with checks"] = memory.rise()
    return figures | {"images": len(images)}


def start(*words: str) -> dict[str, float]:
    """The figures of a start in a process of its own."""
    command = [sys.executable, __file__, "--start", *words]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def row(kind: str, which: str, figures: dict[str, float]) -> str:
    """A line of the table."""
    return (
        f"| {kind} | {figures['images']:,.0f} | {which} | {figures['load']:.1f} s | "
        f"{figures['silence']:.1f} s | {figures['memory']:.0f} MiB | {figures['check']:.1f} s | "
        f"{figures['memory with checks']:.0f} MiB | "
        f"{1000 * figures['batches'] / BATCHES:.2f} ms |"
    )


def measured(kind: str, root: Path, count: int) -> Iterator[str]:
    """Make the files of one kind, start twice on them, and return the lines of the table."""
    labels = ""
    source = root / kind.replace(" ", "-")
    if kind == "tar shards":
        make_shards(source, count)
    elif kind == "captions":
        make_folder(source, root / "distinct", count // 10, captions=True)
    else:
        source = root / "folder"
        if not source.exists():
            make_folder(source, root / "distinct", count)
        if kind == "CSV":
            labels = str(root / "labels.csv")
            make_table(Path(labels), count)
    for which in ("first", "second"):
        yield row(kind, which, start(str(source), str(root / "cache" / kind), labels))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--start", nargs=3, metavar=("SOURCE", "CACHE", "LABELS"))
    options = parser.parse_args()
    if options.start:
        source, cache, labels = options.start
        print(json.dumps(started(source, cache, labels or None)))
        return
    command = f"python bench/data.py --files {options.files}"
    print("\n".join(header("Many images", command, ["torch", "numpy", "pillow"])))
    print(
        "| labels from | images | start | loading | silence | memory | checks | memory with checks | batch |\n"
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    with tempfile.TemporaryDirectory(prefix="fewstep-") as folder:
        for kind in options.kinds:
            for line in measured(kind, Path(folder), options.files):
                print(line, flush=True)
    print(f"\nLoad of the machine in the last 15 minutes: {os.getloadavg()[2]:.1f}.")


if __name__ == "__main__":
    main()
