"""Rows -> the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaProcessor

from mipha.data.encode import IGNORE
from mipha.data.images import open_image
from mipha.data.packing import Row


def collate(rows: Sequence[Row], processor: LlavaProcessor) -> dict[str, Tensor]:
    """Pad rows to the longest, on the right, and read their images.

    Returns:
        `input_ids`, `labels`, `position_ids` `(rows, tokens)`; `pixel_values` `(images, 3, height, width)` where there are
        images, in reading order; `attention_mask` `(rows, 1, tokens, tokens)`, added to the scores, where a row holds
        several samples. A row of one sample needs no mask: causal attention never looks right, where its padding is.
    """
    length = max(len(row) for row in rows)
    batch = {
        "input_ids": _stack([row.input_ids for row in rows], length, processor.tokenizer.pad_token_id),
        "labels": _stack([row.labels for row in rows], length, IGNORE),
        # Positions go on through the padding: a restart would read as a packed sample.
        "position_ids": torch.stack([_continued(row.position_ids, length) for row in rows]),
    }
    if any(row.group[-1] or row.branch[-1] for row in rows):
        batch["attention_mask"] = isolation_mask(
            _stack([row.group for row in rows], length, -1), _stack([row.branch for row in rows], length, 0)
        )
    images = [open_image(image) for row in rows for image in row.images]
    if images:
        batch["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return batch


def isolation_mask(group: Tensor, branch: Tensor) -> Tensor:
    """What each token may attend to: earlier tokens of its group's prefix and of its own branch.

    Args:
        group: `(rows, tokens)`; -1 is padding.
        branch: `(rows, tokens)`; 0 is the prefix.

    Returns:
        `(rows, 1, tokens, tokens)` float32: 0 where attended to, the lowest number elsewhere. Said in full and not through
        position ids, which the host ignores without a word when a mask of ones or a cache comes along.
    """
    tokens = torch.arange(group.shape[1])
    causal = tokens[:, None] >= tokens[None, :]
    same_group = group[:, :, None] == group[:, None, :]
    visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    allowed = (causal & same_group & visible)[:, None]
    return torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)


def _stack(arrays: Sequence[np.ndarray], length: int, fill: int) -> Tensor:
    out = torch.full((len(arrays), length), fill, dtype=torch.int64)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = torch.from_numpy(array)
    return out


def _continued(positions: np.ndarray, length: int) -> Tensor:
    tail = np.arange(1, length - len(positions) + 1) + positions[-1]
    return torch.from_numpy(np.concatenate([positions, tail]))
