"""A data set as the hub keeps it: files of a config and a split, named by the README or by folders.

    root: hf://datasets/HuggingFaceM4/FineVision     root: ./a-copy-of-it
    config: ai2d_merged                              config: ai2d_merged

A copy of the files of a config is made in the hub's own cache. Which files those are is found by
the `datasets` library; records are read as parquet, JSON, tables and tars are elsewhere. A branch
is resolved once to a commit, which is printed. Code of a data set is never run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mipha.data.addresses import RemoteFile
from mipha.data.blocks import Blocks, index_address
from mipha.data.dataset import DataSet
from mipha.data.datasets._images import image_folders
from mipha.data.datasets._records import (
    LINE_SUFFIXES,
    TABLE_SUFFIXES,
    Part,
    RecordFile,
    Rows,
    check_split,
    index_files,
    record_file,
)
from mipha.data.datasets._shapes import READS, sample_of
from mipha.data.datasets.parquet import ParquetRecords
from mipha.data.datasets.webdataset import TarParts, TarRecords
from mipha.errors import import_optional
from mipha.files import cache_folder
from mipha.terminal import echo

HUB = "hf://datasets/"


def load(
    root: Path | str | None,
    split: str,
    image_root: Sequence[Path] = (),
    config: str | None = None,
    revision: str | None = None,
    unreadable_shards: str = "fail",
    cache_gb: float | None = None,
) -> Rows:
    """Index the files of a config and split.

    Args:
        root: A folder with the layout of the hub, or `hf://datasets/OWNER/NAME`.
        split: Name of the split.
        image_root: Folders that images may lie in.
        config: Name of the config; None where there is one only.
        revision: Commit, branch or tag, for the hub.
        unreadable_shards: `skip` leaves out files that cannot be read.
        cache_gb: Size of the cache that parts of parquet files and tars are read through; None:
            files are copied whole.

    Raises:
        FileNotFoundError: There is no such folder or set.
        ValueError: No such config, split or revision, or files cannot be read; all are named.
        MissingPackage: `datasets` is not installed.
    """
    commit = broken = None
    if root is None:
        raise ValueError("hub has no packaged copy: set the data's root to a folder or hf:// name")
    if isinstance(root, Path):
        if revision is not None:
            raise ValueError(f"revision={revision} has no effect with the folder {root}: remove it")
        if not root.is_dir():
            raise FileNotFoundError(f"hub: no folder {root}; check the data's root")
        files = [Path(file) for file in _data_files(str(root.resolve()), split, config)]
        root = root.resolve()
    else:
        in_parts, skip = cache_gb is not None, unreadable_shards == "skip"
        root, files, commit, broken = copy_of_hub(root, split, config, revision, in_parts, skip)

    blocks = None if cache_gb is None else Blocks.of(root, cache_gb)
    named = [(file.relative_to(root).with_suffix("").as_posix(), file) for file in files]
    indexed, left_out = index_files(
        named, partial(_index, blocks=blocks), unreadable_shards == "skip"
    )
    parts = [
        Part(f"hub/{name}", records, image_folders(file, image_root))
        for name, file, records in indexed
    ]
    return Rows(parts, "; ".join(filter(None, (broken, left_out))) or None, commit)


def copy_of_hub(
    address: str,
    split: str,
    config: str | None,
    revision: str | None,
    in_parts: bool = False,
    skip: bool = False,
) -> tuple[Path, list[Path], str | None, str | None]:
    """Return the folder of the hub's cache with a set, the files of a config and split, the commit.

    Files that are not there are fetched; where they are read in parts, only their indices, and a
    sentence tells of those that cannot be read and `skip` leaves out.

    Raises:
        ValueError: The address is not one of a data set, or as `load`.
        FileNotFoundError: The hub has no such set.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    name = address.removeprefix(HUB).strip("/")
    name, at, given = name.partition("@")
    if not address.startswith(HUB) or name.count("/") > 1 or not name or (at and revision):
        raise ValueError(f"{address}: write {HUB}OWNER/NAME, and config and revision beside it")
    try:
        commit = HfApi().dataset_info(name, revision=given or revision).sha
        prefix = f"{HUB}{name}@{commit}/"
        wanted = _data_files(name, split, config, commit)
        inside = [file.removeprefix(prefix) for file in wanted]
        echo(f"mipha: {address} is commit {commit}: {len(inside)} files", err=True)
        if in_parts:
            found = HfApi().get_paths_info(name, inside, repo_type="dataset", revision=commit)
            sizes = {one.path: one.size for one in found if isinstance(one, RepoFile)}
            pinned = [RemoteFile(prefix + one, one, sizes[one], "") for one in inside]
            folder, broken = index_address(prefix, pinned, skip)
            kept = [folder / file for file in inside if (folder / file).is_file()]
            return folder, kept, commit, broken
        folder = Path(
            snapshot_download(
                name, repo_type="dataset", revision=commit, allow_patterns=["README.md", *inside]
            )
        )
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the hub has no data set {name} that you may read: check the name, or log in with "
            "`hf auth login`"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ConnectionError(f"{address} cannot be fetched: {error}") from error
    return folder, [folder / file for file in inside], commit, None


def _data_files(
    name: str, split: str, config: str | None, revision: str | None = None
) -> list[str]:
    """Return the files of a config and split, as `datasets` finds them."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    datasets = import_optional("datasets", f"finding the files of {name}", "data")
    try:
        builder = datasets.load_dataset_builder(
            name, config, revision=revision, cache_dir=str(cache_folder() / "datasets")
        )
    except (ValueError, FileNotFoundError) as error:
        sentence = " ".join(str(error).partition("\nExample")[0].split())
        raise type(error)(f"{name}: {sentence}") from error
    found: dict[str, Any] = builder.config.data_files or {}
    check_split(f"{name}, config {builder.config.name},", split, sorted(map(str, found)))
    return [str(file) for file in found[split]]


def _index(file: Path, blocks: Blocks | None) -> RecordFile:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return ParquetRecords(file, blocks)
    if suffix == ".tar":
        return TarRecords(file) if blocks is None else TarParts(file, blocks)
    if blocks is not None:
        raise ValueError(f"{file}: cache_gb reads parquet files and tars only; leave it out")
    if suffix in (*LINE_SUFFIXES, *TABLE_SUFFIXES):
        return record_file(file)
    raise ValueError(f"{file}: files of {suffix or 'no suffix'} are not read from a hub's layout")


def describes_configs(folder: Path) -> bool:
    """Return whether a folder's README names several configs, so that one must be chosen."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    head = card.read_text(encoding="utf-8", errors="replace").partition("\n---")[0]
    return head.startswith("---") and "\nconfigs:" in head and head.count("config_name:") > 1


DATASET = DataSet(
    "hub",
    load,
    sample_of,
    takes_image_root=True,
    takes=("config", "revision", "unreadable_shards", "cache_gb"),
    reads=(*READS, "window_rows"),
)
