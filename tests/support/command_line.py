"""Running `fewstep` as a user does, inside the test's own process."""

from __future__ import annotations

import sys

import pytest

from fewstep.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run `fewstep words...` and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["fewstep", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)
