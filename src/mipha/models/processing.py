"""Tokenizer, image processor and chat template as one processor of transformers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Idefics3Processor,
    LlavaNextProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import PILImageResampling

# With torchvision installed, transformers would pick another backend, whose pixels differ in the
# last bits.
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from mipha.checkpoint_files import read_chat_template, read_processor, read_template
from mipha.files import read_json_object, write_whole
from mipha.geometry import (
    Anyres,
    Native,
    Shuffled,
    Square,
    Tiles,
    geometry_of,
    read_geometry,
)
from mipha.models.chat_template import IMAGE_TOKEN, fit_template, template_forms
from mipha.preflight import template_file
from mipha.recipe import CheckpointRecipe, ModelRecipe, RegionForm, StageRecipe
from mipha.rendering import is_panic, write_chat

IMAGE_PROCESSORS = (
    "LlavaImageProcessor",
    "CLIPImageProcessor",
    "SiglipImageProcessor",
    "BitImageProcessor",
    "ViTImageProcessor",
)
"""Kinds of image processors whose pixels LLaVA's own makes too, bit for bit."""

_IDEFICS3_MARKS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")

_IMAGE_SETTINGS = (
    *("do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "max_tiles"),
)


def load_template(
    name: str, tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN
) -> str:
    """Load a chat template; it writes the BOS of a tokenizer that begins every text with one.

    Args:
        name: Name in the catalog, or a .jinja file.
        tokenizer: Tokenizer that will apply it.
        image_token: Placeholder that it has to write for an image.

    Raises:
        FileNotFoundError: No such template.
        ValueError: As `checked_template`.
    """
    path = template_file(name)
    return checked_template(read_template(path), tokenizer, str(path), image_token)


def checked_template(
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    image_token: str = IMAGE_TOKEN,
) -> str:
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
    return fit_template(template, tokenizer, source, image_token)


def build_processor(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    vision: PretrainedConfig,
    mean: list[float],
    std: list[float],
    pad_to_square: bool,
    num_prefix_tokens: int,
    recipe: ModelRecipe | None = None,
) -> LlavaProcessor:
    """Return a processor whose image tokens agree with the tower; of the class that it is for.

    Args:
        tokenizer: Tokenizer with the image token.
        template: Chat template.
        vision: Config of the tower in the model: `image_size` and `patch_size`, pixels.
        mean: Mean of the pixels per channel, of values in 0..1.
        std: Deviation of the pixels per channel.
        pad_to_square: Whether images are padded with the mean colour; otherwise squashed.
        num_prefix_tokens: Tokens that the tower puts before its patches; the first of them, the
            class token, is left out.
        recipe: How images enter; None: as one square.
    """
    kind = model_type_of(recipe)
    if kind == "idefics3":
        assert recipe is not None and recipe.shuffle is not None
        side, patches = vision.image_size, vision.image_size // vision.patch_size
        pixels = Idefics3ImageProcessorPil(
            size={"longest_edge": math.isqrt(recipe.tiles) * side},
            max_image_size={"longest_edge": side},
            do_image_splitting=recipe.tiles > 1,
            resample=PILImageResampling.LANCZOS,  # the one that llama.cpp has
            image_mean=mean,
            image_std=std,
        )
        return Idefics3Processor(
            pixels,
            tokenizer,
            image_seq_len=(patches // recipe.shuffle) ** 2,
            chat_template=template,
        )
    if kind == "lfm2_vl":
        assert recipe is not None
        return _native_processor(tokenizer, template, vision, mean, std, recipe)

    size = {"height": vision.image_size, "width": vision.image_size}
    options = {
        "size": size,
        "crop_size": size,
        "image_mean": mean,
        "image_std": std,
        "resample": PILImageResampling.BICUBIC,
    }
    settings = {
        "tokenizer": tokenizer,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": "default" if num_prefix_tokens else "full",
        "num_additional_image_tokens": num_prefix_tokens,
        "image_token": IMAGE_TOKEN,
        "chat_template": template,
    }
    if kind == "llava_next":
        assert recipe is not None
        canvases = grids(vision.image_size, recipe.tiles)
        return LlavaNextProcessor(
            LlavaNextImageProcessorPil(**options, image_grid_pinpoints=canvases), **settings
        )
    if recipe is not None and recipe.image == "tiles":
        options["max_tiles"] = recipe.tiles  # stock transformers keeps it and does not read it
    image_processor = LlavaImageProcessorPil(do_pad=pad_to_square, do_center_crop=False, **options)
    return LlavaProcessor(image_processor, **settings)


def _native_processor(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    vision: PretrainedConfig,
    mean: list[float],
    std: list[float],
    recipe: ModelRecipe,
) -> PlainProcessor:
    """Return a processor with the settings of the stock one, which needs torchvision."""
    least, most = recipe.image_tokens
    image = {
        "image_processor_type": "Lfm2VlImageProcessor",
        "do_image_splitting": False,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "downsample_factor": 2,
        "encoder_patch_size": vision.patch_size,
        "image_mean": mean,
        "image_std": std,
        "max_image_tokens": most,
        "max_num_patches": 4 * most,
        "max_pixels_tolerance": 2.0,
        "max_tiles": 1,
        "min_image_tokens": least,
        "min_tiles": 1,
        "resample": int(PILImageResampling.BILINEAR),
        "rescale_factor": 1 / 255,
        "return_row_col_info": False,
        "size": {"height": 512, "width": 512},
        "tile_size": 512,
        "use_thumbnail": True,
    }
    settings = {"image_processor": image, "processor_class": "Lfm2VlProcessor"}
    return PlainProcessor(NativeImageProcessor(image), tokenizer, template, settings)


def model_type_of(recipe: ModelRecipe | None) -> str:
    """Return the `model_type` of the class that reads images as a recipe says."""
    if recipe is None or recipe.image == "square":
        return "llava"
    if recipe.image == "tiles":
        return "llava" if recipe.shuffle is None else "idefics3"
    return {"anyres": "llava_next", "native": "lfm2_vl"}[recipe.image]


def marks_of(recipe: ModelRecipe | None) -> list[str]:
    """Return the tokens that stand around images, beside the placeholder."""
    kind = model_type_of(recipe)
    if kind == "idefics3":
        places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
        return [*_IDEFICS3_MARKS, *places]
    return ["<|image_start|>", "<|image_end|>"] if kind == "lfm2_vl" else []


def grids(side: int, max_tiles: int) -> list[list[int]]:
    """Return all canvases of at most so many tiles, [height, width] in pixels."""
    return [
        [rows * side, columns * side]
        for rows in range(1, max_tiles + 1)
        for columns in range(1, max_tiles // rows + 1)
    ]


def set_padding(
    processor: LlavaProcessor, model: ModelRecipe | CheckpointRecipe, stage: StageRecipe
) -> None:
    """Pad or squash images as a stage asks for; else as the model's recipe or checkpoint does.

    Raises:
        ValueError: The stage asks for it, and the images of this model keep their shape.
    """
    own = stage.pad_to_square
    if own is not None and not isinstance(geometry_of(processor), (Square, Tiles)):
        raise ValueError(
            f"pad_to_square={str(own).lower()} of a stage is for images as squares, and those of "
            f"this model are {geometry_of(processor).kind}: leave it out"
        )
    if own is None and isinstance(model, ModelRecipe):
        own = model.pad_to_square
    if own is not None and isinstance(geometry_of(processor), (Square, Tiles)):
        processor.image_processor.do_pad = own


class PlainProcessor:
    """A tokenizer, an image processor and a chat template, for classes that need torchvision.

    The stock processors of LLaVA-OneVision and LFM2-VL cannot be made without it. This one has what
    the program uses, and writes their files again.

    Args:
        image_processor: Image processor that works with Pillow.
        tokenizer: Tokenizer with the marks of the class.
        chat_template: Chat template.
        settings: Content of processor_config.json.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str,
        settings: dict[str, Any],
    ) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.chat_template, self._settings = chat_template, settings
        self.image_token = settings.get("image_token", IMAGE_TOKEN)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        for name, value in settings.items():
            if name not in ("image_processor", "video_processor", "processor_class"):
                setattr(self, name, value)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files of the stock processor."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        text = json.dumps(self._settings, indent=2, sort_keys=True) + "\n"
        write_whole(folder / "processor_config.json", text)
        write_whole(folder / "chat_template.jinja", self.chat_template)

    def decode(self, *arguments: Any, **options: Any) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(*arguments, **options)


class NativeImageProcessor:
    """The image processor of LFM2-VL, with Pillow; pixels differ by two of 256 levels at most.

    Args:
        settings: Content of `image_processor` in processor_config.json.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)
        self.image_mean, self.image_std = settings["image_mean"], settings["image_std"]
        self._geometry = read_geometry({"image_processor": settings})
        self._resample = Image.Resampling(settings.get("resample", Image.Resampling.BILINEAR))
        self._scale = settings.get("rescale_factor", 1 / 255) if self._does("rescale") else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings."""
        return dict(self._settings)

    def _does(self, what: str) -> bool:
        return self._settings.get(f"do_{what}") is not False

    def __call__(
        self, images: Sequence[Image.Image] | Image.Image, return_tensors: str = "pt"
    ) -> dict[str, Tensor]:
        """Return the patches of all tiles of some upright RGB images.

        Returns:
            `pixel_values` `(tiles, patches, patch x patch x 3)`, padded with zeros to the longest;
            `pixel_attention_mask` `(tiles, patches)`; `spatial_shapes` `(tiles, 2)`, patches high
            and wide.
        """
        images = [images] if isinstance(images, Image.Image) else images
        tiles = [self._patches(tile) for image in images for tile in self._cut(image)]
        longest = max(high * wide for _, (high, wide) in tiles)
        pixels = torch.zeros(len(tiles), longest, tiles[0][0].shape[1])
        mask = torch.zeros(len(tiles), longest, dtype=torch.int32)
        for number, (values, (high, wide)) in enumerate(tiles):
            pixels[number, : high * wide] = torch.from_numpy(values)
            mask[number, : high * wide] = 1
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor([shape for _, shape in tiles]),
        }

    def _cut(self, image: Image.Image) -> list[Image.Image]:
        """Return the tiles row by row, and the whole image."""
        geometry = self._geometry
        whole = image.resize(geometry.resized(*image.size), self._resample)
        rows, columns = geometry.grid(*image.size)
        if rows * columns == 1:
            return [whole]
        side = geometry.side
        scaled = image.resize((columns * side, rows * side), self._resample)
        tiles = [
            scaled.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
            for row in range(rows)
            for column in range(columns)
        ]
        return [*tiles, whole] if geometry.has_whole else tiles

    def _patches(self, tile: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Return a tile as `(patches, patch x patch x 3)`, and its patches high and wide."""
        patch = self._geometry.patch
        values = np.asarray(tile, np.float32) * np.float32(self._scale)  # (height, width, 3)
        if self._does("normalize"):
            values = (values - np.float32(self.image_mean)) / np.float32(self.image_std)
        high, wide = tile.height // patch, tile.width // patch
        blocks = values.reshape(high, patch, wide, patch, 3).transpose(0, 2, 1, 3, 4)
        return blocks.reshape(high * wide, patch * patch * 3).astype(np.float32), (high, wide)


def load_processor(
    folder: str | Path, template: str | None = None, source: Path | None = None
) -> LlavaProcessor:
    """Load the processor of a saved checkpoint; one of another class has the same attributes.

    Args:
        folder: Checkpoint of any layout that `read_processor` knows.
        template: Chat template in place of the checkpoint's own.
        source: File of that template, for messages.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Tokenizer or image processor cannot be read, a mark is not in the tokenizer, or
            the chat template fails on every conversation or takes too long.
    """
    folder = Path(folder)
    saved = read_processor(folder)
    own = read_chat_template(folder) if template is None else template
    if own is None:
        raise FileNotFoundError(
            f"{folder} has no chat_template.jinja: put its template there, or name one"
        )
    if (folder / "config.json").is_file():
        try:
            AutoConfig.from_pretrained(folder, local_files_only=True)  # as the tokenizer's reader
        except Exception as error:
            raise ValueError(
                f"{folder / 'config.json'} cannot be read: copy it again ({_reason(error)})"
            ) from error
    try:
        processor = _read_processor(folder, saved, own)
    except BaseException as error:  # the readers answer a damaged file with any kind of exception
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
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
    _check_marks(processor, folder)
    tokenizer = processor.tokenizer
    own, written = _working_template(processor, own, source or folder / "chat_template.jinja")
    if _adds_bos(tokenizer) and not written.startswith(str(tokenizer.bos_token)):
        own = "{{- bos_token -}}\n" + own
    processor.chat_template = own

    # Masks of a template without marks end where generation stops.
    path = folder / "generation_config.json"
    ids = (read_json_object(path) if path.is_file() else {}).get("eos_token_id")
    known = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if strange := [one for one in known if type(one) is not int or not 0 <= one < 2**31]:
        raise ValueError(f"{path} has eos_token_id={strange[0]!r}, which is no id of a token")
    words = tokenizer.convert_ids_to_tokens(known)
    processor.turn_ends = tuple({*words, tokenizer.eos_token} - {None})
    return processor


def _read_processor(folder: Path, saved: dict[str, Any], template: str) -> Any:
    """Return the processor of a folder, in the class that works with Pillow alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    options = {"tokenizer": tokenizer, "chat_template": template}
    kind, image = type(read_geometry(saved)), saved["image_processor"]

    if kind is Shuffled:
        pixels = Idefics3ImageProcessorPil(**_settings(image))
        return Idefics3Processor(pixels, image_seq_len=saved["image_seq_len"], **options)
    if kind is Native:
        return PlainProcessor(NativeImageProcessor(image), settings=saved, **options)
    if kind is Anyres and "vision_aspect_ratio" in saved:
        pixels = LlavaOnevisionImageProcessorPil(**_settings(image))
        return PlainProcessor(pixels, settings=saved, **options)

    settings = {
        "patch_size": saved["patch_size"],
        "vision_feature_select_strategy": saved["vision_feature_select_strategy"],
        "num_additional_image_tokens": saved["num_additional_image_tokens"],
        "image_token": saved.get("image_token", IMAGE_TOKEN),
    }
    if kind is Anyres:
        return LlavaNextProcessor(
            LlavaNextImageProcessorPil(**_settings(image)), **options, **settings
        )
    return LlavaProcessor(_image_processor(image), **options, **settings)


def _settings(image: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an image processor without the name of its class."""
    return {key: value for key, value in image.items() if key != "image_processor_type"}


def _check_marks(processor: Any, folder: Path) -> None:
    """Refuse a tokenizer that splits a mark: every count of tokens would be off."""
    geometry = geometry_of(processor)
    if isinstance(geometry, Tiles):
        return
    marks = {processor.image_token}
    for size in ((1, 1), (geometry.side * 8, geometry.side * 8), (8 * geometry.side, 1)):
        text = geometry.bounded_span(*size).text
        marks |= set(re.findall(r"<[^<>\s]+>", text.replace(IMAGE_TOKEN, "")))
    known = processor.tokenizer.get_vocab()
    if absent := sorted(marks - set(known)):
        raise ValueError(
            f"the tokenizer of {folder} lacks {len(absent)} marks that stand around images, such "
            f"as {absent[0]}: save the processor again with a tokenizer that has them"
        )


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


def _working_template(processor: Any, template: str, path: Path) -> tuple[str, str]:
    """Return a template that takes content parts, and what it writes; one made for text gets text.

    Raises:
        ValueError: It fails on both.
    """
    parts = [{"type": "image"}, {"type": "text", "text": "a"}]
    messages = [{"role": "user", "content": parts}]
    found: list[tuple[str, str]] = []
    errors = []
    for candidate in template_forms(template, processor.image_token):
        try:
            text = write_chat(processor.tokenizer, messages, candidate, path)
        except ValueError as error:
            errors.append(error)
            continue
        found.append((candidate, text))
        if processor.image_token in text:
            return candidate, text
    if not found:
        raise errors[0]
    return found[0]


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
