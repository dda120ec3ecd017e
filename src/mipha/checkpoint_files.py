"""Find the files of a checkpoint folder, check that all are there, and read their headers.

Nothing here loads a weight, a pickle, code or torch: config and processor are JSON, and a
safetensors header is JSON too.

    is_whole(folder)            whether config and every weight file are there
    read_headers(folder)        every tensor's file, shape and dtype; pickles are refused
    read_checkpoint(folder)     all of a LLaVA's folder, or the reason why it is refused

`read_checkpoint` is the gate for a folder that a stranger made: load, chat, evaluate, serve, verify
and export pass it. An import reads another layout and passes its parts: `refuse_links`, `read_json`
with finite numbers, `check_sizes`. `models/checkpoint_folder.py` finds a folder by name and loads
the weights.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mipha.files import read_json_object
from mipha.geometry import Anyres, Geometry, Native, Shuffled, Square, Tiles, read_geometry

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""Suffixes of files that may hold pickles: reading one can run code."""

INDEX = "model.safetensors.index.json"
"""File that names the shard of every tensor, where the weights are in several files."""

CONFIGS = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "generation_config.json",
)
"""Files whose keys are settings."""

CLASSES = ("llava", "llava_next", "llava_onevision", "idefics3", "lfm2_vl")
"""Values of `model_type` of the multimodal models that can be loaded."""

_CROPPING = ("CLIP", "Bit", "LlavaImage", "LlavaNext", "DeiT")
"""Image processors that crop where their file does not say whether they do."""

_DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Idefics3": (
        {
            "do_image_splitting": True,
            "size": {"longest_edge": 4 * 364},
            "max_image_size": {"longest_edge": 364},
            "resample": 1,
        },
        {"image_seq_len": 169},
    ),
    "LlavaOnevision": ({}, {"vision_aspect_ratio": "anyres_max_9"}),
    "Lfm2Vl": (
        {
            "do_image_splitting": True,
            "downsample_factor": 2,
            "encoder_patch_size": 16,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "max_image_tokens": 256,
            "max_pixels_tolerance": 2.0,
            "max_tiles": 10,
            "min_image_tokens": 64,
            "min_tiles": 2,
            "resample": 2,
            "tile_size": 512,
            "use_thumbnail": True,
        },
        {},
    ),
}
"""What an image processor, and the processor around it, take for keys that their files lack.

Source: transformers 5.23, the classes of each kind.
"""

TOKENS = ("special_tokens_map.json", "added_tokens.json")
"""JSON files beside tokenizer.json, whose keys may be any words."""

_MOST_COUNT = 100_000
"""Most layers, labels or experts that a config may name; some are made before weights are read."""

_MOST_EDGE = 8_192
"""Longest edge in pixels that an image may be resized to before it is cropped or cut."""

_MOST_GROWTH = 64
"""Most characters that a tokenizer's normalizer may write for one."""

_MOST_BYTES = 2**24
"""Size of a config that is read, and of a chat template; real ones have some kilobytes."""

MAX_TILES = 145
"""Most tiles of one image; more would be a damaged or hostile setting."""

IMPLEMENTATIONS = (None, "eager", "sdpa", "grouped_mm", "batched_mm")
"""Implementations that a config may name; transformers looks for others in packages and the hub."""

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Floating point types: the code in a safetensors header, and the name in torch."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk.

    Args:
        file: The safetensors file that holds it.
        shape: Its shape.
        code: Its dtype as the header writes it, for example BF16.
    """

    file: Path
    shape: tuple[int, ...]
    code: str


@dataclass(frozen=True)
class CheckpointFiles:
    """The content of a LLaVA's folder, weights unread.

    Args:
        config: Content of config.json.
        processor: Settings of the processor, see `read_processor`.
        tensors: Every tensor by its name.
    """

    config: dict[str, Any]
    processor: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def dtypes(self) -> list[str]:
        """Types of the weights, by their names in torch."""
        codes = {tensor.code for tensor in self.tensors.values()}
        return sorted(DTYPES.get(code, code.lower()) for code in codes)

    @property
    def geometry(self) -> Geometry:
        """What an image becomes for this model."""
        return read_geometry(self.processor)


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds a model's config and every weight file that belongs to it.

    Raises:
        ValueError: The index of the shards is damaged.
    """
    if not (folder / "config.json").is_file():
        return False
    if not (folder / INDEX).is_file():
        return (folder / "model.safetensors").is_file()
    return all((folder / name).is_file() for name in _shard_names(folder))


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, after a check that all exist.

    Raises:
        FileNotFoundError: There are none, or some are missing.
        ValueError: The weights are pickles, or the index of the shards is damaged.
    """
    if (folder / INDEX).is_file():
        names = _shard_names(folder)
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{folder} lacks {len(absent)} of {len(names)} shards, such as {absent[0]}: "
                "copy them again"
            )
        return [folder / name for name in names]

    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]

    # There are no weights to read: name the file that is there instead.
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights ({pickles[0]}), and reading a pickle can run code: "
            f"convert them first, with {conversion_command(folder)}"
        )
    if any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} has shards but no {INDEX}: copy it too")
    raise FileNotFoundError(
        f"{folder} has no model.safetensors: give a checkpoint with safetensors weights"
    )


def conversion_command(folder: Path) -> str:
    """Return the shell command that writes a folder's pickled weights as one safetensors file.

    `weights_only=True` lets torch build tensors alone, so no code of the pickle runs.
    """
    program = (
        "import pathlib, sys, torch; from safetensors.torch import save_file; "
        "place = pathlib.Path(sys.argv[1]); "
        "files = sorted(place.glob('pytorch_model*.bin')); "
        "parts = [torch.load(f, map_location='cpu', weights_only=True) for f in files]; "
        "save_file({k: v.clone() for part in parts for k, v in part.items()}, "
        "place / 'model.safetensors', metadata={'format': 'pt'})"
    )
    return f"python -c {shlex.quote(program)} {shlex.quote(str(folder))}"


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Read name, file, shape and dtype of all tensors; a file that was cut short shows here.

    Raises:
        FileNotFoundError: There are no weights, or a shard that the index names is missing.
        ValueError: The weights are pickles, a file is damaged, two files hold the same tensor, or
            index and files disagree.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            # The framework matters for reading values only; numpy saves the import of torch.
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    if name in tensors:
                        raise ValueError(
                            f"{tensors[name].file} and {path.name} both hold {name}, and programs "
                            "differ in which one they read: copy the shards again"
                        )
                    header = file.get_slice(name)
                    tensors[name] = StoredTensor(
                        path, tuple(header.get_shape()), header.get_dtype()
                    )
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is cut short or is no safetensors file: copy it again ({error})"
            ) from error

    if (folder / INDEX).is_file():
        absent = sorted(set(read_json_object(folder / INDEX)["weight_map"]) - set(tensors))
        if absent:
            raise ValueError(
                f"{folder} lacks {len(absent)} tensors that {INDEX} names, such as {absent[0]}: "
                "copy the shards again"
            )
    return tensors


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a JSON file of a checkpoint.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is not a JSON object, or holds a number that is not finite or counts
            more than any model has.
    """
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}: give the whole folder of a checkpoint")

    _check_bytes(folder / name)
    content = read_json_object(folder / name)
    for key, value in _settings(content):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{folder / name} sets {key} to {value}: give a finite number")
        if key.startswith("num_") and type(value) is int and value > _MOST_COUNT:
            raise ValueError(
                f"{folder / name} sets {key} to {_shown(value)}, but the weights of no model have "
                f"more than {_MOST_COUNT:,}: give the config that the weights were saved with"
            )
    return content


def read_processor(folder: Path) -> dict[str, Any]:
    """Read the settings of a processor as transformers writes them today, from any layout.

    Today all are in processor_config.json. Checkpoints of earlier years have the image processor in
    preprocessor_config.json, and leave to config.json and to the tower what else there is.

    Raises:
        FileNotFoundError: There is no image processor.
        ValueError: A file is not a JSON object, or holds a number that is not finite.
    """
    is_there = (folder / "processor_config.json").is_file()
    processor = read_config(folder, "processor_config.json") if is_there else {}
    if "image_processor" in processor:
        return processor

    # An earlier layout.
    if not (folder / "preprocessor_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no image processor: put its processor_config.json or "
            "preprocessor_config.json there"
        )
    image = read_config(folder, "preprocessor_config.json")
    if isinstance(image.get("size"), int):
        image["size"] = {"shortest_edge": image["size"]}
    if isinstance(image.get("crop_size"), int):
        image["crop_size"] = dict.fromkeys(("height", "width"), image["crop_size"])
    kind = str(image.get("image_processor_type") or image.get("feature_extractor_type"))
    image.setdefault("do_center_crop", kind.startswith(_CROPPING))
    of_image, around = _DEFAULTS.get(kind.partition("ImageProcessor")[0], ({}, {}))
    image = of_image | image

    config = read_config(folder)
    tower = config.get("vision_config")
    written = around | {
        "patch_size": tower.get("patch_size") if isinstance(tower, dict) else None,
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default"),
        "image_token": "<image>",
    }
    found = written | {key: value for key, value in processor.items() if value is not None}
    if "num_additional_image_tokens" not in found:
        found["num_additional_image_tokens"] = _count_prefix_tokens(read_headers(folder))
    return found | {"image_processor": image}


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template of a checkpoint, from any of the files that may hold it.

    Raises:
        ValueError: A file cannot be read.
    """
    if (folder / "chat_template.jinja").is_file():
        return read_template(folder / "chat_template.jinja")

    for name in ("chat_template.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        template = read_json_object(folder / name).get("chat_template")
        if isinstance(template, list):  # several by name
            named = [one for one in template if isinstance(one, dict)]
            template = next(
                (one.get("template") for one in named if one.get("name") == "default"), None
            )
        if isinstance(template, str):
            return template
    return None


def read_template(path: Path) -> str:
    """Read a .jinja file.

    Raises:
        ValueError: It is no text, or longer than any template.
    """
    _check_bytes(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: give a working template") from error


def _check_bytes(path: Path) -> None:
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, and {_MOST_BYTES:,} are read at most: copy it again"
        )


def read_checkpoint(folder: Path, needs_template: bool = True) -> CheckpointFiles:
    """Read the configs and the weight headers of a LLaVA, and refuse what is not safe to load.

    Args:
        folder: Folder of the checkpoint.
        needs_template: Whether it must have a chat template of its own.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is cut short, a pickle, code or a link out of the folder; a config asks
            for code, other weights or sizes that the weights do not have; the model is no LLaVA, or
            the processor does not fit the tower.
    """
    # Look at the kinds of files.
    refuse_links(folder)
    refuse_code(folder)
    refuse_adapter(folder)
    if (folder / INDEX).is_file() and (folder / "model.safetensors").is_file():
        raise ValueError(
            f"{folder} holds model.safetensors and {INDEX}, and programs differ in which one they "
            "read: remove one of them"
        )

    # Read every JSON file; the config first, which says whether this is a LLaVA.
    config = read_config(folder)
    _refuse_redirects(folder / "config.json", config)
    parts = ("text_config", "vision_config")
    if config.get("model_type") not in CLASSES or not all(
        isinstance(config.get(part), dict) for part in parts
    ):
        raise ValueError(
            f"{folder} holds a {_shown(config.get('model_type'))}, not a LLaVA of a tower and a "
            f"language model (nor {', '.join(CLASSES[1:])}): export it with mipha, or "
            "`mipha import` it if it is a released Mipha"
        )
    processor = read_processor(folder)
    read_config(folder, "tokenizer_config.json")
    for name in CONFIGS:
        if (folder / name).is_file():
            _refuse_redirects(folder / name, read_config(folder, name))
    check_tokenizer(folder)
    for name in TOKENS:
        if (folder / name).is_file():
            read_json_object(folder / name)
    if needs_template and read_chat_template(folder) is None:
        raise FileNotFoundError(
            f"{folder} has no chat_template.jinja, so no conversation can be written for it: "
            "put its template there"
        )

    # Check that they describe the model whose weights are there.
    _check_image(folder, config, processor)
    _check_end_tokens(folder)
    tensors = read_headers(folder)
    _check_types(tensors)
    for part in parts:
        check_sizes(folder / "config.json", config[part], tensors)
    found = CheckpointFiles(config, processor, tensors)
    if config["model_type"].startswith("llava"):
        _check_features(folder, found)
    # Each tile takes a position or a word for its tokens at most.
    if (most := found.geometry.longest) > _longest(tensors) * found.geometry.most_tiles:
        raise ValueError(
            f"{folder / 'processor_config.json'} makes {most} tokens an image, which is "
            "more than the weights have positions or words: save the processor again"
        )
    return found


def refuse_links(folder: Path) -> None:
    """Refuse a folder with a link that leads out of it, or with a pipe or a device.

    The hub's cache keeps the files of a snapshot as links into a folder `blobs` of its own; these
    are allowed.

    Raises:
        ValueError: There is one; names it.
    """
    top = folder.resolve()
    allowed = [top]
    if top.parent.name == "snapshots":
        allowed.append(top.parent.parent / "blobs")

    for path in sorted(folder.rglob("*")):
        try:
            target = path.resolve()
        except RuntimeError as error:
            raise ValueError(f"{path} is a link that leads back to itself: remove it") from error
        if path.is_symlink() and not any(target.is_relative_to(place) for place in allowed):
            raise ValueError(
                f"{path} is a link out of the folder, to {target}: put the file itself there, or "
                "remove the link"
            )
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is a pipe or a device, not a file: remove it")


def refuse_code(folder: Path) -> None:
    """Refuse a folder with a pickle or a Python file anywhere in it.

    Raises:
        ValueError: There is one; names it.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which can run code when it is read: "
                "save weights as safetensors, and remove it"
            )
        if path.suffix.lower() == ".py":
            raise ValueError(
                f"{path} is code, and code that comes with a checkpoint is never run: remove it"
            )


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter beside its weights: transformers would apply it silently.

    Raises:
        ValueError: There is one.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder / 'adapter_config.json'} is an adapter beside a model: merge it with "
            "`mipha export --merge`, or remove it"
        )


def refuse_redirects(folder: Path) -> None:
    """Refuse a pretrained part with an adapter, or a config that asks for code or other weights.

    Args:
        folder: Folder of a vision tower or a language model.

    Raises:
        ValueError: The first such setting.
    """
    refuse_adapter(folder)
    check_tokenizer(folder)
    if (folder / "config.json").is_file():
        _refuse_redirects(folder / "config.json", read_config(folder), may_have_code=True)


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer that draws lots, or writes pages for a word before it splits them.

    Raises:
        ValueError: It does; names the setting.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return

    content = read_json_object(path)
    model = content.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise ValueError(
            f"{path} sets dropout to {_shown(model['dropout'])}, with which a text gets other "
            "tokens every time: set it to null"
        )
    growth = 1
    for step in _objects(content.get("normalizer")):
        for key in ("content", "prepend"):
            if isinstance(step.get(key), str):
                growth *= max(1, len(step[key]))
    if growth > _MOST_GROWTH:
        raise ValueError(
            f"{path} has a normalizer that writes {growth:,} characters for one, and "
            f"{_MOST_GROWTH} are allowed: give the tokenizer that the model was trained with"
        )


def check_sizes(path: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a config with sizes that the weights do not have, before memory is taken for them.

    Args:
        path: File of the config, for messages.
        config: Settings of one part of a model.
        tensors: Weights of the model.

    Raises:
        ValueError: A size is not a whole number, or larger than every stored tensor.
    """
    longest = _longest(tensors)
    most = {
        "num_hidden_layers": len(tensors),
        **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), longest),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), longest),
        "patch_size": longest,
        "sliding_window": 2**31 - 1,
    }
    for key, limit in most.items():
        value = config.get(key)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= limit:
            raise ValueError(
                f"{path} sets {key} to {_shown(value)}, but the weights allow 1 to {limit}: "
                "give the config that the weights were saved with"
            )


def _shown(value: Any) -> str:
    """Return a stranger's value as it may stand in a sentence."""
    return repr(value)[:60]


def _check_types(tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse weights that are whole numbers: quantized ones would be read without their scales."""
    for name, tensor in tensors.items():
        if name.endswith(("weight", "bias")) and not tensor.code.startswith(("F", "BF")):
            raise ValueError(
                f"{tensor.file}: the weights {name} are of the type {tensor.code}, not of floating "
                "point: give the checkpoint before it was quantized"
            )


def _longest(tensors: Mapping[str, StoredTensor]) -> int:
    """Return the longest side of all tensors: words, positions or widths of the model."""
    return max((max(tensor.shape, default=1) for tensor in tensors.values()), default=0)


def _shard_names(folder: Path) -> list[str]:
    """Return the names of the shards that the index lists.

    Raises:
        ValueError: One leads out of the folder, or is not the name of a safetensors file.
    """
    shards = read_json_object(folder / INDEX).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(_is_shard(name) for name in names):
        raise ValueError(
            f"{folder / INDEX} does not name safetensors files beside it: copy it again"
        )
    return sorted(set(names))


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _settings(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a tree of JSON values that is no object or list, with its last key."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _settings(value, name)
    elif isinstance(content, list):
        for value in content:
            yield from _settings(value, key)
    else:
        yield key, content


def _refuse_redirects(path: Path, content: dict[str, Any], may_have_code: bool = False) -> None:
    """Refuse settings that make transformers run code, or read weights from elsewhere.

    Args:
        path: File of the settings.
        content: Its content.
        may_have_code: Whether `auto_map` is allowed: transformers runs that code only on request.

    Source: transformers 5.23 `PreTrainedConfig.__init__` (attn_implementation),
        `modeling_utils.py` (transformers_weights), `integrations/hub_kernels.py`.
    """
    for objects in _objects(content):
        if "auto_map" in objects and not may_have_code:
            raise ValueError(
                f"{path} asks for code of its own (auto_map), which is never run: remove that key"
            )
        if objects.get("transformers_weights") is not None:
            raise ValueError(
                f"{path} names another file of weights (transformers_weights): remove that key"
            )
        if str(objects.get("model_type")).startswith("timm_"):
            raise ValueError(
                f"{path} asks for a model of timm ({_shown(objects['model_type'])}), which fetches "
                "its own code and weights: use a tower that transformers has"
            )
        if objects.get("quantization_config") is not None and not may_have_code:
            raise ValueError(
                f"{path} says that the weights are quantized (quantization_config), which is not "
                "read: save them in float32 or bfloat16, or remove that key if they are"
            )
        if objects.get("return_dict") is False:
            raise ValueError(f"{path} sets return_dict to False: remove that key")
        for key, value in objects.items():
            named = key.lstrip("_").startswith(("attn_implementation", "experts_implementation"))
            if named and value not in IMPLEMENTATIONS:
                raise ValueError(
                    f"{path} asks for the implementation {_shown(value)}, which may be code from "
                    f"the hub: remove {key}"
                )


def _objects(content: Any) -> Iterator[dict[str, Any]]:
    """Yield every object of a tree of JSON values."""
    if isinstance(content, dict):
        yield content
        for value in content.values():
            yield from _objects(value)
    elif isinstance(content, list):
        for value in content:
            yield from _objects(value)


def _check_end_tokens(folder: Path) -> None:
    """Refuse a generation config whose token ids are not ids; its other values are not used."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return

    content = read_config(folder, path.name)
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        ids = content.get(key)
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if any(type(token) is not int or token < 0 for token in ids):
            raise ValueError(f"{path} sets {key} to {_shown(content[key])}: give a token id")


def _check_image(folder: Path, config: dict[str, Any], processor: dict[str, Any]) -> None:
    """Refuse a processor whose images are not those that the model takes."""
    path, vision = folder / "processor_config.json", config["vision_config"]
    path = path if path.is_file() else folder / "preprocessor_config.json"
    try:
        geometry = read_geometry(processor)
        if not isinstance(geometry, _GEOMETRIES[config["model_type"]]):
            raise ValueError(
                f"it makes {geometry.kind} images, and a {config['model_type']!r} takes others"
            )
        _check_bounds(geometry)
        keeps_size = processor["image_processor"].get("do_resize") is False
        if keeps_size and isinstance(geometry, (Square, Tiles, Shuffled)):
            raise ValueError("do_resize is false, and the tower takes one size: set it to true")
        if config["model_type"] == "llava":
            made, wanted = _square(config, processor, geometry)
        else:
            made, wanted = _cut(config, vision, processor, geometry)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]!r}: save the processor again") from error
    except (TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise ValueError(
            f"{path} does not give image and patch sizes in pixels: save the processor again "
            f"({error})"
        ) from error

    _check_scaling(path, processor["image_processor"])

    if made != wanted:
        raise ValueError(
            f"{folder}: the processor makes {made[:200]}, but the model wants {wanted[:200]}: "
            "save processor and model from one build"
        )


def _check_features(folder: Path, files: CheckpointFiles) -> None:
    """Refuse features of a tower that its stock class fails to read at the first image."""
    config, geometry, path = files.config, files.geometry, folder / "config.json"
    layers, depth = (
        config.get("vision_feature_layer"),
        config["vision_config"].get("num_hidden_layers"),
    )
    for layer in layers if isinstance(layers, list) else [-1 if layers is None else layers]:
        if type(layer) is not int or layer == 0 or (depth and not -depth - 1 <= layer <= depth):
            raise ValueError(
                f"{path} sets vision_feature_layer to {layer!r}: give a layer of the tower, 1 to "
                f"{depth or 'its last'}, or -1 for the last"
            )

    counted = files.processor.get("num_additional_image_tokens")
    if isinstance(geometry, Anyres) and "num_image_tokens" in files.processor:
        counted = files.processor["num_image_tokens"] - geometry.patches**2
    found = _count_prefix_tokens(files.tensors)
    if counted != found:
        raise ValueError(
            f"{folder}: the tower makes {found} tokens besides its patches, but the processor "
            f"counts {counted}: save processor and model from one build"
        )
    strategy = files.processor["vision_feature_select_strategy"]
    if isinstance(geometry, Anyres) and geometry.dropped:
        raise ValueError(
            f"{path} sets vision_feature_select_strategy to {strategy!r}, but the grid takes the "
            f"patches alone, and the tower makes {found} tokens besides them: use "
            f"{'default' if found == 1 else 'full' if not found else 'another tower'}"
        )


def _count_prefix_tokens(tensors: Mapping[str, StoredTensor]) -> int:
    """Return how many tokens the tower of a LLaVA puts before its patches, by its weights."""
    tower = {name: tensor for name, tensor in tensors.items() if "vision_tower" in name}
    return sum(
        tensor.shape[1] if name.endswith("register_tokens") else 1
        for name, tensor in tower.items()
        if name.endswith(tuple(f"embeddings.{token}" for token in _PREFIX_TOKENS))
    )


_PREFIX_TOKENS = ("class_embedding", "cls_token", "register_tokens", "distillation_token")

_GEOMETRIES: dict[str, Any] = {
    "llava": (Square, Tiles),
    "llava_next": Anyres,
    "llava_onevision": Anyres,
    "idefics3": Shuffled,
    "lfm2_vl": Native,
}


def _check_bounds(geometry: Geometry) -> None:
    """Refuse sizes that are no numbers, and numbers that would take all memory."""
    for field in fields(geometry):
        value = getattr(geometry, field.name)
        if field.name in ("dropped", "cap", "grids", "splits", "has_whole", "tolerance"):
            continue
        if type(value) is not int or value < 1:
            raise ValueError(f"{field.name} is {_shown(value)}")
    if geometry.most_tiles > MAX_TILES:
        raise ValueError(f"an image of {geometry.most_tiles} tiles is more than {MAX_TILES}")
    if isinstance(geometry, Shuffled) and geometry.longest_edge > 6 * geometry.side:
        raise ValueError(
            f"its longest edge of {geometry.longest_edge} pixels makes more than 6 rows of "
            f"{geometry.side}, and there are marks for 6"
        )


def _check_scaling(path: Path, image: dict[str, Any]) -> None:
    """Refuse numbers by which pixels become no numbers, and edges that would take all memory."""
    wanted = {
        "image_mean": (-1_000, 1_000),
        "image_std": (1e-4, 1_000),
        "rescale_factor": (1e-9, 1),
        "resample": (0, 5),
    }
    for key, (least, most) in wanted.items():
        value = image.get(key)
        if value is None:
            continue
        of_channels = isinstance(value, list) and key.startswith("image_")
        numbers = value if of_channels else [value]
        if len(numbers) not in (1, 3) or any(
            type(number) not in (int, float) or not least <= number <= most for number in numbers
        ):
            raise ValueError(
                f"{path} sets {key} to {_shown(value)}, wanted numbers from {least:g} to {most:g}: "
                "save the processor again"
            )

    for key in ("size", "crop_size"):
        edges = image[key] if isinstance(image.get(key), dict) else {}
        for edge in ("shortest_edge", "longest_edge"):
            length = edges.get(edge)
            if length is not None and not (type(length) is int and 1 <= length <= _MOST_EDGE):
                raise ValueError(
                    f"{path} sets {key} to a {edge} of {_shown(length)}, wanted 1 to "
                    f"{_MOST_EDGE:,} pixels: save the processor again"
                )


def _square(
    config: dict[str, Any], processor: dict[str, Any], geometry: Geometry
) -> tuple[str, str]:
    """Describe the image that a LLaVA's processor makes, and the one that its tower takes."""
    vision, image = config["vision_config"], processor["image_processor"]
    size = image["crop_size" if image.get("do_center_crop") else "size"]
    tokens = geometry.span(1, 1).num_image_tokens
    made = (size["height"], size["width"], tokens, processor["patch_size"])
    wanted = (
        vision.get("image_size"),
        vision.get("image_size"),
        config.get("image_seq_length", tokens),
        vision.get("patch_size"),
    )
    sentence = "images of {} x {} pixels, {} tokens by patches of {}"
    return sentence.format(*made), sentence.format(*wanted)


def _cut(
    config: dict[str, Any],
    vision: dict[str, Any],
    processor: dict[str, Any],
    geometry: Geometry,
) -> tuple[str, str]:
    """Describe what other processors make, and what their models take."""
    if isinstance(geometry, Native):
        sentence = "patches of {} pixels, {} x {} to a token"
        made = (geometry.patch, geometry.shuffle, geometry.shuffle)
        factor = config["downsample_factor"]
        return sentence.format(*made), sentence.format(vision["patch_size"], factor, factor)

    sides = vision["image_size"] // vision["patch_size"]
    if isinstance(geometry, Shuffled):
        sentence = "tiles of {} pixels, {} tokens each"
        wanted = (vision["image_size"], (sides // config["scale_factor"]) ** 2)
        return sentence.format(geometry.side, geometry.tokens), sentence.format(*wanted)

    sentence = "tiles of {} pixels, {} patches a side, for the canvases {}"
    made = (geometry.side, geometry.patches, processor["image_processor"]["image_grid_pinpoints"])
    wanted = (vision["image_size"], sides, config["image_grid_pinpoints"])
    return sentence.format(*made), sentence.format(*wanted)
