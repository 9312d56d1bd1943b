"""`fewstep doctor`: what is installed, and what it runs on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from fewstep.data import cache_dir
from fewstep.models import bundled_models
from fewstep.training.precision import has_native_bfloat16

REQUIRED = ("torch", "numpy", "scipy", "safetensors", "pillow", "rich", "typer")
EXTRAS = {
    "matplotlib": "plots",
    "diffusers": "comparisons with peers",
    "scikit-learn": "development",
}


def doctor() -> None:
    """Print versions, devices, and which extras are installed: what a bug report needs."""
    table = Table(show_header=False, title="fewstep doctor")
    for name, value in _facts():
        table.add_row(name, value)
    Console().print(table)


def _facts() -> list[tuple[str, str]]:
    return [
        ("fewstep", version("fewstep")),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, _version(name)) for name in REQUIRED),
        *((name, f"{_version(name)} (for {use})") for name, use in EXTRAS.items()),
        ("processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"),
        (
            "bfloat16",
            "native" if has_native_bfloat16(torch.device("cpu")) else "emulated: train in float32",
        ),
        ("accelerators", ", ".join(_accelerators()) or "none"),
        ("bundled models", ", ".join(bundled_models()) or "none"),
        ("cache", str(cache_dir())),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _accelerators() -> list[str]:
    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return [*names, *(["Apple mps"] if torch.backends.mps.is_available() else [])]
