"""Rows -> the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaProcessor

from mipha.data.encode import IGNORE
from mipha.data.images import ImageSource, grey_image, image_name, open_image
from mipha.data.packing import Row


class Substituted(NamedTuple):
    """An image that could not be read, and was replaced by grey."""

    sample: str
    image: str
    reason: str


def collate(
    rows: Sequence[Row], processor: LlavaProcessor, substituted: list[Substituted] | None = None
) -> dict[str, Tensor]:
    """Pad rows to the longest, on the right, and read their images.

    Args:
        substituted: Where it is given, grey stands in for an image that cannot be read, and the case is added here.

    Raises:
        ValueError, FileNotFoundError: An image cannot be read; names the sample and the file.

    Returns:
        `input_ids`, `labels`, `position_ids` `(rows, tokens)`; `pixel_values` `(images, 3, height, width)` where there are
        images, in reading order; `spans` `(spans, 3)`, see `spans_of`; `attention_mask` `(rows, 1, tokens, tokens)`, added to the
        scores, where a row holds several samples. A row of one sample needs no mask: causal attention never looks right, where its
        padding is.
    """
    length = max(len(row) for row in rows)
    batch = {
        "input_ids": _stack(
            [row.input_ids for row in rows], length, processor.tokenizer.pad_token_id
        ),
        "labels": _stack([row.labels for row in rows], length, IGNORE),
        # Positions go on through the padding: a restart would read as a packed sample.
        "position_ids": torch.stack([_continued(row.position_ids, length) for row in rows]),
    }
    batch["spans"] = spans_of(rows)
    if any(row.group[-1] or row.branch[-1] for row in rows):
        batch["attention_mask"] = isolation_mask(
            _stack([row.group for row in rows], length, -1),
            _stack([row.branch for row in rows], length, 0),
        )
    images = [
        _read(image, sample, substituted)
        for row in rows
        for image, sample in zip(row.images, row.shown_by, strict=True)
    ]
    if images:
        batch["pixel_values"] = processor.image_processor(images, return_tensors="pt")[
            "pixel_values"
        ]
    return batch


def _read(source: ImageSource, sample: str, substituted: list[Substituted] | None) -> Image:
    try:
        return open_image(source)
    except (ValueError, FileNotFoundError) as error:
        if substituted is None:
            raise type(error)(
                f"sample {sample}: {error}; mend or remove it, or set unreadable_images=substitute to train on a grey picture in its place"
            ) from error
        substituted.append(Substituted(sample, image_name(source), str(error)))
        return open_image(grey_image())


def spans_of(rows: Sequence[Row]) -> Tensor:
    """`(spans, 3)`: the row, whether it is a branch of the group before it, its tokens: what `isolation_mask` says, without pairs."""
    spans = []
    for number, row in enumerate(rows):
        ends = np.flatnonzero(np.diff(row.group) | np.diff(row.branch)) + 1
        starts = np.concatenate([[0], ends])
        lengths = np.diff(np.append(starts, len(row)))
        spans += [
            (number, int(row.branch[start] > 0), int(tokens))
            for start, tokens in zip(starts, lengths, strict=True)
        ]
    return torch.tensor(spans)


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
