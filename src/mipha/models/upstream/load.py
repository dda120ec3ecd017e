"""Load a released checkpoint as the standard model, or write it as a standard checkpoint.

folder or hub id --config.json--> configs of the parts --compose--> the standard model, empty
                 --headers------> plan: moved, split, dropped, or refused before a weight is read
                 --weights------> the model, filled; Gemma's image scale goes into the projector
                                  -> model, report
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from mipha.checkpoint_files import (
    DTYPES,
    StoredTensor,
    check_sizes,
    read_config,
    read_headers,
    refuse_links,
    weight_files,
)
from mipha.files import read_json_object, whole_folder, write_whole
from mipha.models.build import SpecialTokens, join_parts, save_checkpoint
from mipha.models.checkpoint_folder import TOKENIZER_FILES, fetch
from mipha.models.language_model import add_image_token, with_pad_token
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.processing import build_processor, load_template
from mipha.models.upstream.config import (
    Described,
    Pixels,
    check_size,
    describe,
    read_pixels,
    tower_config,
    tower_family,
)
from mipha.models.upstream.tensors import (
    Move,
    Report,
    add_rows,
    copy_weights,
    fold_image_scale,
    plan,
)
from mipha.models.vision_tower import TOWERS, load_vision_tower, num_prefix_tokens
from mipha.recipe import ModelRecipe

_TIED = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
_TOWER = "model.vision_tower."
_DINOV2_POSITIONS = "model.vision_tower.embeddings.position_embeddings"


@dataclass(frozen=True)
class _Planned:
    """A checkpoint whose small files and headers fit together; no weights are read yet.

    Args:
        folder: Local folder.
        described: Content of its config.json.
        written_eos: EOS id in its config.json, which may be wrong.
        stored: Every tensor by name.
        tokenizer: Tokenizer; None where the checkpoint has none.
        pixels: Image processor; None where the checkpoint has none.
        tower: Tower with weights, where the checkpoint has none of its own.
        config: Config of the standard model.
        generation: Its generation config.
        moves: Fate of every tensor.
        dtype: Type of the weights.
    """

    folder: Path
    described: Described
    written_eos: int | None
    stored: dict[str, StoredTensor]
    tokenizer: PreTrainedTokenizerBase | None
    pixels: Pixels | None
    tower: PreTrainedModel | None
    config: LlavaConfig
    generation: GenerationConfig
    moves: list[Move]
    dtype: torch.dtype


def load_upstream(
    source: str | Path, vision_tower: str | Path | None = None
) -> tuple[LlavaForConditionalGeneration, Report]:
    """Load a released checkpoint as the standard model: float32, on the CPU, ready to answer.

    Images enter as `model.config.image_token_id`, repeated `model.config.image_seq_length` times.

    Args:
        source: Folder or hub id, safetensors.
        vision_tower: Folder or hub id of the tower, where the checkpoint only names one; None for
            the one that it names.

    Raises:
        FileNotFoundError: A file is missing, or the hub cannot be reached.
        ValueError: A file is damaged or a pickle, the architecture is not a known one, or a tensor
            is not accounted for.
    """
    planned = _plan(str(source), vision_tower, complete=False)
    return _load(planned, torch.float32, Report(str(source)))


def import_upstream(
    source: str | Path, out: Path, vision_tower: str | Path | None = None
) -> Report:
    """Write a released checkpoint as a standard one: model, processor, chat template and report.

    The weights keep their type.

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

    planned = _plan(str(source), vision_tower, complete=True)
    assert planned.tokenizer is not None and planned.pixels is not None
    # All of these releases were trained with the vicuna template.
    template = load_template("vicuna", planned.tokenizer)
    model, report = _load(planned, planned.dtype, Report(str(source)))

    has_cls = model.config.vision_feature_select_strategy == "default"
    pad = planned.described.pad_to_square
    if not pad and has_cls:
        report.notes.append("images are squashed to a square; upstream cut out their middle")
    pixels, vision = planned.pixels, model.config.vision_config
    processor = build_processor(
        planned.tokenizer, template, vision, pixels.mean, pixels.std, pad, int(has_cls)
    )

    with whole_folder(out) as partial:
        save_checkpoint(model, processor, partial)
        write_whole(partial / "import_report.json", json.dumps(asdict(report), indent=2) + "\n")
    return report


def _plan(source: str, vision_tower: str | Path | None, complete: bool) -> _Planned:
    """Read everything but the weights, small files first, so that errors come early.

    Args:
        source: Folder or hub id.
        vision_tower: Folder or hub id of the tower; None for the checkpoint's.
        complete: Whether tokenizer and image processor have to be there too.
    """
    # Read the small files.
    folder = fetch(source, weights=False)
    refuse_links(folder)
    content = read_config(folder)
    described = describe(content, folder)
    pixels = read_pixels(folder)
    tokenizer = _load_tokenizer(folder, described.text.vocab_size)
    if complete and tokenizer is None:
        raise FileNotFoundError(
            f"{folder} has no tokenizer: "
            "copy its tokenizer files (vocab.json, merges.txt, ...) there"
        )
    if complete and pixels is None and described.tower:
        raise FileNotFoundError(
            f"{folder} has no preprocessor_config.json: copy the one of its vision tower there"
        )

    # Read the headers, and find the tower: the checkpoint holds it, describes it, or names it.
    folder = fetch(source, weights=True)
    refuse_links(folder)
    stored = read_headers(folder)
    for part in (content, described.tower or {}):
        # Other sizes take no memory on the meta device, and are compared tensor by tensor.
        depth = {"num_hidden_layers": part.get("num_hidden_layers")}
        check_sizes(folder / "config.json", depth, stored)
    family, tower = tower_family(stored), None
    if family is None or described.tower is None:
        tower, pixels = _load_named_tower(described, vision_tower, pixels, folder)
        vision = tower.config
        tower = None if family else tower  # its weights only where the checkpoint has none
    elif vision_tower is not None:
        raise ValueError(
            f"{source} holds its own vision tower, so {vision_tower} would not be used: "
            "leave vision_tower out"
        )
    else:
        vision = tower_config(described, family, pixels.size if pixels else None, folder)
    if described.features != "patch" and not vision.model_type.startswith("siglip"):
        raise ValueError(
            f"{folder} reads {described.features!r}: "
            "only towers without their class token ('patch') can be imported"
        )

    # Compose the standard model on the meta device, and plan how its tensors are filled.
    try:
        model = _compose_empty(described, vision, tokenizer, has_head_bias="lm_head.bias" in stored)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{folder}/config.json describes no model that can be built: "
            f"fix it or copy it again ({error})"
        ) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if family == "dinov2" and described.tower:  # stored at its own size, resized when it is read
        side = described.tower["image_size"] // vision.patch_size
        wanted[_DINOV2_POSITIONS] = (1, 1 + side**2, vision.hidden_size)
    moves = plan(
        stored={name: tensor.shape for name, tensor in stored.items()},
        wanted=wanted,
        tower_layers=vision.num_hidden_layers,
        tied=_TIED if model.config.tie_word_embeddings else {},
        given=[name for name in wanted if family is None and name.startswith(_TOWER)],
    )

    dtypes = [_float_type(stored[move.source]) for move in moves if move.targets]
    return _Planned(
        folder=folder,
        described=described,
        written_eos=content.get("eos_token_id"),
        stored=stored,
        tokenizer=tokenizer,
        pixels=pixels,
        tower=tower,
        config=model.config,
        generation=model.generation_config,
        moves=moves,
        dtype=reduce(torch.promote_types, dtypes),
    )


def _load_named_tower(
    described: Described, vision_tower: str | Path | None, pixels: Pixels | None, folder: Path
) -> tuple[PreTrainedModel, Pixels]:
    """Load the tower that a checkpoint was made with, from its own folder or the hub."""
    name = str(vision_tower or described.tower_name)
    if not name:
        raise ValueError(f"{folder} neither holds a vision tower nor names one: give vision_tower")
    try:
        place = fetch(name, weights=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} was made with the vision tower {name!r}: "
            f"give its folder as vision_tower ({error})"
        ) from error
    weight_files(place)  # refuse a pickle or a missing shard before anything is read

    # A recipe names a language model too; only the tower of this one is built.
    recipe = ModelRecipe(
        vision_tower=str(place),
        language_model=described.causal,
        feature_layer=described.feature_layer,
    )
    tower, mean, std = load_vision_tower(recipe, torch.float32)
    if num_prefix_tokens(tower) > 1:
        raise ValueError(
            f"the vision tower {name!r} has tokens besides the patches and one class token: "
            f"give the one of {folder}"
        )
    if pixels:
        check_size(pixels.size, tower.config.image_size, folder)
    return tower, pixels or Pixels(tower.config.image_size, mean, std)


def _compose_empty(
    described: Described,
    vision: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    has_head_bias: bool,
) -> LlavaForConditionalGeneration:
    """Compose the standard model of a checkpoint on the meta device."""
    text = described.text
    if tokenizer is None:
        # Without a tokenizer, unused rows are not known. The last row is the end of text in a small
        # vocabulary.
        image = text.vocab_size - 2
        pad = text.pad_token_id
    else:
        image = add_image_token(tokenizer)
        pad = tokenizer.pad_token_id
        # The tokenizer knows the end of a text; the released configs do not.
        text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokens = SpecialTokens(image=image, ends=text.eos_token_id, pad=pad, bos=text.bos_token_id)

    with torch.device("meta"):
        language_model = getattr(transformers, described.causal)._from_config(text)
        head = language_model.get_output_embeddings()
        if (head.bias is not None) != has_head_bias:
            language_model.set_output_embeddings(
                nn.Linear(head.in_features, head.out_features, bias=has_head_bias)
            )
        tower = TOWERS[vision.model_type]._from_config(vision)
        return join_parts(language_model, tower, tokens)


def _load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer from its own files alone.

    So no code runs, and the checkpoint's config, which transformers would read, has no effect.
    """
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in files):
        return None

    with tempfile.TemporaryDirectory() as place:
        for file in files:
            shutil.copy(file, place)
        if (folder / "tokenizer_config.json").is_file():
            config = read_json_object(folder / "tokenizer_config.json")
            config.pop("auto_map", None)
            (Path(place) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the tokenizer of {folder} cannot be read: copy its files again ({reason})"
            ) from error

    last = max(with_pad_token(tokenizer).get_vocab().values())
    if last >= vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has ids up to {last}, its model {vocab_size} words: "
            "copy the tokenizer of this model"
        )
    return tokenizer


def _float_type(stored: StoredTensor) -> torch.dtype:
    """Return a tensor's type in torch.

    Raises:
        ValueError: The type is not a floating point number, so the checkpoint is quantised.
    """
    if stored.code not in DTYPES:
        raise ValueError(
            f"{stored.file} holds weights as {stored.code}: "
            "give the checkpoint that is not quantised"
        )
    return getattr(torch, DTYPES[stored.code])


def _load(
    planned: _Planned, dtype: torch.dtype, report: Report
) -> tuple[LlavaForConditionalGeneration, Report]:
    """Load the weights into the standard model, and report what was done to them."""
    with no_init_weights():
        model = LlavaForConditionalGeneration._from_config(planned.config, dtype=dtype)
    model.tie_weights()
    model.generation_config = planned.generation

    # Fill the model.
    if planned.tower is not None:
        model.model.vision_tower.load_state_dict(planned.tower.state_dict())
        name = planned.tower.name_or_path or planned.described.tower_name
        report.notes.append(f"the vision tower is that of {name}")
    copy_weights(model, planned.moves, planned.stored, report)
    fold_image_scale(model, report)
    add_rows(model, report)

    # Report all other differences.
    report.notes += _notes(model, planned)
    return model.eval(), report


def _notes(model: LlavaForConditionalGeneration, planned: _Planned) -> list[str]:
    notes, tokenizer, text = [], planned.tokenizer, model.config.text_config

    # Compare the ends of a turn.
    if tokenizer is None:
        notes.append(
            f"there is no tokenizer: id {planned.written_eos} is taken as the end of a turn, "
            f"and id {model.config.image_token_id} stands for an image"
        )
    elif planned.written_eos != tokenizer.eos_token_id:
        notes.append(
            f"eos_token_id {planned.written_eos} of config.json is replaced by the tokenizer's "
            f"{tokenizer.eos_token_id} ({tokenizer.eos_token})"
        )

    # Name what stock programs compute otherwise.
    if text.lm_head_bias:
        notes.append(
            "lm_head.bias is in the checkpoint, but the stock LLaVA class of transformers drops it"
        )
    if text.hidden_act == "gelu_python":
        notes.append(
            "the language model runs the exact GELU, as upstream; "
            "a runtime that knows only the tanh form is approximate"
        )
    return notes
