"""The files of a released checkpoint, from a folder or the hub: JSON and safetensors headers; never a pickle, never code."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
)
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """One tensor on disk: its file, its shape and the name of its type."""

    file: Path
    shape: tuple[int, ...]
    kind: str

    @property
    def dtype(self) -> torch.dtype:
        """Its type.

        Raises:
            ValueError: It is not a floating point number: the checkpoint is quantised.
        """
        if self.kind not in _DTYPES:
            raise ValueError(
                f"{self.file} holds weights as {self.kind}: give the checkpoint that is not quantised"
            )
        return _DTYPES[self.kind]


def fetch(source: str | Path, *, weights: bool) -> Path:
    """The local folder of a checkpoint; from the hub, only what is read of it.

    Args:
        source: A folder or a hub id.
        weights: False brings the small files alone, so that a checkpoint that cannot be used is refused before gigabytes are.

    Raises:
        FileNotFoundError: No such folder, or the hub cannot be reached or has no such checkpoint.
    """
    if Path(source).is_dir():
        return Path(source)
    name = str(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(
            f"no checkpoint folder {name}: give the folder that holds its config.json, or a hub id such as OWNER/NAME"
        )
    patterns = ["*.json", *TOKENIZER_FILES] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name} cannot be read from the hub: check name and network, or give a folder ({reason})"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}: give the whole folder of a checkpoint"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: copy it again ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a JSON {type(content).__name__} where an object is wanted: copy it again"
        )
    return content


def read_headers(folder: Path) -> dict[str, Stored]:
    """All tensors by name, from the headers alone; a file that was cut short shows here.

    Raises:
        FileNotFoundError: No weights, or a shard that the index names is not there.
        ValueError: The weights are pickles, a file is damaged, or index and files disagree.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    part = tensors.get_slice(name)
                    found[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is cut short or is no safetensors file: copy it again ({error})"
            ) from error
    if (folder / _INDEX).is_file():
        absent = sorted(set(read_json(folder / _INDEX)["weight_map"]) - set(found))
        if absent:
            raise ValueError(
                f"{folder / _INDEX} names tensors that no shard holds, such as {absent[0]}: copy the shards again"
            )
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all of them there.

    Raises:
        FileNotFoundError: There are none, or some are missing.
        ValueError: The weights are pickles.
    """
    if (folder / _INDEX).is_file():
        shards = read_json(folder / _INDEX).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{folder / _INDEX} does not name the shards beside it: copy it again")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{folder} lacks {len(absent)} of {len(names)} shards, such as {absent[0]}: copy them again"
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights ({pickles[0]}), and reading a pickle can run code: convert to safetensors first"
        )
    if any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} has shards but no {_INDEX}: copy it too")
    raise FileNotFoundError(
        f"{folder} has no model.safetensors: give a checkpoint with safetensors weights"
    )


def read_tensor(name: str, stored: Stored) -> Tensor:
    """One tensor, from disk."""
    with safe_open(stored.file, framework="pt") as tensors:
        return tensors.get_tensor(name)
