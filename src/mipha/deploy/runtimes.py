"""Judge which programs run a checkpoint exactly, approximately or not at all, and why.

Source: transformers 5.23 `LlavaForConditionalGeneration`; vLLM
    0.32 `model_executor/models/{llava,registry,gemma}.py` and its pull request 36787; llama.cpp
    `tools/mtmd/clip.cpp`, `tools/mtmd/models/llava.cpp`, `src/models/{gemma,gemma2}.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mipha.checkpoint_files import CheckpointFiles
from mipha.geometry import Native, Shuffled, read_geometry

Status = Literal["exact", "approximate", "unsupported"]


@dataclass(frozen=True)
class Runtime:
    """How well one program runs a checkpoint.

    Args:
        name: Name of the program.
        status: Verdict. exact: the same numbers, up to rounding. approximate: it runs, and some
            answers differ. unsupported: it refuses the checkpoint, or computes another model.
        reason: Reason, in a sentence.
    """

    name: str
    status: Status
    reason: str


_VLLM_LANGUAGE_MODELS = {
    "gemma",
    "gemma2",
    "gemma3_text",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
    "stablelm",
}
"""Kinds whose vLLM class names its layers `model` and its head `lm_head`, as checkpoints do."""

_LLAMA_CPP_LANGUAGE_MODELS = _VLLM_LANGUAGE_MODELS | {"phi", "gpt_neox"}
"""Kinds that `deploy/gguf` writes."""

_CLASSES = {
    "llava": "Llava",
    "llava_next": "LlavaNext",
    "llava_onevision": "LlavaOnevision",
    "idefics3": "Idefics3",
    "lfm2_vl": "Lfm2Vl",
}
"""Beginning of the name of each class in transformers, by `model_type`."""

_GREY_OF_CLIP = (122, 116, 104)
"""The colour that llama.cpp pads with in front of a LLaVA projector."""


_LANCZOS = 1
_LFM2_TOKENS = (64, 256)
"""Fewest and most tokens of an image in llama.cpp's LFM2-VL."""


def no_gguf(config: Mapping[str, Any], processor: Mapping[str, Any]) -> str | None:
    """Return why llama.cpp cannot read images as a checkpoint does; None where it can.

    Args:
        config: Content of its config.json.
        processor: Content of its processor_config.json; empty where it is not known.

    Source: llama.cpp b11549 `tools/mtmd/{mtmd,clip,mtmd-image}.cpp`; the differences of
        log-probabilities were measured with it on small random models.
    """
    if config.get("model_type") in ("llava_next", "llava_onevision"):
        return (
            "llama.cpp has no end-of-row and no unpadding: serve this class with transformers "
            "or vLLM"
        )
    if config.get("model_type") not in ("llava", "idefics3", "lfm2_vl") or not processor:
        return None

    image = processor["image_processor"]
    scaled = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    for key, value in scaled.items():
        if abs((image.get(key, value) or 0) - value) > 1e-6:
            return (
                "llama.cpp divides pixels by 255 and then norms them, and its processor does not "
                f"({key} is {image[key]}): serve it with transformers"
            )
    if config["model_type"] == "llava":
        return None

    geometry = read_geometry(processor)
    if 1 in (config.get("scale_factor"), config.get("downsample_factor")):
        return (
            "llama.cpp makes a token of at least 2 x 2 patches in this class, and this model one "
            "of each patch: serve it with transformers"
        )
    if isinstance(geometry, Shuffled):
        if image.get("resample") != _LANCZOS:
            return (
                "llama.cpp scales its tiles by LANCZOS, and its processor does not (resample is "
                f"{image.get('resample')}), which moves log-probabilities by up to 0.2: train with "
                "resample=1, or serve it with transformers"
            )
        if not geometry.splits or geometry.longest_edge < 2 * geometry.side:
            return (
                "llama.cpp writes an image of one tile as a grid and a whole, and its processor "
                "as a whole alone: serve it with transformers"
            )
        if geometry.longest_edge % geometry.side:
            return (
                f"its longest edge of {geometry.longest_edge} pixels is no multiple of its tile of "
                f"{geometry.side}: serve it with transformers"
            )
    if isinstance(geometry, Native):
        least, most = geometry.min_tokens, geometry.max_tokens
        if geometry.max_tiles > 1:
            return (
                "llama.cpp pads tiles with black where this model was trained on stretched ones, "
                "which moves log-probabilities by up to 1.2: serve it with transformers"
            )
        if least < _LFM2_TOKENS[0] or most > _LFM2_TOKENS[1]:
            return (
                f"llama.cpp makes {_LFM2_TOKENS[0]} to {_LFM2_TOKENS[1]} tokens of an image, and "
                f"its processor {least} to {most}: train with model.min_image_tokens="
                f"{_LFM2_TOKENS[0]} and model.max_image_tokens={_LFM2_TOKENS[1]}, or serve it with "
                "transformers"
            )
    return None


def runtimes(
    config: Mapping[str, Any], processor: Mapping[str, Any], odd_keys: Sequence[str] = ()
) -> tuple[Runtime, ...]:
    """Judge how well each program runs a checkpoint.

    Args:
        config: Content of its config.json.
        processor: Content of its processor_config.json.
        odd_keys: Weights under other names than those of a LLaVA on the hub.
    """
    ours = Runtime(
        "mipha", "exact", "it computes the whole checkpoint, in the class it was trained in"
    )
    vllm = (
        Runtime("vLLM", "unsupported", f"it knows no weight of the name {odd_keys[0]}")
        if odd_keys
        else _vllm(config)
    )
    found = (ours, _transformers(config), vllm, _llama_cpp(config, processor))
    if not has_tiles(config, processor):
        return found
    cut = "it gets whole images unless tiles are cut before it, which mipha does"
    return ours, *(
        replace(one, reason=f"{one.reason}; {cut}") if one.status != "unsupported" else one
        for one in found[1:]
    )


def odd_keys(files: CheckpointFiles) -> list[str]:
    """Return the names of weights that no LLaVA on the hub has.

    Transformers reads other spellings too, vLLM 0.32 does not.
    """
    if files.config["model_type"] == "idefics3":
        known: tuple[str, ...] = (
            *("model.vision_model.", "model.connector.", "model.text_model."),
            "lm_head.",
        )
        return sorted(name for name in files.tensors if not name.startswith(known))

    kind = files.config["vision_config"].get("model_type")
    has_inner = kind in ("clip_vision_model", "siglip_vision_model")
    tower = "vision_tower.vision_model." if has_inner else "vision_tower."
    known = ("language_model.", tower, "multi_modal_projector.", "image_newline")
    if files.config["model_type"] == "lfm2_vl":
        known = (*("model.vision_tower.", "model.multi_modal_projector."),)
        known += ("model.language_model.", "lm_head.")
    return sorted(name for name in files.tensors if not name.startswith(known))


def has_head_bias(config: Mapping[str, Any]) -> bool:
    """Return whether the language model's head has a bias; every Phi has one."""
    text = config["text_config"]
    return bool(text.get("lm_head_bias", text.get("model_type") == "phi"))


def _transformers(config: Mapping[str, Any]) -> Runtime:
    if has_head_bias(config):
        return Runtime(
            "transformers",
            "approximate",
            "its class has no bias in the head and drops this model's: load it with mipha",
        )
    name = _CLASSES[config["model_type"]]
    return Runtime(
        "transformers", "exact", f"it is a checkpoint of its own {name}ForConditionalGeneration"
    )


def _vllm(config: Mapping[str, Any]) -> Runtime:
    text = config["text_config"]
    kind = text.get("model_type")
    whole = config.get("model_type", "llava")
    wanted = {"idefics3": "llama", "lfm2_vl": "lfm2"}.get(whole)
    if wanted:
        status: Status = "exact" if kind == wanted else "unsupported"
        reason = f"its {_CLASSES[whole]} takes a {wanted!r} language model"
        return Runtime(
            "vLLM", status, reason if kind == wanted else f"{reason}, and this is a {kind!r}"
        )
    if reason := _unreadable_tower(config):
        return Runtime("vLLM", "unsupported", reason)
    if config["vision_config"].get("tie_last_hidden_states"):
        return Runtime(
            "vLLM",
            "unsupported",
            "its LLaVA leaves out the norm behind the tower's last layer, which this model reads",
        )

    if kind in ("phi", "gpt_neox"):
        return Runtime(
            "vLLM",
            "unsupported",
            f"its version 0.32 has no class of its own for a {kind!r}, and its LLaVA calls that of "
            "transformers without a batch, which fails at the first token",
        )
    if kind == "gpt2":
        return Runtime(
            "vLLM",
            "unsupported",
            f"its LLaVA asks for layers named `model`, "
            f"which its class for a {kind!r} does not have",
        )
    if kind not in _VLLM_LANGUAGE_MODELS:
        return Runtime("vLLM", "unsupported", f"nothing is known of a {kind!r} inside its LLaVA")
    if not text.get("architectures"):
        return Runtime(
            "vLLM",
            "unsupported",
            "text_config.architectures is not set, and it picks the language model by that",
        )

    if kind in ("gemma", "gemma2"):
        return Runtime(
            "vLLM",
            "approximate",
            "versions before its pull request 36787 (March 2026) scale image features "
            "as they scale words; later ones are exact",
        )
    return Runtime(
        "vLLM",
        "exact",
        "it reads the tower, the projector and the language model",
    )


def _llama_cpp(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Runtime:
    kind, whole = config["text_config"].get("model_type"), config.get("model_type", "llava")
    if reason := no_gguf(config, processor):
        return Runtime("llama.cpp", "unsupported", reason)
    if whole == "llava" and (reason := _unreadable_tower(config)):
        return Runtime("llama.cpp", "unsupported", reason)
    if kind not in _LLAMA_CPP_LANGUAGE_MODELS:
        return Runtime(
            "llama.cpp", "unsupported", f"nothing is known of a {kind!r} behind its LLaVA projector"
        )
    if whole == "idefics3":
        reason = "as GGUF, it cuts and scales images by the rules of Idefics3"
        return Runtime("llama.cpp", "exact", reason)
    if whole == "lfm2_vl":
        return Runtime(
            "llama.cpp",
            "approximate",
            "as GGUF, it rounds half a token up where this model rounds to even; exact behind "
            "mipha, which sends images in their final size",
        )

    # Tiles come in the tower's own size, which nobody resizes or pads.
    pixels, reasons = processor.get("image_processor", processor), []
    is_cut = has_tiles(config, processor)
    if not is_cut:
        reasons.append("resizes images that are not square differently from PIL")
    if config.get("projector_hidden_act", "gelu") == "gelu":
        reasons.append("computes the projector's GELU by its tanh form")
    if not is_cut and not pixels.get("do_pad"):
        reasons.append("pads images to a square where this model squashes them")
    elif not is_cut and _colour(pixels.get("image_mean", ())) != _GREY_OF_CLIP:
        reasons.append("pads images in CLIP's grey")
    if str(config["vision_config"].get("model_type")).startswith("clip"):
        reasons.append(
            "leaves out the first patch and puts the class token behind the last (its issue 25814)"
        )
    if not reasons:
        return Runtime("llama.cpp", "exact", "as GGUF, it computes the same numbers")

    *first, last = reasons
    reason = f"{', '.join(first)} and {last}" if first else last
    return Runtime("llama.cpp", "approximate", f"as GGUF, it {reason}")


def has_tiles(config: Mapping[str, Any], processor: Mapping[str, Any]) -> bool:
    """Return whether images are cut into tiles that are images of one LLaVA."""
    return config.get("model_type") == "llava" and bool(
        processor.get("image_processor", {}).get("max_tiles")
    )


def _colour(mean: Sequence[float]) -> tuple[int, ...]:
    return tuple(int(255 * value) for value in mean)


def _unreadable_tower(config: Mapping[str, Any]) -> str | None:
    """Return why vLLM and llama.cpp cannot read the tower: both know CLIP and SigLIP alone."""
    kind = str(config["vision_config"].get("model_type")).removesuffix("_vision_model")
    return (
        None
        if kind in ("clip", "siglip")
        else f"its LLaVA has no {kind!r} tower, only CLIP and SigLIP"
    )
