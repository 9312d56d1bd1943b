"""denoising-diffusion-pytorch without torchvision, which its networks and processes never use."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from unittest import mock

import pytest

ABSENT = ("torchvision", "torchvision.transforms", "torchvision.utils", "pytorch_fid")


@functools.cache
def denoising_diffusion() -> ModuleType:
    """Its main module; the test is skipped where it is not installed."""
    stubs = {
        name: mock.MagicMock()
        for name in [*ABSENT, "pytorch_fid.fid_score", "pytorch_fid.inception"]
    }
    with mock.patch.dict(sys.modules, stubs):
        try:
            return importlib.import_module(
                "denoising_diffusion_pytorch.denoising_diffusion_pytorch"
            )
        except ModuleNotFoundError as error:
            pytest.skip(f"{error.name} is not installed")
