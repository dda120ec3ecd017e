"""Find the files of a checkpoint folder, check that all are there, and read their headers.

Nothing here loads a weight, a pickle, code or torch: config and processor are JSON, and a
safetensors header is JSON too. A folder that a stranger made passes through here first:

    is_whole(folder)            yes or no: config and every weight file are there
    read_headers(folder)        every tensor's file, shape and dtype; pickles are refused
    read_checkpoint(folder)     all of it, of a LLaVA that a stranger may have saved: no code

`models/checkpoint_folder.py` finds such a folder by name and loads the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mipha.files import read_json_object

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""Suffixes of files that may hold pickles: reading one can run code."""

INDEX = "model.safetensors.index.json"
"""File that names the shard of every tensor, where the weights are in several files."""

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
        processor: Content of processor_config.json.
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
    def tokens_per_image(self) -> int:
        """Number of placeholders that the processor writes for one image."""
        return _tokens_per_image(self.processor)


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
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise ValueError(
            f"{folder} holds pickled weights ({pickles[0]}), and reading a pickle can run code: "
            "convert to safetensors first"
        )
    if any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} has shards but no {INDEX}: copy it too")
    raise FileNotFoundError(
        f"{folder} has no model.safetensors: give a checkpoint with safetensors weights"
    )


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Read name, file, shape and dtype of all tensors; a file that was cut short shows here.

    Raises:
        FileNotFoundError: There are no weights, or a shard that the index names is missing.
        ValueError: The weights are pickles, a file is damaged, or index and files disagree.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            # The framework matters for reading values only; numpy saves the import of torch.
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
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
        ValueError: The file is not a JSON object.
    """
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}: give the whole folder of a checkpoint")
    return read_json_object(folder / name)


def read_checkpoint(folder: Path) -> CheckpointFiles:
    """Read the configs and the weight headers of a LLaVA, and refuse whatever would run code.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is cut short, a pickle or code, the model is no LLaVA, or the processor
            does not fit the tower.
    """
    refuse_code(folder)

    config = read_config(folder)
    processor = read_config(folder, "processor_config.json")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        if "auto_map" in read_config(folder, name):
            raise ValueError(
                f"{folder / name} asks for code of its own (auto_map), which is never run: "
                "remove that key"
            )
    if not (folder / "chat_template.jinja").is_file():
        raise FileNotFoundError(
            f"{folder} has no chat_template.jinja, so no conversation can be written for it: "
            "put its template there"
        )

    parts = ("text_config", "vision_config")
    if config.get("model_type") != "llava" or not all(
        isinstance(config.get(part), dict) for part in parts
    ):
        raise ValueError(
            f"{folder} holds a {config.get('model_type')!r}, not a LLaVA of a tower and a language "
            "model: export it with mipha, or `mipha import` it if it is a released Mipha"
        )
    _check_image(folder, config, processor)

    return CheckpointFiles(config, processor, read_headers(folder))


def refuse_code(folder: Path) -> None:
    """Refuse a folder with a pickle or a Python file anywhere in it.

    Raises:
        ValueError: There is one; names it.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which can run code when it is read: "
                "save weights as safetensors, and remove it"
            )
        if path.suffix == ".py":
            raise ValueError(
                f"{path} is code, and code that comes with a checkpoint is never run: remove it"
            )


def count_image_tokens(
    height: int, width: int, patch_size: int, num_prefix_tokens: int, select_strategy: str
) -> int:
    """Return how many tokens one image takes in a stock LLaVA.

    Args:
        height: Pixels.
        width: Pixels.
        patch_size: Pixels a side.
        num_prefix_tokens: Tokens that the tower puts before its patches.
        select_strategy: `default` leaves out the first token of the tower, `full` keeps all.

    Source: transformers 5.23 `LlavaProcessor`.
    """
    patches = (height // patch_size) * (width // patch_size)
    return patches + num_prefix_tokens - (select_strategy == "default")


def _shard_names(folder: Path) -> list[str]:
    """Names of the shards that the index lists; a name that leads out of the folder is refused."""
    shards = read_json_object(folder / INDEX).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{folder / INDEX} does not name the shards beside it: copy it again")
    return names


def _check_image(folder: Path, config: dict[str, Any], processor: dict[str, Any]) -> None:
    """Refuse a processor whose image is not the one that the tower takes."""
    vision = config["vision_config"]
    try:
        num_tokens = _tokens_per_image(processor)
        made = (*_image_pixels(processor), processor["patch_size"])
    except KeyError as error:
        raise ValueError(
            f"{folder / 'processor_config.json'} lacks {error.args[0]!r}: save the processor again"
        ) from error

    wanted = (vision["image_size"], vision["image_size"], vision["patch_size"])
    expected = config.get("image_seq_length", num_tokens)
    if made != wanted or num_tokens != expected:
        raise ValueError(
            f"{folder}: the processor makes images of {made[0]} x {made[1]} pixels, "
            f"{num_tokens} tokens by patches of {made[2]}, but the tower wants "
            f"{wanted[0]} x {wanted[1]}, {expected} tokens by patches of {wanted[2]}: "
            "save processor and model from one build"
        )


def _tokens_per_image(processor: dict[str, Any]) -> int:
    return count_image_tokens(
        *_image_pixels(processor),
        processor["patch_size"],
        processor["num_additional_image_tokens"],
        processor["vision_feature_select_strategy"],
    )


def _image_pixels(processor: dict[str, Any]) -> tuple[int, int]:
    image = processor["image_processor"]
    size = image["crop_size" if image.get("do_center_crop") else "size"]
    return size["height"], size["width"]
