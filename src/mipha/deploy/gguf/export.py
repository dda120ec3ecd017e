"""A run or a checkpoint -> a folder of GGUF files, ready for llama.cpp and Ollama."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlavaConfig

from mipha.deploy.folder import read_folder
from mipha.deploy.gguf.chat_template import gguf_template
from mipha.deploy.gguf.language_model import (
    family_of,
    language_model_fields,
    language_model_tensors,
)
from mipha.deploy.gguf.mmproj import check_mmproj, mmproj_fields, mmproj_tensors
from mipha.deploy.gguf.modelfile import modelfile, readme
from mipha.deploy.gguf.tokenizer import name_for, tokenizer_fields
from mipha.deploy.gguf.writer import KINDS, Field, Tensor, open_weights, write_gguf
from mipha.deploy.parts import hub_licence, parts_of
from mipha.files import write_whole
from mipha.run import model_folder, open_run

QUANTISED = ("q4_0", "q4_k_m", "q5_k_m", "q6_k")
"""What llama.cpp's own quantiser makes of a file in f16."""


def export_gguf(source: Path, out: Path, quantize: Sequence[str] = ("f16",)) -> list[Path]:
    """Write a new folder with the model as GGUF, whole or not at all.

    Args:
        source: A run, or a model folder.
        out: New folder: model-KIND.gguf for every kind, mmproj-f16.gguf (mmproj-f32.gguf where f32 is asked for), Modelfile, README.md.
        quantize: Kinds of the language model's weights: f32, f16, bf16, q8_0, q4_0, q4_k_m, q5_k_m, q6_k.

    Returns:
        The files, the language models first, in the order of `quantize`.

    Raises:
        FileNotFoundError: No such model, the run is not finished, or what writes GGUF is not installed.
        ValueError: Neither a run nor a model, `out` exists, no such kind, or llama.cpp cannot compute this model.
    """
    kinds = list(dict.fromkeys(kind.lower() for kind in quantize))
    if unknown := [kind for kind in kinds if kind not in (*KINDS, *QUANTISED)]:
        raise ValueError(f"no quantisation {unknown[0]!r}: give {', '.join((*KINDS, *QUANTISED))}")
    if not kinds:
        raise ValueError(
            f"no quantisation is asked for: give some of {', '.join((*KINDS, *QUANTISED))}"
        )
    _check_installed()
    folder = model_folder(source)
    if out.exists():
        raise ValueError(f"{out} exists: choose another -o, or remove it")
    processor = read_folder(folder).processor
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    check_mmproj(config)
    recipe = None if folder == Path(source) else open_run(source).recipe
    parts = parts_of(json.loads((folder / "config.json").read_text(encoding="utf-8")), recipe)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ends = _as_list(GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id)
    name = name_for(
        recipe.name if recipe else out.name,
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")),
    )
    about: dict[str, Field] = {"general.name": name, "general.license": hub_licence(parts)}
    fields = about | {"general.type": "model"} | language_model_fields(config.text_config)
    fields |= tokenizer_fields(folder, tokenizer, template, config.text_config.vocab_size, ends)
    fields["tokenizer.chat_template"] = gguf_template(template, tokenizer)
    pixels = processor["image_processor"]
    image_fields = (
        about
        | {"general.type": "mmproj"}
        | mmproj_fields(config, pixels["image_mean"], pixels["image_std"])
    )
    mmproj_kind = "f32" if "f32" in kinds else "f16"
    models, mmproj = [f"model-{kind}.gguf" for kind in kinds], f"mmproj-{mmproj_kind}.gguf"
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        with open_weights(folder) as weights:
            _write_language_models(
                beside, fields, language_model_tensors(weights, config.text_config), kinds, config
            )
            write_gguf(
                beside / mmproj, "clip", image_fields, mmproj_tensors(weights, config), mmproj_kind
            )
        write_whole(
            beside / "Modelfile", modelfile(models[0], mmproj, tokenizer, template, ends, parts)
        )
        write_whole(
            beside / "README.md", readme(out.name, models, mmproj, config, processor, parts)
        )
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [out / file for file in (*models, mmproj, "Modelfile", "README.md")]


def _write_language_models(
    folder: Path,
    fields: dict[str, Field],
    tensors: list[Tensor],
    kinds: list[str],
    config: LlavaConfig,
) -> None:
    """One file for every kind. llama.cpp's own kinds are made from one in full, which goes again if nobody asked for it."""
    architecture = family_of(config.text_config).architecture
    full = [kind for kind in kinds if kind in KINDS]
    # f16 holds more digits than bf16, and fewer sizes: what was bf16 stays so
    made_from = next(
        (kind for kind in ("f32", "f16", "bf16") if kind in full),
        "bf16" if config.dtype == torch.bfloat16 else "f16",
    )
    quantised = [kind for kind in kinds if kind in QUANTISED]
    for kind in dict.fromkeys([*full, *([made_from] if quantised else [])]):
        write_gguf(folder / f"model-{kind}.gguf", architecture, fields, tensors, kind)
    if quantised:
        from mipha.deploy.llama_cpp import quantize_gguf

        for kind in quantised:
            quantize_gguf(folder / f"model-{made_from}.gguf", folder / f"model-{kind}.gguf", kind)
        if made_from not in full:
            (folder / f"model-{made_from}.gguf").unlink()


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _check_installed() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise FileNotFoundError(
            "writing GGUF needs the package gguf: pip install 'mipha-vlm[gguf]'"
        ) from error
