"""Rows -> the arguments of one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaProcessor

from mipha.data.images import (
    ImageSource,
    grey_image,
    image_name,
    open_image,
    size_or_grey,
)
from mipha.data.packing import Row
from mipha.data.pixels import read_pixels, scale_pixels
from mipha.geometry import geometry_of
from mipha.labels import IGNORE

Batch = dict[str, Any]
"""Arguments of one forward pass by name: tensors, and `spans`, which is plain Python."""


class Substituted(NamedTuple):
    """An image that could not be read, and was replaced by grey."""

    sample: str
    image: str
    reason: str


def collate(
    rows: Sequence[Row],
    processor: LlavaProcessor,
    substituted: list[Substituted] | None = None,
    lengths: Sequence[int] = (),
    eos_holes: bool = False,
    as_bytes: bool = False,
) -> Batch:
    """Pad rows to one length, on the right, and read their images.

    Args:
        substituted: Where given, grey stands in for an image that cannot be read, and the case is
            added here.
        lengths: As for `padded_length`.
        eos_holes: Whether no token sees the ends of turns, as in upstream's training, where the
            mask is `ids != pad` and the padding is the end token. Rows hold one sample.
        as_bytes: As for `read_pixels`; `to_device` scales them.

    Returns:
        `input_ids`, `labels`, `position_ids` `(rows, tokens)`; `supervised` `(positions,)`, where
        in `rows x tokens` a state stands that predicts a supervised token, so that no device has
        to search; `spans`, those of each row; where there are images, what `read_pixels` makes of
        all of them. There is no mask: the model makes one where its attention needs one. With
        `eos_holes` an `attention_mask` `(rows, tokens)` stands in place of the spans.

    Raises:
        ValueError, FileNotFoundError: An image cannot be read, or is of another size than when its
            row was made; names the sample.
    """
    length = padded_length(rows, lengths)
    batch: Batch = {
        "input_ids": _stack(
            [row.input_ids for row in rows], length, processor.tokenizer.pad_token_id
        ),
        "labels": _stack([row.labels for row in rows], length, IGNORE),
        # Positions continue through the padding: a restart would read as a packed sample.
        "position_ids": torch.stack([_continue(row.position_ids, length) for row in rows]),
        "spans": tuple(row.spans for row in rows),
    }
    # The state at a position predicts the token behind it, if that is of the same row.
    supervised = batch["labels"][:, 1:] != IGNORE  # (rows, tokens - 1)
    batch["supervised"] = F.pad(supervised, (0, 1)).flatten().nonzero().flatten()

    # Source: Mipha `train.py`, DataCollator; image tokens come after, and are seen.
    if eos_holes:
        own = torch.tensor([[len(row)] for row in rows])  # (rows, 1)
        is_real = torch.arange(length) < own  # (rows, tokens)
        batch["attention_mask"] = is_real & (batch["input_ids"] != processor.tokenizer.eos_token_id)
        del batch["spans"]

    images = [
        _read(image, sample, substituted)
        for row in rows
        for image, sample in zip(row.images, row.shown_by, strict=True)
    ]
    if images:
        counts = [count for row in rows for count in row.counts]
        _check_placeholders(batch["input_ids"], images, counts, rows, processor)
        batch |= read_pixels(images, processor, counts, as_bytes)
    return batch


def _check_placeholders(
    input_ids: Tensor,
    images: Sequence[Image],
    counts: Sequence[int],
    rows: Sequence[Row],
    processor: LlavaProcessor,
) -> None:
    """Refuse rows without a placeholder for each token of their images.

    On the host, because the model would wait for the device to count them.
    """
    geometry = geometry_of(processor)
    wanted = sum(
        geometry.bounded_span(*image.size, count).num_image_tokens
        for image, count in zip(images, counts, strict=True)
    )
    found = int((input_ids == processor.image_token_id).sum())
    if found != wanted:
        names = ", ".join(dict.fromkeys(name for row in rows for name in row.shown_by))
        raise ValueError(
            f"the images of {names} take {wanted} tokens, and {found} are kept for them: check "
            "that no image file changes while it is read"
        )


def padded_length(rows: Sequence[Row], lengths: Sequence[int] = ()) -> int:
    """Return the tokens that rows are padded to.

    Args:
        lengths: Lengths to choose from, ascending; a row that is longer than all, or none to choose
            from: the longest row.
    """
    longest = max(len(row) for row in rows)
    return next((length for length in lengths if length >= longest), longest)


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> Batch:
    """Return the arguments of a forward pass on a device; the CPU reads `spans`, so they stay.

    Pixels travel as bytes, and are scaled there.
    """
    moved = {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    if (scaling := moved.pop("pixel_scaling", None)) is not None:
        moved["pixel_values"] = scale_pixels(moved["pixel_values"], scaling)
    return moved


def _read(source: ImageSource, sample: str, substituted: list[Substituted] | None) -> Image:
    try:
        return open_image(source)
    except (ValueError, FileNotFoundError) as error:
        if substituted is None:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(
                f"sample {sample}: {error}; fix or remove it, or set "
                "unreadable_images=substitute to train on a grey image in its place"
            ) from error
        substituted.append(Substituted(sample, image_name(source), str(error)))
        return open_image(grey_image(size_or_grey(source)))


def _stack(arrays: Sequence[np.ndarray], length: int, fill: int) -> Tensor:
    out = torch.full((len(arrays), length), fill, dtype=torch.int64)  # (rows, tokens)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = torch.from_numpy(array)
    return out


def _continue(positions: np.ndarray, length: int) -> Tensor:
    tail = np.arange(1, length - len(positions) + 1) + positions[-1]
    return torch.from_numpy(np.concatenate([positions, tail]))  # (tokens,)
