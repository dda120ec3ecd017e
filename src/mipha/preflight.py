"""Checks of names, folders and devices that need no torch, made before anything is created.

Torch takes seconds to import. A mistyped part, a folder that cannot be written to and a GPU that is
not there are known without it.
"""

from __future__ import annotations

import ctypes
import os
import re
import runpy
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mipha.catalog.language_models import LANGUAGE_MODELS
from mipha.catalog.vision_towers import VISION_TOWERS
from mipha.checkpoint_files import read_checkpoint, read_config, refuse_redirects
from mipha.lookup import did_you_mean, files_in
from mipha.recipe import CheckpointRecipe, ModelRecipe
from mipha.run import model_folder

CHAT_TEMPLATES = Path(__file__).parent / "catalog" / "chat_templates"

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Dtypes that a model may be loaded in."""

_DEVICES = ("cpu", "cuda", "mps", "xpu")


def check_writable(folder: Path) -> None:
    """Check that a folder can be made and written to; nothing of the check remains.

    Raises:
        ValueError: Its path is not UTF-8, which safetensors needs.
        OSError: The folder, or the nearest one above it that exists, cannot be written to.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the path {str(folder)!r} is not UTF-8, so no weights can be written there: "
            "choose another -o"
        ) from error

    above = folder.absolute()
    while not above.exists():
        above = above.parent
    probe = above / f".probe.{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written to ({error.strerror}): "
            "choose another -o, or get the right to write there"
        ) from error


def check_new_folder(out: Path) -> None:
    """Check that a folder does not exist and can be made.

    Raises:
        ValueError: The folder exists.
        OSError: It cannot be made.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another -o, or remove it")
    check_writable(out)


def check_adapter(folder: Path) -> None:
    """Check that a folder holds an adapter in PEFT's format.

    Raises:
        FileNotFoundError: It does not.
    """
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no adapter_config.json: "
            "give the adapter/ folder of a stage, or one that peft wrote"
        )


def check_device(name: str | None) -> None:
    """Check that torch has a device of this name.

    Args:
        name: `cpu`, `cuda`, `cuda:1` or another of torch's names; None is every machine's own.

    Raises:
        ValueError: No such name, torch is installed without CUDA, or there is no such GPU.
    """
    if name is None:
        return
    kind, colon, index = name.partition(":")
    if kind not in _DEVICES or (colon and not index.isdigit()):
        raise ValueError(f"no device {name!r}: {did_you_mean(kind, _DEVICES)}")
    if kind != "cuda":
        return

    # On AMD's GPUs torch says cuda too, and has no driver of NVIDIA's.
    version = _torch_version()
    if version.get("hip"):
        return
    if not version.get("cuda"):
        raise ValueError(
            f"device {name!r} cannot be used, because torch is installed without CUDA: "
            "leave it out for the CPU, or install a torch with CUDA"
        )
    found = _count_gpus()
    if int(index or 0) >= found:
        seen = f"has {found}" if found else "has none, or no driver"
        raise ValueError(
            f"device {name!r} cannot be used, because this machine {seen}: leave it out, or "
            "check the driver and CUDA_VISIBLE_DEVICES"
        )


def check_dtype(name: str) -> None:
    """Check the name of a dtype that a model is loaded in.

    Raises:
        ValueError: No such dtype.
    """
    if name not in DTYPES:
        raise ValueError(f"no dtype {name!r} to answer in: use one of {', '.join(DTYPES)}")


def check_parts(recipe: ModelRecipe | CheckpointRecipe, reach_hub: bool = True) -> None:
    """Check that tower, language model and chat template are there, or the checkpoint.

    Args:
        recipe: Parts of a model, or a checkpoint.
        reach_hub: Whether the config of a part on the hub is fetched, where it is not cached.

    Raises:
        FileNotFoundError: A part is neither a catalog name, a folder nor a hub id within reach, or
            there is no such chat template.
        ValueError: The folder of the checkpoint is not whole, or no LLaVA.
    """
    if recipe.chat_template is not None:
        template_file(recipe.chat_template)
    if isinstance(recipe, CheckpointRecipe):
        _check_start(recipe, reach_hub)
        return

    parts: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("vision tower", recipe.vision_tower, VISION_TOWERS),
        ("language model", recipe.language_model, LANGUAGE_MODELS),
    )
    for kind, name, catalog in parts:
        path = catalog[name].path if name in catalog else name
        if path == "untrained" or path.startswith("packaged:"):
            continue
        check_part(name, path, kind, catalog)
        if reach_hub and not Path(path).is_dir():
            _fetch_config(name, path, kind)


def _check_start(recipe: CheckpointRecipe, reach_hub: bool) -> None:
    """Check that a checkpoint to start from is there, and whole."""
    name = recipe.checkpoint
    if not Path(name).is_dir():
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            raise FileNotFoundError(
                f"no checkpoint {name}: give a run, a model folder or a hub id such as OWNER/NAME"
            )
        if reach_hub:
            _fetch_config(name, name, "checkpoint")
        return

    read_checkpoint(finished_folder(name), needs_template=recipe.chat_template is None)


def finished_folder(name: str | Path) -> Path:
    """Return the model folder that a folder is, or the one of the run that it is."""
    return Path(name) if (Path(name) / "config.json").is_file() else model_folder(name)


def check_prefers(folder: Path) -> None:
    """Check that a finished model is of the class that learns from preferences.

    Raises:
        FileNotFoundError: The folder has no config.
        ValueError: It is of another class.
    """
    kind = read_config(folder).get("model_type")
    if kind != "llava":
        raise ValueError(
            f"{folder} is a {kind!r}, and answers about images are preferred in a 'llava' alone: "
            "give one of that class"
        )


def check_part(name: str, path: str, kind: str, known: Iterable[str]) -> None:
    """Check that a name stands for a folder with a config, or can be a hub id.

    Args:
        name: Name in the recipe.
        path: Path in the catalog; the name itself where the catalog has no entry.
        kind: Kind of part, for messages.
        known: Names in the catalog.

    Raises:
        FileNotFoundError: A folder has no config, or the name is none of these.
        ValueError: The folder's config points to code or to other weights.
    """
    if Path(path).is_dir():
        refuse_redirects(Path(path))
        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(
                f"{kind} folder {path} has no config.json: "
                "give the folder that save_pretrained wrote"
            )
    elif "/" not in path or path.startswith((".", "/")):
        raise FileNotFoundError(
            f"no {kind} {name!r}: {did_you_mean(name, known, 'give a folder or a hub id')}"
        )


def template_file(name: str) -> Path:
    """Return the file of a chat template of the catalog, or any other.

    Raises:
        FileNotFoundError: No such template.
    """
    path = Path(name) if name.endswith(".jinja") else CHAT_TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        near = did_you_mean(name, files_in(CHAT_TEMPLATES, ".jinja"), "give a .jinja file")
        raise FileNotFoundError(f"no chat template {name!r}: {near}")
    return path


def _fetch_config(name: str, path: str, kind: str) -> None:
    """Fetch the config of a part on the hub, unless the cache has it."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(path, "config.json")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{kind} {name!r} cannot be read from {path}: "
            f"check the name and the network, or give a folder ({reason})"
        ) from error


def _torch_version() -> dict[str, Any]:
    """Return torch's facts about its build, read from its version file alone."""
    found = find_spec("torch")
    folders = found.submodule_search_locations if found else None
    return runpy.run_path(str(Path(folders[0]) / "version.py")) if folders else {}


def _count_gpus() -> int:
    """Return how many GPUs NVIDIA's driver shows to this process; 0 without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
