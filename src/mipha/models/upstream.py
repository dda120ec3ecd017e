"""Released Mipha and LLaVA-1.5 checkpoints as standard ones, every tensor accounted for.

folder or hub id --config.json--> text config, tower config  -> the standard model, empty
                 --headers------> plan: moved, split, dropped, or refused before a weight is read
                 --weights------> the model; Gemma's image scale goes into the projector -> model, report
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from mipha.files import write_whole
from mipha.models.build import save_checkpoint
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.processing import IMAGE_TOKEN, build_processor, load_template
from mipha.models.upstream_config import (
    Described,
    Pixels,
    check_size,
    describe,
    read_pixels,
    tower_config,
    tower_family,
)
from mipha.models.upstream_files import (
    TOKENIZER_FILES,
    Stored,
    fetch,
    read_headers,
    read_json,
    weight_files,
)
from mipha.models.upstream_keys import Move, Report, plan
from mipha.models.upstream_weights import add_rows, copy_weights, fold_image_scale
from mipha.models.vision_tower import load_vision_tower, num_prefix_tokens
from mipha.recipe import ModelRecipe

_TIED = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
_TOWER, _DINOV2_POSITIONS = (
    "model.vision_tower.",
    "model.vision_tower.embeddings.position_embeddings",
)


@dataclass(frozen=True)
class _Source:
    """A checkpoint whose small files and headers were read and found to go together; no weights yet."""

    folder: Path
    described: Described
    stored: dict[str, Stored]
    tokenizer: PreTrainedTokenizerBase | None
    pixels: Pixels | None
    tower: PreTrainedModel | None
    config: LlavaConfig
    moves: list[Move]
    dtype: torch.dtype


def load_upstream(
    source: str | Path, vision_tower: str | Path | None = None
) -> tuple[LlavaForConditionalGeneration, Report]:
    """Load a released checkpoint as the standard model: float32, on the CPU, ready to answer.

    Images enter as `model.config.image_token_id`, repeated `model.config.image_seq_length` times.

    Args:
        source: Folder or hub id, safetensors.
        vision_tower: Folder or hub id of the tower, where the checkpoint only names one; null: the one that it names.

    Raises:
        FileNotFoundError: A file is missing, or the hub cannot be reached.
        ValueError: A file is damaged or a pickle, the architecture is not a known one, or a tensor is not accounted for.
    """
    read = _read(str(source), vision_tower, complete=False)
    return _load(read, torch.float32, Report(str(source)))


def import_upstream(
    source: str | Path, out: Path, vision_tower: str | Path | None = None
) -> Report:
    """Write a released checkpoint as a standard one, in the type of its weights: model, processor, chat template, report.

    Args:
        source: Folder or hub id, safetensors.
        out: New folder; it appears when everything is in it.
        vision_tower: As in `load_upstream`.

    Raises:
        FileNotFoundError: A file is missing, or the hub cannot be reached.
        ValueError: As in `load_upstream`, or `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder, or remove it")
    read = _read(str(source), vision_tower, complete=True)
    assert read.tokenizer is not None and read.pixels is not None
    template = load_template("vicuna", read.tokenizer)  # the conversation of all of these releases
    model, report = _load(read, read.dtype, Report(str(source)))
    has_cls = model.config.vision_feature_select_strategy == "default"
    pad = read.described.pad_to_square
    if not pad and has_cls:
        report.notes.append("images are squashed to a square; upstream cut out their middle")
    processor = build_processor(
        read.tokenizer,
        template,
        model.config.vision_config,
        read.pixels.mean,
        read.pixels.std,
        pad,
        int(has_cls),
    )
    beside = out.with_name(f".{out.name}.importing")
    shutil.rmtree(beside, ignore_errors=True)
    save_checkpoint(model, processor, beside)
    write_whole(beside / "import_report.json", json.dumps(asdict(report), indent=2) + "\n")
    beside.rename(out)
    return report


def _read(source: str, vision_tower: str | Path | None, complete: bool) -> _Source:
    """Everything but the weights, cheapest first, so that what cannot be imported is refused at once.

    Args:
        complete: Tokenizer and image processor have to be there too.
    """
    folder = fetch(source, weights=False)
    described = describe(read_json(folder / "config.json"), folder)
    pixels = read_pixels(folder)
    tokenizer = _load_tokenizer(folder, described.text.vocab_size)
    if complete and tokenizer is None:
        raise FileNotFoundError(
            f"{folder} has no tokenizer: copy its tokenizer files (vocab.json, merges.txt, ...) there"
        )
    if complete and pixels is None and described.tower:
        raise FileNotFoundError(
            f"{folder} has no preprocessor_config.json: copy the one of its vision tower there"
        )
    folder = fetch(source, weights=True)
    stored = read_headers(folder)
    family, tower = tower_family(stored), None
    if family is None or described.tower is None:
        tower, pixels = _named_tower(described, vision_tower, pixels, folder)
        vision = tower.config
        tower = None if family else tower  # its weights only where the checkpoint has none
    elif vision_tower is not None:
        raise ValueError(
            f"{source} holds its own vision tower, so {vision_tower} would not be used: leave vision_tower out"
        )
    else:
        vision = tower_config(described, family, pixels.size if pixels else None, folder)
    config = _llava_config(described, vision, tokenizer, "lm_head.bias" in stored, folder)
    with torch.device("meta"):
        wanted = {
            name: tuple(tensor.shape)
            for name, tensor in LlavaForConditionalGeneration(config).state_dict().items()
        }
    if family == "dinov2" and described.tower:  # stored at its own size, resized when it is read
        side = described.tower["image_size"] // vision.patch_size
        wanted[_DINOV2_POSITIONS] = (1, 1 + side**2, vision.hidden_size)
    given = [name for name in wanted if family is None and name.startswith(_TOWER)]
    shapes = {name: one.shape for name, one in stored.items()}
    moves = plan(
        shapes, wanted, vision.num_hidden_layers, _TIED if config.tie_word_embeddings else {}, given
    )
    dtype = reduce(
        torch.promote_types, {stored[move.source].dtype for move in moves if move.targets}
    )
    return _Source(folder, described, stored, tokenizer, pixels, tower, config, moves, dtype)


def _named_tower(
    described: Described, vision_tower: str | Path | None, pixels: Pixels | None, folder: Path
) -> tuple[PreTrainedModel, Pixels]:
    """The tower that a checkpoint was made with, from its own folder or the hub."""
    name = str(vision_tower or described.tower_name)
    if not name:
        raise ValueError(f"{folder} neither holds a vision tower nor names one: give vision_tower")
    try:
        place = fetch(name, weights=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} was made with the vision tower {name!r}: give its folder as vision_tower ({error})"
        ) from error
    weight_files(place)  # a pickle, or a shard that is missing, is said before anything is read
    # A recipe names a language model; of this one only the tower is built.
    recipe = ModelRecipe(
        vision_tower=str(place),
        language_model=described.causal,
        feature_layer=described.feature_layer,
    )
    tower, mean, std = load_vision_tower(recipe, torch.float32)
    if num_prefix_tokens(tower) > 1:
        raise ValueError(
            f"the vision tower {name!r} has tokens besides the patches and one class token: give the one of {folder}"
        )
    if pixels:
        check_size(pixels.size, tower.config.image_size, folder)
    return tower, pixels or Pixels(tower.config.image_size, mean, std)


def _llava_config(
    described: Described,
    vision: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    head_bias: bool,
    folder: Path,
) -> LlavaConfig:
    has_cls = not vision.model_type.startswith("siglip")
    if described.features != "patch" and has_cls:
        raise ValueError(
            f"{folder} reads {described.features!r}: only towers without their class token ('patch') can be imported"
        )
    text = described.text
    text.architectures = [described.causal]  # llama.cpp and vLLM read it
    text.lm_head_bias = head_bias
    if tokenizer is not None:
        text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_image_token_id(tokenizer, text.vocab_size),
        vision_feature_layer=-1,  # pruned to the layer that is read
        vision_feature_select_strategy="default" if has_cls else "full",
        projector_hidden_act="gelu",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


def _image_token_id(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> int:
    if tokenizer is None:
        # Nothing says which rows are unused. The last is where a small vocabulary has its end of text.
        return vocab_size - 2
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def _load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer, from its own files alone: no code, and nothing that the checkpoint's config would make of them."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in files):
        return None
    with tempfile.TemporaryDirectory() as place:
        for file in files:
            shutil.copy(file, place)
        if (folder / "tokenizer_config.json").is_file():
            said = read_json(folder / "tokenizer_config.json")
            said.pop("auto_map", None)
            (Path(place) / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the tokenizer of {folder} cannot be read: copy its files again ({reason})"
            ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = (
            tokenizer.eos_token
        )  # masks come from lengths, so the pad token is never mistaken for an EOS
    last = max(tokenizer.get_vocab().values())
    if last >= vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has ids up to {last}, its model {vocab_size} words: copy the tokenizer of this model"
        )
    return tokenizer


def _load(
    read: _Source, dtype: torch.dtype, report: Report
) -> tuple[LlavaForConditionalGeneration, Report]:
    """The model with the weights in it, and what was done to them."""
    with no_init_weights():
        model = LlavaForConditionalGeneration._from_config(read.config, dtype=dtype)
    model.tie_weights()
    if read.tower is not None:
        model.model.vision_tower.load_state_dict(read.tower.state_dict())
        report.notes.append(
            f"the vision tower is that of {read.tower.name_or_path or read.described.tower_name}"
        )
    copy_weights(model, read.moves, read.stored, report)
    fold_image_scale(model, report)
    add_rows(model, report)
    _settle_special_tokens(model, read, report)
    text = model.config.text_config
    if text.lm_head_bias:
        report.notes.append(
            "lm_head.bias is in the checkpoint, but the stock LLaVA class of transformers has no place for it"
        )
    if text.hidden_act == "gelu_python":
        report.notes.append(
            "the language model runs the exact GELU, as upstream; a runtime that knows only the tanh form is approximate"
        )
    return model.eval(), report


def _settle_special_tokens(
    model: LlavaForConditionalGeneration, read: _Source, report: Report
) -> None:
    said = read_json(read.folder / "config.json").get("eos_token_id")
    text, tokenizer = model.config.text_config, read.tokenizer
    pad = tokenizer.pad_token_id if tokenizer else text.pad_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=text.eos_token_id,
        bos_token_id=text.bos_token_id,
        pad_token_id=pad,
        do_sample=False,
    )
    if tokenizer is None:
        report.notes.append(
            f"there is no tokenizer: id {said} is believed to end a turn, and id {model.config.image_token_id} stands for an image"
        )
    elif said != tokenizer.eos_token_id:
        report.notes.append(
            f"eos_token_id {said} of config.json gave way to the tokenizer's {tokenizer.eos_token_id} ({tokenizer.eos_token})"
        )
