"""The type of number the network computes in while it is trained."""

from __future__ import annotations

import torch


def has_native_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    if device.type == "cpu":
        return bool(
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass: float32, or bfloat16 where it is asked for or ``"auto"`` finds it native."""
    wanted = precision == "bfloat16" or (precision == "auto" and has_native_bfloat16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)
