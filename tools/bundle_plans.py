"""Tune the plans that come with the bundled model `digits`, and list them in its model card.

python tools/bundle_plans.py            # tunes what is missing
python tools/bundle_plans.py --calls 5  # this one alone
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import fewstep as fs
from fewstep.tuned import plans_folder, plans_of

MODEL, CALLS = "digits", (3, 4, 5, 6, 8, 10)
OPTIONS = {8: ["--images", "64", "--iterations", "8"], 10: ["--method", "search"]}
"""Whole fits of more calls than six take longer than minutes on two cores: they are cut short, or left out."""

TITLE, NEXT = "## Tuned plans", "## Use and limits"


def main() -> None:
    """Tune, and rewrite the section of the card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--calls", type=int, nargs="*", default=CALLS, help="network calls")
    given = parser.parse_args()
    model = fs.load(MODEL)
    folder = plans_folder(model)
    assert folder is not None
    for calls in given.calls:
        file = folder / f"tuned-{calls}.json"
        if not file.exists():
            words = [*_words(calls), "--out", str(file)]
            subprocess.run([sys.executable, "-m", "fewstep", *words], check=True)
    write_section(model)


def _words(calls: int) -> list[str]:
    return ["tune", MODEL, "--steps", str(calls), *OPTIONS.get(calls, [])]


def write_section(model: fs.Model) -> None:
    """Put the table of plans into the model card."""
    assert model.folder is not None
    card = model.folder / "README.md"
    text = card.read_text(encoding="utf-8")
    head, found, rest = text.partition(NEXT)
    head = head.partition(TITLE)[0]
    card.write_text(head + section(model) + found + rest, encoding="utf-8")


def section(model: fs.Model) -> str:
    """The plans of a model as a section of its card."""
    lines = [
        TITLE,
        "",
        "`fewstep sample digits --steps N` takes the plan of N calls by itself. Distances are root mean squares over "
        "the pixels, in [-1, 1], to the converged results of the same noise, which tuning held out; guidance 1.",
        "",
        "| calls | distance | best untuned | its distance | times nearer | made by |",
        "| ---: | ---: | --- | ---: | ---: | --- |",
    ]
    found = [(tuned.purpose, tuned.plan) for tuned in plans_of(model) if tuned.plan]
    for purpose, plan in sorted(found, key=lambda entry: entry[1].calls):
        lines.append(
            f"| {plan.calls} | {purpose.error:.4f} | `{purpose.start}` | {purpose.start_error:.4f} | "
            f"{purpose.gain:.2f} | `fewstep {' '.join(_words(plan.calls))} --out ...` |"
        )
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    main()
