"""Running the command on several workers, as a launcher does: in processes of their own, on a free port."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PATIENCE = 240.0


def start(workers: int, *words: object) -> subprocess.Popen[str]:
    """Start `fewstep words...` on so many workers; on one without a launcher."""
    command = [sys.executable, "-m"]
    if workers > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m"]
    # The tests' own warnings are errors; what launchers warn of is theirs.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*command, "fewstep", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def launch(workers: int, *words: object) -> tuple[int, str, str]:
    """Run it to the end; return exit status, output and errors."""
    with start(workers, *words) as process:
        try:
            output, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    return process.returncode, output, errors


def workers_of(launcher: int) -> list[int]:
    """The process ids of a launcher's workers, by rank (Linux)."""
    ranks = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = (entry / "stat").read_text().rpartition(") ")[2].split()[1]
            if not entry.name.isdigit() or int(parent) != launcher:
                continue
            for variable in (entry / "environ").read_bytes().split(b"\0"):
                if variable.startswith(b"RANK="):
                    ranks[int(variable[5:])] = int(entry.name)
        except (OSError, IndexError, ValueError):
            continue
    return [ranks[rank] for rank in sorted(ranks)]
