"""Tokenizer, image processor and chat template as one processor of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import transformers
from transformers import AutoTokenizer, LlavaProcessor, PretrainedConfig, PreTrainedTokenizerBase
from transformers.image_utils import PILImageResampling

# With torchvision installed, transformers would pick another backend, whose pixels differ in the
# last bits.
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mipha.checkpoint_files import read_chat_template, read_processor, read_template
from mipha.files import read_json_object
from mipha.models.chat_template import IMAGE_TOKEN, bounded, fit_template
from mipha.preflight import template_file
from mipha.recipe import CheckpointRecipe, ModelRecipe, RegionForm, StageRecipe

IMAGE_PROCESSORS = (
    "LlavaImageProcessor",
    "CLIPImageProcessor",
    "SiglipImageProcessor",
    "BitImageProcessor",
    "ViTImageProcessor",
)
"""Kinds of image processors whose pixels LLaVA's own makes too, bit for bit."""

_IMAGE_SETTINGS = (
    *("do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Load a chat template; it writes the BOS of a tokenizer that begins every text with one.

    Args:
        name: Name in the catalog, or a .jinja file.
        tokenizer: Tokenizer that will apply it.

    Raises:
        FileNotFoundError: No such template.
        ValueError: As `checked_template`.
    """
    path = template_file(name)
    return checked_template(read_template(path), tokenizer, source=str(path))


def checked_template(template: str, tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """Return a chat template that takes content parts, and writes the tokenizer's BOS if any.

    Raises:
        ValueError: The template has no `{% generation %}` block, so nothing would be trained on;
            or the assistant's words do not arrive in one, as text or as content parts.
    """
    if "generation" not in template.replace("add_generation_prompt", ""):
        raise ValueError(
            f"chat template {source} marks nothing to train on: "
            "put the assistant's words in {% generation %} ... {% endgeneration %}"
        )

    if _adds_bos(tokenizer):
        template = "{%- set prepend_bos = true -%}\n" + template
    return fit_template(template, tokenizer, source)


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    vision: PretrainedConfig,
    mean: list[float],
    std: list[float],
    pad_to_square: bool,
    num_prefix_tokens: int,
) -> LlavaProcessor:
    """Return a processor whose image tokens agree with the tower.

    Args:
        tokenizer: Tokenizer with the image token.
        template: Chat template.
        vision: Config of the tower in the model: `image_size` and `patch_size`, pixels.
        mean: Mean of the pixels per channel, of values in 0..1.
        std: Deviation of the pixels per channel.
        pad_to_square: Whether images are padded with the mean colour; otherwise squashed.
        num_prefix_tokens: Tokens that the tower puts before its patches; the first of them, the
            class token, is left out.
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


def set_padding(
    processor: LlavaProcessor, model: ModelRecipe | CheckpointRecipe, stage: StageRecipe
) -> None:
    """Pad or squash images as a stage asks for; else as the model's recipe or checkpoint does."""
    own = stage.pad_to_square
    if own is None and isinstance(model, ModelRecipe):
        own = model.pad_to_square
    if own is not None:
        processor.image_processor.do_pad = own


def load_processor(folder: str | Path, template: str | None = None) -> LlavaProcessor:
    """Load the processor of a saved checkpoint.

    Args:
        folder: Checkpoint of any layout that `read_processor` knows.
        template: Chat template in place of the checkpoint's own.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Tokenizer or image processor cannot be read, or the chat template fails on every
            conversation or takes too long.
    """
    folder = Path(folder)
    saved = read_processor(folder)
    own = read_chat_template(folder) if template is None else template
    if own is None:
        raise FileNotFoundError(
            f"{folder} has no chat_template.jinja: put its template there, or name one"
        )
    try:
        processor = LlavaProcessor(
            image_processor=_image_processor(saved["image_processor"]),
            tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True),
            patch_size=saved["patch_size"],
            vision_feature_select_strategy=saved["vision_feature_select_strategy"],
            num_additional_image_tokens=saved["num_additional_image_tokens"],
            image_token=saved.get("image_token", IMAGE_TOKEN),
            chat_template=own,
        )
    except Exception as error:  # the readers answer a damaged file with any kind of exception
        raise ValueError(
            f"tokenizer or image processor of {folder} cannot be read: copy their files again "
            f"({_reason(error)})"
        ) from error

    # How boxes were written in training.
    processor.boxes = saved.get("boxes")
    if processor.boxes not in (None, *get_args(RegionForm)):
        raise ValueError(
            f"{folder / 'processor_config.json'} sets boxes to {processor.boxes!r}: "
            f"use one of {', '.join(get_args(RegionForm))}"
        )

    # Processors of transformers leave the BOS to a tokenizer that begins every text with one, where
    # the template does not write it.
    tokenizer = processor.tokenizer
    with bounded(own, folder / "chat_template.jinja"):
        written = _check_template_runs(tokenizer, own, folder / "chat_template.jinja")
    if _adds_bos(tokenizer) and not written.startswith(str(tokenizer.bos_token)):
        processor.chat_template = "{{- bos_token -}}\n" + own

    # Masks of a template without marks end where generation stops.
    path = folder / "generation_config.json"
    ids = (read_json_object(path) if path.is_file() else {}).get("eos_token_id")
    known = ids if isinstance(ids, list) else [] if ids is None else [ids]
    words = tokenizer.convert_ids_to_tokens(known)
    processor.turn_ends = tuple({*words, tokenizer.eos_token} - {None})
    return processor


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def _image_processor(settings: dict[str, Any]) -> LlavaImageProcessorPil:
    """Return LLaVA's image processor with the settings of any that makes the same pixels.

    A key that the settings lack is what the class that wrote them takes for it.

    Raises:
        ValueError: Another kind of image processor.
    """
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
    name = kind.removesuffix("Pil").removesuffix("Fast")
    name = name.replace("FeatureExtractor", "ImageProcessor")
    if name not in IMAGE_PROCESSORS:
        raise ValueError(
            f"an image processor of the kind {kind} is not one of {', '.join(IMAGE_PROCESSORS)}"
        )
    written = {key: value for key, value in settings.items() if value is not None}
    own = getattr(transformers, f"{name}Pil")(**written)
    found = {key: getattr(own, key, None) for key in _IMAGE_SETTINGS}
    crops = {"do_center_crop": bool(found["do_center_crop"]), "do_pad": bool(own.do_pad)}
    if name != "LlavaImageProcessor":
        crops["do_pad"] = False  # LLaVA alone means padding to a square by it
    given = {key: value for key, value in found.items() if value is not None}
    return LlavaImageProcessorPil(**given | crops)


def _check_template_runs(tokenizer: PreTrainedTokenizerBase, template: str, path: Path) -> str:
    """Return what a template writes; refuse one that fails on content parts and on plain text."""
    parts = [{"type": "image"}, {"type": "text", "text": "a"}]
    for content in (parts, "a"):
        try:
            return tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=template, tokenize=False
            )
        except Exception as error:  # a template is a program, and can fail in any way
            failed = error
    raise ValueError(
        f"{path} cannot write a conversation: give a working template ({_reason(failed)})"
    ) from failed


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
