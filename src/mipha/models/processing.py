"""Tokenizer, image processor and chat template as one processor of the host, which saves and loads it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, LlavaProcessor, PretrainedConfig, PreTrainedTokenizerBase
from transformers.image_utils import PILImageResampling

# Named, because with torchvision installed the host would pick another backend, whose pixels differ in the last bits.
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mipha.lookup import did_you_mean, files_in

TEMPLATES = Path(__file__).parent.parent / "catalog" / "chat_templates"
IMAGE_TOKEN = "<image>"


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of this name, fitted to a tokenizer that begins every text with a BOS (Gemma).

    Raises:
        FileNotFoundError: No such template.
        ValueError: The template does not mark what is trained on.
    """
    path = Path(name) if name.endswith(".jinja") else TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        raise FileNotFoundError(
            f"no chat template {name!r}: {did_you_mean(name, files_in(TEMPLATES, '.jinja'))}, or give a .jinja file"
        )
    return checked_template(path.read_text(encoding="utf-8"), tokenizer, source=str(path))


def checked_template(template: str, tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """The template, refused where it has no `{% generation %}` block: then nothing could be trained on."""
    if "generation" not in template.replace("add_generation_prompt", ""):
        raise ValueError(
            f"chat template {source} marks nothing to train on: put the assistant's words in {{% generation %}} ... {{% endgeneration %}}"
        )
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [
        tokenizer.bos_token_id
    ]
    return "{%- set prepend_bos = true -%}\n" + template if adds_bos else template


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    vision: PretrainedConfig,
    mean: list[float],
    std: list[float],
    pad_to_square: bool,
    num_prefix_tokens: int,
) -> LlavaProcessor:
    """A processor whose image tokens agree with the tower.

    Args:
        vision: The tower's config after build: `image_size` and `patch_size`, pixels.
        mean: Per channel, of pixels in 0..1.
        std: Per channel, of pixels in 0..1.
        pad_to_square: Pad with the mean colour; otherwise squash.
        num_prefix_tokens: Tokens that the tower puts before its patches; the first, the class token, is left out.
    """
    size = {"height": vision.image_size, "width": vision.image_size}
    image_processor = LlavaImageProcessorPil(
        do_pad=pad_to_square,
        do_center_crop=False,
        size=size,
        crop_size=size,
        image_mean=mean,
        image_std=std,
        resample=PILImageResampling.BICUBIC,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default" if num_prefix_tokens else "full",
        num_additional_image_tokens=num_prefix_tokens,
        image_token=IMAGE_TOKEN,
        chat_template=template,
    )


def load_processor(folder: str | Path) -> LlavaProcessor:
    """The processor of a saved checkpoint."""
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil.from_pretrained(folder, local_files_only=True),
        tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True),
        **_saved_options(Path(folder)),
    )


def _saved_options(folder: Path) -> dict:
    saved = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    names = (
        "patch_size",
        "vision_feature_select_strategy",
        "num_additional_image_tokens",
        "image_token",
    )
    return {name: saved[name] for name in names} | {
        "chat_template": (folder / "chat_template.jinja").read_text(encoding="utf-8")
    }
