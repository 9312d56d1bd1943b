"""The command line. Commands are plain typed functions, one to a module, imported when they run."""

from __future__ import annotations

import os
import sys
import warnings


def main() -> None:
    """Run `fewstep`; errors that Fewstep raises on purpose are one line, with exit status 2 for bad input, else 1."""
    from fewstep.errors import FewstepError, InvalidInputError

    try:
        from fewstep.cli.app import app

        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except KeyboardInterrupt:  # before the command could see it
        sys.exit(130)
    except FewstepError as error:
        print(f"fewstep{_worker()}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidInputError) else 1)


def _worker() -> str:
    """Which worker of a team speaks."""
    return (
        f" (worker {os.environ.get('RANK')})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    )


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"Warning: {message}", file=sys.stderr)
