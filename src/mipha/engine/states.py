"""Training states: written beside, sealed with a manifest, published by a rename.

A state is a folder whose name ends in the number of steps done. It counts only when the manifest in
it says that it is whole, so a reader never resumes from half a state, whenever the writer died. The
manifest has a checksum of every file, so a reader never resumes from a damaged one either.

states/step-00000120/   StateWriter: a model on any number of processes
                        *.distcp              weights that train and optimizer
                        metadata.json         where in them each value is
                        position.json         other values that a resumed run needs
                        manifest.json         size and sha256 of every file; written last
states/checkpoint-120/  save_tensors: named weights of one process
                        weights.safetensors, optimizer.safetensors, position.json, manifest.json

Nothing in a state can run code when it is read, whoever wrote it: all is JSON or safetensors, but
for the values in torch's *.distcp, which torch reads with `weights_only`.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    FileSystemWriter,
    Metadata,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import WriteResult

from mipha.files import (
    begin_folder,
    changed_files,
    describe_file,
    partial_name,
    publish_folder,
    read_json_object,
    whole_folder,
    write_whole,
)
from mipha.terminal import echo
from mipha.world import World

KEEP = 2
"""States that stay: the newest, and the one before it in case the newest cannot be read."""

_MANIFEST = "manifest.json"
_SUMS = "sums.json"
_METADATA = "metadata.json"
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
_ALONE = "torch.distributed is disabled"


# The manifest: the one place that says whether a state is whole.


def seal_state(state: Path) -> None:
    """Write the manifest of a state; its last file.

    Args:
        state: Folder with all other files in it; also one that another program wrote.
    """
    # Every process has hashed what it wrote itself.
    files: dict[str, Any] = {}
    for path in state.glob(f"*{_SUMS}"):
        files |= read_json_object(path)
        path.unlink()

    # Hash the others.
    for path in sorted(state.rglob("*")):
        name = path.relative_to(state).as_posix()
        if path.is_file() and name not in files and name != _MANIFEST:
            files[name] = describe_file(path)
    write_whole(state / _MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def is_whole(state: Path) -> bool:
    """Return whether a state has its manifest, and every file at the size that it says."""
    files = _manifest(state)
    return bool(files) and all(
        (state / name).is_file() and (state / name).stat().st_size == facts["bytes"]
        for name, facts in files.items()
    )


def list_states(states: Path) -> list[Path]:
    """Return the whole states of a folder, oldest first; their content is not checked."""
    return [state for state in _numbered(states) if is_whole(state)]


def newest_state(states: Path, remove_torn: bool = False) -> Path | None:
    """Return the newest undamaged state of a folder; None where there is no state.

    Args:
        remove_torn: Delete the states that are newer, not whole or damaged. A trainer that picks
            its states itself would take them for good ones.

    Raises:
        ValueError: All states are damaged, or one was written by an older version.
    """
    _refuse_older(states)
    whole = list_states(states)
    newest = next((state for state in reversed(whole) if not _report_damage(state)), None)
    if whole and newest is None:
        raise _none_readable(states, len(whole))

    if remove_torn:
        for state in _numbered(states):
            if state not in whole or _step(state) > _step(newest or state):
                shutil.rmtree(state)
    return newest


def _manifest(state: Path) -> dict[str, Any]:
    """Return the files that the manifest lists; none where it is missing or damaged."""
    try:
        files = read_json_object(state / _MANIFEST).get("files")
    except (FileNotFoundError, ValueError):
        return {}
    known = isinstance(files, dict) and all(
        isinstance(facts, dict) and facts.keys() == {"bytes", "sha256"} for facts in files.values()
    )
    return files if known else {}


def _report_damage(state: Path, world: World | None = None) -> bool:
    """Return whether the content of a state has changed since it was written, and name the files.

    Args:
        world: Processes that share the work; all of them get the same answer.
    """
    # Hash: every process its part of the files.
    files = sorted(_manifest(state).items())
    changed = changed_files(state, dict(files[world.rank :: world.size] if world else files))
    if changed:
        echo(
            f"mipha: the training state {state} is damaged: {changed[0]} is not what was written "
            "(its checksum differs); going on from the one before it",
            err=True,
        )

    if world is None:
        return bool(changed)
    return bool(world.total(torch.tensor(len(changed), device=world.device)))


def _refuse_older(states: Path) -> None:
    """Refuse states whose manifest has no checksums; they stay on disk."""
    for state in _numbered(states):
        try:
            sizes = read_json_object(state / _MANIFEST)
        except (FileNotFoundError, ValueError):
            continue
        if sizes and all(type(size) is int for size in sizes.values()):
            raise ValueError(
                f"{state} is a training state of an older version of mipha, without checksums: "
                f"finish this training with that version, or delete {states} to start it anew"
            )


def _none_readable(states: Path, count: int) -> ValueError:
    return ValueError(
        f"none of the {count} training states in {states} can be read: "
        "delete that folder to start this stage anew"
    )


def _numbered(states: Path) -> list[Path]:
    """Return all states by number, whole or not; not those that are still being written."""
    found = [path for path in states.glob("*-*") if re.fullmatch(r"[a-z]+-\d+", path.name)]
    return sorted(found, key=_step)


def _step(state: Path) -> int:
    return int(state.name.rpartition("-")[2])


def _drop_old(states: Path, keep: int) -> None:
    for old in list_states(states)[:-keep]:
        shutil.rmtree(old)


# Named weights of one process.


def save_tensors(
    state: Path,
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    position: Mapping[str, Any],
    keep: int = KEEP,
) -> None:
    """Write a state of named weights, and drop the oldest states beside it.

    Args:
        state: Folder of the state; its name ends in the number of steps done.
        weights: Parameters that train, by name.
        position: Other values that a resumed run needs; must fit JSON.
        keep: Number of states that stay.
    """
    with whole_folder(state) as beside:
        tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
        save_file(tensors, beside / "weights.safetensors")
        _save_optimizer(optimizer, beside / "optimizer.safetensors")
        write_whole(beside / "position.json", json.dumps({"step": _step(state), **position}))
        seal_state(beside)
    _drop_old(state.parent, keep)


def load_tensors(
    states: Path, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Load the newest undamaged state into named weights and their optimizer.

    Returns:
        The position that was saved; None where there is no state.

    Raises:
        ValueError: All states are damaged, or one was written by an older version.
    """
    newest = newest_state(states, remove_torn=True)
    if newest is None:
        return None

    try:
        saved = load_file(newest / "weights.safetensors")
        if {name: value.shape for name, value in saved.items()} != {
            name: value.shape for name, value in weights.items()
        }:
            raise ValueError("it has other weights than those that train")
        position = _read_position(newest)
        _load_optimizer(optimizer, newest / "optimizer.safetensors")
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the training state {newest} cannot be read ({reason}): "
            "delete it to continue from the one before"
        ) from error

    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
    return position


def _save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write an optimizer: its moments are tensors `number.name`, its groups are JSON metadata."""
    content = optimizer.state_dict()
    moments = {
        f"{number}.{name}": value.detach().contiguous()
        for number, values in content["state"].items()
        for name, value in values.items()
    }
    save_file(moments, path, metadata={"param_groups": json.dumps(content["param_groups"])})


def _load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Read back what `_save_optimizer` wrote."""
    with safe_open(path, framework="pt") as file:
        groups = json.loads((file.metadata() or {})["param_groups"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key in file.keys():  # noqa: SIM118  (not a dict)
            number, _, name = key.partition(".")
            moments.setdefault(int(number), {})[name] = file.get_tensor(key)
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


# A model on any number of processes, in torch's distributed checkpoint format.


class StateWriter:
    """Writes the states of a model; every process has one and makes the same calls in order.

    Args:
        states: Folder of the states.
        keep: Number of states that stay.
        asynchronous: Write in the background. The weights are copied first, so training goes on at
            once. The next `save`, `poll` or `finish` that finds the state whole on every process
            publishes it, always before another state is begun.
    """

    def __init__(
        self, states: Path, world: World, keep: int = KEEP, asynchronous: bool = False
    ) -> None:
        self.states, self.world, self.keep, self.asynchronous = states, world, keep, asynchronous
        if asynchronous:
            # The thread that writes has no warning filters of its own.
            warnings.filterwarnings("ignore", message=_ALONE)
        self._pending: tuple[Future[Any], Path, dict[str, Any]] | None = None
        # Training runs its own collectives at the same time, and two threads must not share a
        # group. This group is for files, so it is on the CPU.
        self._group = dist.new_group(backend="gloo") if asynchronous and world.size > 1 else None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        position: dict[str, Any],
    ) -> None:
        """Write a state, or begin to.

        Args:
            step: Number of optimizer steps done.
            position: Other values that a resumed run needs; must fit JSON.

        Raises:
            OSError: This state, or the one that was begun before, could not be written.
        """
        self.finish()
        state = self.states / f"step-{step:08d}"
        if self.world.is_first:
            begin_folder(state)
        self.world.barrier()

        content, position = _content(model, optimizer), {"step": step, **position}
        files = _Writer(partial_name(state))
        where = {"storage_writer": files, "no_dist": self.world.size == 1}
        with _as_os_error(_not_written(state), self.states):
            if self.asynchronous:
                # Weights on a CPU are copied too: training goes on in them.
                copies = DefaultStager(StagingOptions(False, False, False, False))
                future = dcp.async_save(
                    content, process_group=self._group, async_stager=copies, **where
                )
                assert isinstance(future, Future)
                self._pending = (future, state, position)
                return
            dcp.save(content, **where)
        self._publish(state, position)

    def poll(self) -> None:
        """Publish a state that was written in the meantime."""
        if self._pending:
            done = torch.tensor(int(self._pending[0].done()), device=self.world.device)
            if int(self.world.total(done)) == self.world.size:
                self.finish()

    def finish(self) -> None:
        """Wait for the state that is being written, and publish it.

        Raises:
            OSError: The state could not be written.
        """
        if self._pending:
            (future, state, position), self._pending = self._pending, None
            with _as_os_error(_not_written(state), self.states):
                future.result()
            self.world.barrier()
            self._publish(state, position)

    def _publish(self, state: Path, position: dict[str, Any]) -> None:
        if self.world.is_first:
            beside = partial_name(state)
            write_whole(beside / "position.json", json.dumps(position))
            seal_state(beside)
            publish_folder(beside, state)
            _drop_old(self.states, self.keep)
        self.world.barrier()


def load_state(
    states: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> dict[str, Any] | None:
    """Load the newest undamaged state into a model and its optimizer.

    Every process calls it, with any number of processes, whatever number wrote the state.

    Returns:
        The position that was saved; None where there is no state.

    Raises:
        ValueError: There are states, but none can be read, or one is of an older version.
    """
    _refuse_older(states)
    found = list_states(states)
    for state in reversed(found):
        if _report_damage(state, world):
            continue

        content = _content(model, optimizer)
        reader, planner = _Reader(state), _Planner()
        try:
            position = _read_position(state)
            with _as_os_error(f"the training state {state} cannot be read"):
                dcp.load(content, storage_reader=reader, planner=planner, no_dist=world.size == 1)
        except (OSError, ValueError) as error:
            # Every process gets this error. The state before overwrites what was read of this one.
            echo(f"mipha: {error}; going on from the one before it", err=True)
            continue
        set_state_dict(
            model,
            optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
            options=_TRAINED,
        )
        return position

    if found:
        raise _none_readable(states, len(found))
    return None


class _Writer(FileSystemWriter):
    """Writes the files of a state, and hashes those of this process where it writes them.

    That is in the background where the state is written there, and once for each process. What is
    where in the files goes into metadata.json; torch would pickle it.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        results = super().write_data(plan, planner)
        names = sorted({result.storage_data.relative_path for result in results.wait()})
        if names:
            facts = {name: describe_file(Path(self.path) / name) for name in names}
            write_whole(Path(self.path) / f"{names[0]}.{_SUMS}", json.dumps(facts))
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        # The values: tensors in chunks, or others, each at its place in the nested content.
        values: dict[str, Any] = {}
        for name, value in metadata.state_dict_metadata.items():
            values[name] = {"place": metadata.planner_data[name]}
            if isinstance(value, TensorStorageMetadata):
                values[name] |= {
                    "dtype": str(value.properties.dtype).removeprefix("torch."),
                    "size": value.size,
                    "chunks": [(chunk.offsets, chunk.sizes) for chunk in value.chunks],
                }

        # Where each chunk is stored.
        stored = [
            {
                "value": result.index.fqn,
                "chunk": result.index.offset,
                "index": result.index.index,
                "file": result.storage_data.relative_path,
                "offset": result.storage_data.offset,
                "length": result.storage_data.length,
            }
            for part in results
            for result in part
        ]
        content = json.dumps({"values": values, "stored": stored}) + "\n"
        write_whole(Path(self.path) / _METADATA, content)


class _Reader(FileSystemReader):
    """Reads the files of a state by their metadata.json."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = read_json_object(Path(self.path) / _METADATA)

        values: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, value in content["values"].items():
            if "dtype" not in value:
                values[name] = BytesStorageMetadata()
                continue
            dtype = getattr(torch, value["dtype"])
            chunks = [
                ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                for offsets, sizes in value["chunks"]
            ]
            values[name] = TensorStorageMetadata(
                TensorProperties(dtype), torch.Size(value["size"]), chunks
            )

        stored = {}
        for entry in content["stored"]:
            if Path(entry["file"]).name != entry["file"]:
                raise ValueError(f"{_METADATA} names a file outside the state: {entry['file']}")
            chunk = None if entry["chunk"] is None else torch.Size(entry["chunk"])
            index = MetadataIndex(entry["value"], chunk, entry["index"])
            stored[index] = _StorageInfo(entry["file"], entry["offset"], entry["length"])

        places = {name: tuple(value["place"]) for name, value in content["values"].items()}
        return Metadata(values, places, stored, StorageMeta(load_id=self.load_id))


class _Planner(DefaultLoadPlanner):
    """Loads values that are no tensors, which torch unpickles, as plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            plain = torch.load(value, weights_only=True)
        except Exception as error:  # torch's sentence would advise to run what is in the file
            raise ValueError("a value in it is no plain value, and code is never run") from error
        again = io.BytesIO()
        torch.save(plain, again)
        again.seek(0)
        super().load_bytes(read_item, again)


def _content(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the content of a state: the weights that train and their optimizer's moments."""
    weights, moments = get_state_dict(model, optimizer, options=_TRAINED)
    return {"model": weights, "optimizer": moments}


def _read_position(state: Path) -> dict[str, Any]:
    position = read_json_object(state / "position.json", fix=f"delete {state}")
    if type(position.get("step")) is not int or position["step"] < 0:
        raise ValueError(f"{state / 'position.json'} has no number of steps: delete {state}")
    return position


@contextmanager
def _as_os_error(sentence: str, written: Path | None = None) -> Iterator[None]:
    """Turn torch's report of a full disk or a damaged file into an OSError.

    torch raises a BaseException of its own, which `except Exception` does not catch. Its writer of
    zip files hides that a disk is full, so the free space stands beside what it says.

    Args:
        sentence: What failed.
        written: Folder that was written to; None where files were read.
    """
    with warnings.catch_warnings():
        # torch warns even a single process that asked for no others.
        warnings.filterwarnings("ignore", message=_ALONE)
        try:
            yield
        except CheckpointException as error:
            cause = str(next(iter(error.failures.values()))[0])
            if written is not None:
                cause += f" ({shutil.disk_usage(written).free / 1e9:.1f} GB are free there)"
            raise OSError(f"{sentence}: {cause}") from error


def _not_written(state: Path) -> str:
    return f"the training state {state} could not be written; the one before it is intact"
