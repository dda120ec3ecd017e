"""Export a run or a checkpoint as a folder of GGUF files for llama.cpp and Ollama.

The folder also gets a README and a Modelfile for Ollama.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from mipha.checkpoint_files import read_chat_template, read_checkpoint
from mipha.deploy.gguf import QUANTISED, parse_kinds
from mipha.deploy.gguf.language_model import (
    family_of,
    language_model_fields,
    language_model_tensors,
)
from mipha.deploy.gguf.mmproj import check_mmproj, mmproj_fields, mmproj_tensors
from mipha.deploy.gguf.tokenizer import check_marks, gguf_template, name_for, tokenizer_fields
from mipha.deploy.gguf.writer import KINDS, Field, Tensor, open_weights, write_gguf
from mipha.deploy.model_card import PretrainedPart, hub_licence, plain, pretrained_parts
from mipha.deploy.runtimes import no_gguf
from mipha.files import read_json_object, whole_folder, write_whole
from mipha.geometry import Native, Shuffled, Tiles, read_geometry
from mipha.models.checkpoint_folder import check_finite_folder
from mipha.models.modeling import MODELS
from mipha.preflight import check_new_folder
from mipha.recipe import Recipe
from mipha.rendering import write_chat
from mipha.run import model_folder, open_run

# Private letters that no language has: the text between them is found by their places.
_SYSTEM, _ASKED, _ANSWERED, _ASKED_AGAIN = "\ue000", "\ue001", "\ue002", "\ue003"


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint to export, weights unread.

    Args:
        folder: Its folder.
        config: Its config.
        processor: Content of processor_config.json.
        tokenizer: Its tokenizer.
        tokenizer_file: Content of tokenizer.json.
        template: Its chat template.
        ends: Tokens that end generation.
        parts: Pretrained models that it was made of.
        name: Name of the model, for llama.cpp.
    """

    folder: Path
    config: PretrainedConfig
    processor: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    tokenizer_file: dict[str, Any]
    template: str
    ends: list[int]
    parts: list[PretrainedPart]
    name: str


def export_gguf(source: Path, out: Path, quantize: Sequence[str] = ("f16",)) -> list[Path]:
    """Write a new folder with the model as GGUF, whole or not at all.

    Args:
        source: A run, or a model folder.
        out: New folder: model-KIND.gguf for every kind, mmproj-f16.gguf (mmproj-f32.gguf where f32
            is asked for), Modelfile, README.md.
        quantize: Kinds of the language model's weights: f32, f16, bf16, q8_0, q4_0, q4_k_m, q5_k_m,
            q6_k.

    Returns:
        The files, the language models first, in the order of `quantize`.

    Raises:
        FileNotFoundError: No such model, or the run is not finished.
        ValueError: Neither a run nor a model, `out` exists, no such kind, weights are not
            finite, or llama.cpp cannot compute this model.
    """
    kinds = parse_kinds(quantize)
    folder = model_folder(source)
    check_new_folder(out)

    # Read everything but the weights; a model that llama.cpp cannot compute is refused here.
    recipe = None if folder == Path(source) else open_run(source).recipe
    model = _read(folder, recipe, out.name)
    fields, image_fields = _fields(model)
    check_finite_folder(folder)

    # Write the files.
    models = [f"model-{kind}.gguf" for kind in kinds]
    mmproj_kind = "f32" if "f32" in kinds else "f16"
    mmproj = f"mmproj-{mmproj_kind}.gguf"
    with whole_folder(out) as partial:
        with open_weights(folder) as weights:
            tensors = language_model_tensors(weights, model.config.text_config)
            _write_language_models(partial, fields, tensors, kinds, model.config)
            tensors = mmproj_tensors(weights, model.config)
            write_gguf(partial / mmproj, "clip", image_fields, tensors, mmproj_kind)
        write_whole(
            partial / "Modelfile",
            modelfile(models[0], mmproj, model.tokenizer, model.template, model.ends, model.parts),
        )
        write_whole(
            partial / "README.md",
            readme(out.name, models, mmproj, model.config, model.processor, model.parts),
        )
    return [out / file for file in (*models, mmproj, "Modelfile", "README.md")]


def _read(folder: Path, recipe: Recipe | None, name: str) -> _Checkpoint:
    files = read_checkpoint(folder)
    if reason := no_gguf(files.config, files.processor):
        raise ValueError(f"{folder} cannot be written as GGUF: {reason}")
    config = MODELS[files.config["model_type"]].config_class.from_dict(files.config)
    check_mmproj(config)

    tokenizer_file = read_json_object(folder / "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    check_marks(tokenizer, files.geometry)
    ends = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    return _Checkpoint(
        folder=folder,
        config=config,
        processor=files.processor,
        tokenizer=tokenizer,
        tokenizer_file=tokenizer_file,
        template=str(read_chat_template(folder)),  # `read_checkpoint` has found one
        ends=ends if isinstance(ends, list) else [] if ends is None else [ends],
        parts=pretrained_parts(files.config, recipe),
        name=name_for(recipe.name if recipe else name, tokenizer_file),
    )


def _fields(model: _Checkpoint) -> tuple[dict[str, Field], dict[str, Field]]:
    """Return the fields of the language model's files, and those of the mmproj."""
    about: dict[str, Field] = {
        "general.name": model.name,
        "general.license": hub_licence(model.parts),
    }

    text = model.config.text_config
    fields = about | {"general.type": "model"} | language_model_fields(text)
    fields |= tokenizer_fields(
        model.tokenizer_file, model.tokenizer, model.template, text.vocab_size, model.ends
    )
    fields["tokenizer.chat_template"] = gguf_template(model.template, model.tokenizer)

    image_fields = about | {"general.type": "mmproj"}
    image_fields |= mmproj_fields(model.config, model.processor)
    return fields, image_fields


def _write_language_models(
    folder: Path,
    fields: dict[str, Field],
    tensors: list[Tensor],
    kinds: list[str],
    config: PretrainedConfig,
) -> None:
    """Write one file for every kind.

    llama.cpp's kinds are made from a file in full precision, which is deleted unless asked for.
    """
    architecture = family_of(config.text_config).architecture
    full = [kind for kind in kinds if kind in KINDS]
    # f16 holds more digits than bf16, and a smaller range: weights in bf16 stay in it.
    made_from = next(
        (kind for kind in ("f32", "f16", "bf16") if kind in full),
        "bf16" if config.dtype == torch.bfloat16 else "f16",
    )
    quantised = [kind for kind in kinds if kind in QUANTISED]
    for kind in dict.fromkeys([*full, *([made_from] if quantised else [])]):
        write_gguf(folder / f"model-{kind}.gguf", architecture, fields, tensors, kind)

    if quantised:
        from mipha.deploy.llama_cpp.quantize import quantize_gguf

        for kind in quantised:
            quantize_gguf(folder / f"model-{made_from}.gguf", folder / f"model-{kind}.gguf", kind)
        if made_from not in full:
            (folder / f"model-{made_from}.gguf").unlink()


def modelfile(
    model: str,
    mmproj: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    ends: list[int],
    parts: Sequence[PretrainedPart],
) -> str:
    """Return Ollama's description of the model.

    Args:
        model: File of the language model.
        mmproj: File of tower and projector.
        tokenizer: The checkpoint's tokenizer.
        template: The checkpoint's chat template, from which Ollama's is derived.
        ends: Tokens that end generation.
        parts: Pretrained parts whose licences are named.

    Source: Ollama `docs/modelfile.md` and `docs/template.md`; `server/prompt.go` for `[img-0]`,
        which it writes right before the words of a message with an image.
    """
    stops = tokenizer.convert_ids_to_tokens(ends)
    lines = [
        f"FROM ./{model}",
        f"FROM ./{mmproj}",
        f'TEMPLATE """{_go_template(tokenizer, template)}"""',
        "PARAMETER temperature 0",
    ]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines.append(f'LICENSE """{_licences(parts)}"""')
    return "\n".join(lines) + "\n"


def _go_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Return the chat template in Go's language, from the text that it writes around words."""

    def between(turns: list[tuple[str, str]]) -> list[str]:
        messages = [{"role": role, "content": text} for role, text in turns]
        text = write_chat(tokenizer, messages, template, "the chat template", prompt=True)
        pieces = []
        for _, word in turns:
            piece, text = text.split(word, 1)
            pieces.append(piece)
        return [*pieces, text]

    # Render conversations, and take the text between the words.
    first, to_answer, to_question, prompt = between(
        [("user", _ASKED), ("assistant", _ANSWERED), ("user", _ASKED_AGAIN)]
    )
    try:
        system, after_system, _ = between([("system", _SYSTEM), ("user", _ASKED)])
        system += "{{ .Content }}"
    except ValueError:  # some templates refuse a system turn
        system, after_system = "", first
    parts = [{"type": "image"}, {"type": "text", "text": _ASKED}]
    image = write_chat(
        tokenizer, [{"role": "user", "content": parts}], template, "the chat template"
    )
    after_image = image.split(_ASKED)[0].rpartition("<image>")[2]

    # Ollama writes the BOS itself.
    bos = tokenizer.bos_token
    if bos and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        first, system = first.removeprefix(bos), system.removeprefix(bos)
        after_system = after_system.removeprefix(bos)

    words = (
        '{{ if and (ge (len .Content) 7) (eq (slice .Content 0 5) "[img-") }}'
        "{{ slice .Content 0 7 }}"
        f"{after_image}{{{{ slice .Content 7 }}}}{{{{ else }}}}{{{{ .Content }}}}{{{{ end }}}}"
    )
    return (
        '{{ $last := "" }}{{ range .Messages }}'
        f'{{{{ if eq .Role "system" }}}}{system}'
        f'{{{{ else if eq .Role "user" }}}}{{{{ if eq $last "" }}}}{first}'
        f'{{{{ else if eq $last "system" }}}}{after_system}'
        f"{{{{ else }}}}{to_question}{{{{ end }}}}{words}{prompt}"
        f"{{{{ else }}}}{to_answer.removeprefix(prompt)}{{{{ .Content }}}}{{{{ end }}}}"
        "{{ $last = .Role }}{{ end }}"
    )


def readme(
    name: str,
    models: Sequence[str],
    mmproj: str,
    config: PretrainedConfig,
    processor: Mapping[str, Any],
    parts: Sequence[PretrainedPart],
) -> str:
    """Return the README: how to run the files, and how they differ from the checkpoint."""
    differs = _image_differences(processor)
    if getattr(config, "projector_hidden_act", None) == "gelu":
        differs.append(
            "llama.cpp computes the projector's GELU, as every GELU, by its tanh form, from a "
            "table in 16 bits."
        )
    if config.vision_config.model_type.startswith("clip"):
        differs.append(
            "llama.cpp's LLaVA puts CLIP's class token behind the patches and leaves out the first "
            "patch instead of this token (issue 25814): the first patch of an image, in "
            "the corner, is missing, and the class token stands behind the last. The other patches "
            "and their positions are right. Builds with its pull request 25844 read all patches."
        )
    if family_of(config.text_config).scales_images:
        differs.append(
            "llama.cpp multiplies image features by the root of the language model's width, as it "
            "does words; the projector's last layer is divided by it, so the result is the same."
        )
    files = "\n".join(
        f"- `{model}`: the language model, with its tokenizer and chat template" for model in models
    )
    return f"""# {plain(name)}

A multimodal small language model for llama.cpp and Ollama, exported by mipha.

{files}
- `{mmproj}`: the vision tower and the projector, for any of the language models
- `Modelfile`: for Ollama

## Use

```
llama-server -m {models[0]} --mmproj {mmproj} --jinja
llama-mtmd-cli -m {models[0]} --mmproj {mmproj} --jinja --temp 0 \\
    --image image.jpg -p "What is in the image?"
ollama create {name.lower()} -f Modelfile
```

## What differs from the checkpoint

{chr(10).join(f"- {line}" for line in differs)}

## Licence

{_licences(parts)}
"""


def _image_differences(processor: Mapping[str, Any]) -> list[str]:
    """Return what llama.cpp makes of an image, where the checkpoint makes something else of it."""
    geometry, image = read_geometry(processor), processor["image_processor"]
    behind_mipha = "`mipha serve`, `verify` and `evaluate` prepare images of these files so."
    if isinstance(geometry, Tiles):
        text = geometry.span(2 * geometry.side, 2 * geometry.side).text.replace("\n", "\\n")
        return [
            f"This model was trained on images cut into up to {geometry.max_tiles} tiles of "
            f"{geometry.side} pixels, each an image of its own, with words before them, such as "
            f"`{text}`, and the whole image last. llama.cpp does not cut images: a program "
            f"that sends it a whole image shows the model one tile. {behind_mipha}"
        ]
    if isinstance(geometry, Shuffled):
        return [
            f"A strip longer than {geometry.max_aspect} to 1 is padded on its short sides before "
            f"it is cut. {behind_mipha}"
        ]
    if isinstance(geometry, Native):
        unit = geometry.patch * geometry.shuffle
        return [
            f"llama.cpp rounds the sides of an image to multiples of {unit} pixels, half of it "
            "up, where this model was trained on half to even: a few sizes, such as "
            f"{12 * unit + unit // 2} pixels, take other tokens. Resize images to their final "
            f"size first. {behind_mipha}"
        ]

    colour = tuple(int(255 * mean) for mean in image["image_mean"])
    own = (
        f"pads it to a square with the colour {colour}, then scales it"
        if image.get("do_pad")
        else "cuts out its middle"
        if image.get("do_center_crop")
        else "squashes it"
    )
    same = (
        "as the checkpoint does (Pillow's bicubic rule; seen in b11549)"
        if image.get("resample", Image.Resampling.BICUBIC) == Image.Resampling.BICUBIC
        else f"by Pillow's bicubic rule, and the checkpoint by its rule {image['resample']}"
    )
    return [
        f"llama.cpp scales a square image {same}. It scales an image of another shape first and "
        f"then pads it with the colour (122, 116, 104); the checkpoint {own}. "
        "With images that are prepared in this way, there is no difference."
    ]


def _licences(parts: Sequence[PretrainedPart]) -> str:
    return "; ".join(f"{part.role} ({part.name}): {part.licence or 'not known'}" for part in parts)
