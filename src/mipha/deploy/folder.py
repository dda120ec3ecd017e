"""A checkpoint's folder looked at before anything of it is loaded: whole, of the right kind, and with nothing in it that would run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class CheckpointFolder:
    """What the files of a checkpoint say, weights unread.

    Args:
        config: config.json.
        processor: processor_config.json.
        keys: Names of all tensors.
        dtypes: Their types, by the names of torch.
    """

    config: dict[str, Any]
    processor: dict[str, Any]
    keys: frozenset[str]
    dtypes: frozenset[str]


def read_folder(folder: Path) -> CheckpointFolder:
    """Read configs and the headers of the weight files.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is cut short, a pickle or code, another architecture, or the processor does not fit the tower.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which can run code when it is read: save weights as safetensors, and remove it"
            )
        if path.suffix == ".py":
            raise ValueError(
                f"{path} is code, and code that comes with a checkpoint is never run: remove it"
            )
    config = _read_json(folder / "config.json")
    processor = _read_json(folder / "processor_config.json")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        if "auto_map" in _read_json(folder / name):
            raise ValueError(
                f"{folder / name} asks for code of its own (auto_map), which is never run: remove that key"
            )
    if not (folder / "chat_template.jinja").is_file():
        raise FileNotFoundError(
            f"{folder} has no chat_template.jinja, so no conversation can be written for it: put its template there"
        )
    if config.get("model_type") != "llava" or not all(
        isinstance(config.get(part), dict) for part in ("text_config", "vision_config")
    ):
        raise ValueError(
            f"{folder} holds a {config.get('model_type')!r}, not a LLaVA of a tower and a language model: "
            "export it with mipha, or `mipha import` it if it is a released Mipha"
        )
    _check_image(folder, config, processor)
    headers = _headers(folder)
    return CheckpointFolder(config, processor, frozenset(headers), frozenset(headers.values()))


def odd_keys(files: CheckpointFolder) -> list[str]:
    """Names of weights that no LLaVA on the hub has; transformers reads other spellings too, vLLM 0.32 does not."""
    has_inner = files.config["vision_config"].get("model_type") in (
        "clip_vision_model",
        "siglip_vision_model",
    )
    tower = "vision_tower.vision_model." if has_inner else "vision_tower."
    return sorted(
        key
        for key in files.keys
        if not key.startswith(("language_model.", tower, "multi_modal_projector."))
    )


def tokens_per_image(processor: dict[str, Any]) -> int:
    """Placeholders that the processor writes for one image, by the rule of the host's LlavaProcessor."""
    height, width = _pixels(processor)
    patches = (height // processor["patch_size"]) * (width // processor["patch_size"])
    return (
        patches
        + processor["num_additional_image_tokens"]
        - (processor["vision_feature_select_strategy"] == "default")
    )


def _pixels(processor: dict[str, Any]) -> tuple[int, int]:
    image = processor["image_processor"]
    size = image["crop_size" if image.get("do_center_crop") else "size"]
    return size["height"], size["width"]


def _check_image(folder: Path, config: dict[str, Any], processor: dict[str, Any]) -> None:
    """The image that the processor makes is the one that the tower takes."""
    vision = config["vision_config"]
    try:
        written, made = tokens_per_image(processor), (*_pixels(processor), processor["patch_size"])
    except KeyError as error:
        raise ValueError(
            f"{folder / 'processor_config.json'} does not say {error.args[0]!r}: save the processor again"
        ) from error
    wanted = (vision["image_size"], vision["image_size"], vision["patch_size"])
    expected = config.get("image_seq_length", written)
    if made != wanted or written != expected:
        raise ValueError(
            f"{folder}: the processor makes pictures of {made[0]} x {made[1]} pixels, {written} tokens by patches of {made[2]}, "
            f"but the tower wants {wanted[0]} x {wanted[1]}, {expected} tokens by patches of {wanted[2]}: "
            "save processor and model from one build"
        )


def _headers(folder: Path) -> dict[str, str]:
    """Type of every tensor by its name, from the headers of the files."""
    index = folder / "model.safetensors.index.json"
    places = _read_json(index)["weight_map"] if index.is_file() else {}
    headers: dict[str, str] = {}
    for name in sorted(set(places.values())) or ["model.safetensors"]:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}, which holds weights of this model: copy it again, whole"
            )
        try:
            with safe_open(folder / name, framework="pt") as file:
                types = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{folder / name} is cut short, or no safetensors file ({error}): copy it again, whole"
            ) from error
        headers |= {key: _DTYPES.get(dtype, dtype.lower()) for key, dtype in types.items()}
    if missing := sorted(places.keys() - headers.keys()):
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors that {index.name} names, {missing[0]} first: copy its files again, whole"
        )
    return headers


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}: give the whole folder that mipha exported"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again, whole") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: copy it again, whole")
    return content
