"""Find the folder of a pretrained model, fetch it from the hub, and load it completely.

    name --locate--> folder or hub id --reading--> config --load_weights--> model
    name --fetch---> folder, without loading anything

Only safetensors and JSON are read: never a pickle, never code. `mipha.checkpoint_files` looks at
the files themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mipha.checkpoint_files import (
    PICKLES,
    StoredTensor,
    conversion_command,
    read_headers,
)
from mipha.models.packaged import packaged_folder
from mipha.preflight import check_part

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
)


def locate(name: str, path: str, kind: str, known: list[str]) -> str:
    """Return the folder or the hub id of a part.

    Args:
        name: Name in the recipe.
        path: Path in the catalog; the name itself where the catalog has no entry.
        kind: Kind of part, for messages.
        known: Names in the catalog.

    Raises:
        FileNotFoundError: A folder has no config, or the name is none of these.
        ValueError: A folder asks for code or other weights.
    """
    if path.startswith("packaged:"):
        return str(packaged_folder(path.removeprefix("packaged:")))

    check_part(name, path, kind, known)
    return path


def fetch(source: str | Path, *, weights: bool) -> Path:
    """Return the local folder of a checkpoint; of one on the hub, only what is read is downloaded.

    Args:
        source: A folder or a hub id.
        weights: Whether the weights are needed. False brings the small files alone, so that a
            checkpoint that cannot be used is refused before gigabytes are downloaded.

    Raises:
        FileNotFoundError: No such folder, or the hub cannot be reached or has no such checkpoint.
    """
    if Path(source).is_dir():
        return Path(source)

    name = str(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(
            f"no checkpoint folder {name}: give the folder that holds its config.json, "
            "or a hub id such as OWNER/NAME"
        )
    patterns = ["*.json", "*.jinja", *TOKENIZER_FILES] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name} cannot be read from the hub: check name and network, "
            f"or give a folder ({reason})"
        ) from error


@contextmanager
def reading(folder: str, kind: str, name: str) -> Iterator[None]:
    """Raise one sentence where transformers cannot read a folder or reach the hub.

    Args:
        folder: Folder or hub id.
        kind: Kind of part.
        name: Name in the recipe.

    Raises:
        FileNotFoundError: A file is missing or damaged, or the hub cannot be reached.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        fix = "check the name and the network, or give a folder"
        if Path(folder).is_dir():
            fix = "its folder is not whole"
            files = sorted(Path(folder).iterdir())
            pickles = [path.name for path in files if path.suffix in PICKLES]
            if pickles and not any(".safetensors" in path.suffixes for path in files):
                fix = (
                    f"{pickles[0]} is a pickle, which is never read; convert it with "
                    f"{conversion_command(Path(folder))}"
                )
        raise FileNotFoundError(
            f"{kind} {name!r} cannot be read from {folder}: {fix} ({reason})"
        ) from error


def model_type(folder: str) -> str | None:
    """Return the `model_type` of a folder's config, by which its class is chosen."""
    return PretrainedConfig.get_config_dict(folder)[0].get("model_type")


def load_weights(
    model_class: type, folder: str, dtype: torch.dtype, optional: tuple[str, ...] = ()
) -> PreTrainedModel:
    """Load a model with all of its weights; transformers only warns that missing ones are random.

    Args:
        model_class: Class of transformers, with `from_pretrained`.
        folder: Folder or hub id.
        dtype: Type that the weights get.
        optional: Prefixes of names that may be missing, because nothing reads these weights.

    Raises:
        ValueError: The weights are not those of the model that the folder's config describes, or
            are not finite.
    """
    try:
        model, info = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ValueError(
            f"{folder}: the weights have other shapes than its config says: "
            "give the folder they were saved in"
        ) from error

    missing = sorted(key for key in info["missing_keys"] if not key.startswith(optional))
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} weights are missing, {missing[0]} first: "
            "it is not whole, or its config is another model's"
        )
    check_finite(model.named_parameters(), folder)
    return model


def read_tensor(name: str, stored: StoredTensor) -> Tensor:
    """Read one tensor from disk.

    Raises:
        ValueError: A number in it is not finite.
    """
    with safe_open(stored.file, framework="pt") as file:
        tensor = file.get_tensor(name)
    check_finite([(name, tensor)], stored.file)
    return tensor


def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str | Path) -> None:
    """Refuse weights that hold NaN or infinity: every answer of such a model is meaningless.

    Args:
        tensors: Names and tensors, not on the meta device.
        source: File or folder that they come from, for messages.

    Raises:
        ValueError: The first tensor with such a number; names it.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.element_size() == 1:
            tensor = tensor.float()  # torch has no minimum of 8-bit floats
        # Minimum and maximum pass NaN on, and take no memory of the tensor's size.
        low, high = torch.aminmax(tensor.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{source}: the weights {name} hold numbers that are not finite in {kind}: "
                "take a checkpoint from before training diverged, or another dtype"
            )


def check_finite_folder(folder: Path) -> None:
    """Refuse a checkpoint with numbers that are not finite, one tensor in memory at a time.

    Raises:
        FileNotFoundError: There are no weights, or some are missing.
        ValueError: The first tensor with such a number; names it.
    """
    for name, stored in read_headers(folder).items():
        read_tensor(name, stored)
