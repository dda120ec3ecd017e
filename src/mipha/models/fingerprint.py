"""Weights told apart by the bytes of their tensors: bit-equal or not, whatever the file they lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def tensor_digest(tensor: Tensor) -> str:
    """Sha256 of a tensor's type, shape and bytes, in hex digits; of any device, not sharded."""
    content = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


def joint_digest(digests: Mapping[str, str]) -> str:
    """One digest for many named ones; their order does not count."""
    return hashlib.sha256(
        "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items())).encode()
    ).hexdigest()


def checkpoint_digest(folder: Path) -> str:
    """One digest for all tensors of a saved model; in how many files they lie does not count."""
    digests = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            digests |= {name: tensor_digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return joint_digest(digests)
