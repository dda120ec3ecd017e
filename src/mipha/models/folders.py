"""Where a pretrained part is, and what of it may be read: safetensors and JSON; never a pickle, never code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from mipha.lookup import did_you_mean
from mipha.models.packaged import packaged_folder


def locate(name: str, path: str, kind: str, known: list[str]) -> str:
    """Folder or hub id of a part.

    Args:
        name: As the recipe says it.
        path: From the catalog; the name itself where it has no entry.
        kind: What it is to be, for messages.
        known: Names of the catalog.

    Raises:
        FileNotFoundError: A folder without a config, or a name that is none of these.
    """
    if path.startswith("packaged:"):
        return str(packaged_folder(path.removeprefix("packaged:")))
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(
                f"{kind} folder {path} has no config.json: give the folder that save_pretrained wrote"
            )
        return path
    if "/" not in path or path.startswith((".", "/")):
        raise FileNotFoundError(
            f"no {kind} {name!r}: {did_you_mean(name, known)}, or give a folder or a hub id"
        )
    return path


@contextmanager
def reading(folder: str, kind: str, name: str) -> Iterator[None]:
    """One sentence for what the host says in many when a file is not there or not whole, or a hub cannot be reached."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        mend = "check the name and the network, or give a folder"
        if Path(folder).is_dir():
            pickled = not list(Path(folder).glob("*.safetensors*")) and sorted(
                Path(folder).glob("*.bin")
            )
            mend = (
                f"{pickled[0].name} is a pickle, which is never read; save it as safetensors"
                if pickled
                else "its folder is not whole"
            )
        raise FileNotFoundError(
            f"{kind} {name!r} cannot be read from {folder}: {mend} ({reason})"
        ) from error


def model_type(folder: str) -> str | None:
    """What kind of model a folder says it holds, read before any class of the host sees it."""
    return PretrainedConfig.get_config_dict(folder)[0].get("model_type")


def load_weights(
    model_class: type, folder: str, dtype: torch.dtype, optional: tuple[str, ...] = ()
) -> PreTrainedModel:
    """A model with all of its weights; the host would start missing ones at random with no more than a warning.

    Args:
        model_class: The host's, with `from_pretrained`.
        optional: Beginnings of names that may be missing, because nothing reads them.

    Raises:
        ValueError: The weights are not those of the model that the folder's config describes.
    """
    try:
        model, info = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ValueError(
            f"{folder}: the weights have other shapes than its config says: give the folder they were saved in"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(optional))
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} weights are missing, {missing[0]} first: it is not whole, or its config is another model's"
        )
    return model
