"""Another image size for a tower: which sizes go, and what becomes of its position embeddings.

The rule: the table of positions is a picture of patches, one pixel a patch, and is resized as one: cubic convolution with
a = -0.5, widened by the ratio where it shrinks (antialias), in float32. The positions of class tokens stay as they are. This
happens once, at build; the checkpoint holds the new table and says the new size, so any reader of it is right.

Source: `resample_abs_pos_embed` of timm, bicubic with antialias; what Pillow's BICUBIC does to a picture.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig


def checked_image_size(image_size: int | None, config: PretrainedConfig) -> int:
    """The size that a tower gets.

    A tower's own size is taken as it is: SigLIP so400m at 384 pixels reads 27 patches of 14 and leaves 6 pixels out, as
    published.

    Args:
        image_size: Pixels a side; null for the tower's own.
        config: The tower's.

    Raises:
        ValueError: The tower is not square, or the size is no multiple of its patch.
    """
    own, patch = config.image_size, config.patch_size
    if not isinstance(own, int) or not isinstance(patch, int):
        raise ValueError(
            f"the tower reads images of {own} pixels in patches of {patch}: only square ones can be used"
        )
    if image_size in (None, own):
        return own
    if image_size % patch:
        below = max(1, image_size // patch) * patch
        raise ValueError(
            f"image_size={image_size} is not a multiple of the tower's patch of {patch} pixels: use {below} or {below + patch}"
        )
    return image_size


def resize_positions(weights: dict[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
    """A tower's weights with its table of positions on another grid; a tower with rotary positions has no table.

    Args:
        weights: State dict. The table is `(positions, width)` or `(1, positions, width)`; the patches are its last old x old.
        old: Patches a side that the table was made for.
        new: Patches a side.
    """
    if old == new:
        return weights
    return {
        name: _resized(table, old, new) if "position_embedding" in name else table
        for name, table in weights.items()
    }


def _resized(table: Tensor, old: int, new: int) -> Tensor:
    rows = table.flatten(0, -2)
    extra = len(rows) - old * old
    grid = rows[extra:].float().unflatten(0, (old, old)).permute(2, 0, 1)
    grid = F.interpolate(grid[None], size=(new, new), mode="bicubic", antialias=True)[0]
    rows = torch.cat([rows[:extra], grid.flatten(1).T.to(rows.dtype)])
    return rows.reshape(*table.shape[:-2], *rows.shape)
