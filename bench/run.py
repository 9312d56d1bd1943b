"""All figures of the foundation, measured side by side in one run: `python bench/run.py [--out FILE]`."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import imports
import orders
import overhead
import report
import walltime

PARTS = {"orders": orders, "overhead": overhead, "walltime": walltime, "imports": imports}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument(
        "--only",
        choices=PARTS,
        action="append",
        help="measure this part alone; may be given again",
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="diffusers")
    rows = [
        row
        for name, part in PARTS.items()
        if name in (arguments.only or PARTS)
        for row in part.rows()
    ]
    command = " ".join(
        ["python", "bench/run.py", *(["--out", str(arguments.out)] if arguments.out else [])]
    )
    table = report.markdown(
        "The foundation in figures", command, rows, ("torch", "numpy", "diffusers")
    )
    print(table)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
