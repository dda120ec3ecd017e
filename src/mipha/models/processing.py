"""Tokenizer, image processor and chat template as one processor of transformers."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, LlavaProcessor, PretrainedConfig, PreTrainedTokenizerBase
from transformers.image_utils import PILImageResampling

# With torchvision installed, transformers would pick another backend, whose pixels differ in the
# last bits.
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mipha.files import read_json_object
from mipha.models.chat_template import IMAGE_TOKEN, fit_template
from mipha.preflight import template_file
from mipha.recipe import ModelRecipe, StageRecipe


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
    return checked_template(path.read_text(encoding="utf-8"), tokenizer, source=str(path))


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

    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [
        tokenizer.bos_token_id
    ]
    if adds_bos:
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


def set_padding(processor: LlavaProcessor, model: ModelRecipe, stage: StageRecipe) -> None:
    """Pad or squash images as a stage asks for: as the model does, unless the stage says it."""
    own = stage.pad_to_square
    processor.image_processor.do_pad = model.pad_to_square if own is None else own


def load_processor(folder: str | Path) -> LlavaProcessor:
    """Load the processor of a saved checkpoint.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Tokenizer or image processor cannot be read, or the chat template fails on every
            conversation.
    """
    folder = Path(folder)
    saved = read_json_object(folder / "processor_config.json")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    try:
        processor = LlavaProcessor(
            image_processor=LlavaImageProcessorPil.from_pretrained(folder, local_files_only=True),
            tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True),
            patch_size=saved["patch_size"],
            vision_feature_select_strategy=saved["vision_feature_select_strategy"],
            num_additional_image_tokens=saved["num_additional_image_tokens"],
            image_token=saved["image_token"],
            chat_template=template,
        )
    except Exception as error:  # the readers answer a damaged file with any kind of exception
        raise ValueError(
            f"tokenizer or image processor of {folder} cannot be read: copy their files again "
            f"({_reason(error)})"
        ) from error

    _check_template_runs(processor.tokenizer, template, folder / "chat_template.jinja")
    return processor


def _check_template_runs(tokenizer: PreTrainedTokenizerBase, template: str, path: Path) -> None:
    """Refuse a template that fails on content parts and on plain text."""
    parts = [{"type": "image"}, {"type": "text", "text": "a"}]
    for content in (parts, "a"):
        try:
            tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=template, tokenize=False
            )
            return
        except Exception as error:  # a template is a program, and can fail in any way
            failed = error
    raise ValueError(
        f"{path} cannot write a conversation: give a working template ({_reason(failed)})"
    ) from failed


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
