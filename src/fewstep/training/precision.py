"""The type of number the network computes in while it is trained; the weights are always float32."""

from __future__ import annotations

import torch


def has_native_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compute_type(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that a setting stands for.

    Args:
        precision: ``"float32"``, ``"bfloat16"``, or ``"auto"`` for bfloat16 where it is native.
        device: Where the network computes.
    """
    if precision == "auto":
        return torch.bfloat16 if has_native_bfloat16(device) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context for the network's forward pass, see `compute_type`."""
    narrow = compute_type(precision, device) == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow)
