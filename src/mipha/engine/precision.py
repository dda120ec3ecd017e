"""The type that matrix products run in. Weights and optimizer stay float32."""

from __future__ import annotations

import torch


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the type that matrix products run in; None for the type of the weights.

    Args:
        precision: float32, bfloat16, or auto. auto takes bfloat16 where the device computes in it;
            elsewhere it is emulated and slow. On a CPU it pays with AVX-512 BF16 (1.7 times).
    """
    if precision == "float32":
        return None
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if precision == "bfloat16" or native else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return the context in which matrix products run in this type; None changes nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
