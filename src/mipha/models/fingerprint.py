"""Digests of weights: two tensors have the same one if and only if they are bit-equal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mipha.checkpoint_files import weight_files


def tensor_digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's type, shape and bytes, in hex digits.

    Args:
        tensor: Tensor on any device, not sharded.
    """
    content = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


def joint_digest(digests: Mapping[str, str]) -> str:
    """Return one digest for many named ones; their order does not count."""
    return hashlib.sha256(
        "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items())).encode()
    ).hexdigest()


def checkpoint_digest(folder: Path) -> str:
    """Return one digest for all tensors of a checkpoint; the number of shards does not count.

    Raises:
        FileNotFoundError: There are no weights, or some are missing.
        ValueError: The weights are pickles, or the index of the shards is damaged.
    """
    digests = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                digests[name] = tensor_digest(file.get_tensor(name))
    return joint_digest(digests)
