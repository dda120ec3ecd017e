"""After `kill -9` at any moment, a resumed run ends in the weights of an undisturbed one."""

from __future__ import annotations

import json
import random
import runpy
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mipha.recipe import Recipe
from mipha.run import Run
from mipha.training.pipeline import train
from tests import forked
from tests.data.test_addresses import Server
from tests.data.test_blocks import parquet_bytes, tar_bytes

STAGES = ("pretrain", "finetune")

LONG = ("stages.finetune.max_steps=12", "stages.finetune.epochs=3", "stages.pretrain.max_steps=3")
TIMED = {
    "seconds",
    "data_wait_seconds",
    "samples_per_second",
    "images_per_second",
    "tokens_per_second",
    "peak_memory_gib",
}


@pytest.fixture(scope="module")
def uninterrupted(tiny_run_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Phi here has dropout, so that a resumed run must draw what it would have drawn."""
    return train(
        tiny_run_recipe(*LONG, family="phi"), tmp_path_factory.mktemp("uninterrupted") / "run"
    )


def killed_at(recipe: Recipe, folder: Path, moment: Callable[[], bool], delay: float) -> bool:
    """Train in another process and kill it after a moment; return whether it was still at work.

    Args:
        moment: Condition that the kill waits for.
        delay: Seconds between the moment and the kill.
    """
    # The same as `mipha train`, except for the time to start.
    return kill_at(forked.start_function(train, recipe, folder), moment, delay)


def kill_at(process: BaseProcess, moment: Callable[[], bool], delay: float = 0.0) -> bool:
    """Kill a process after a moment; return whether it was still at work."""
    while process.is_alive() and not moment():
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def is_behind(run: Run, stage: str, lines: int) -> bool:
    """Return whether the stage has more lines of metrics than that, or is finished."""
    return num_lines(run.metrics(stage)) > lines or run.is_finished(stage)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same(run: Run, other: Run, weights: Callable, metrics: Callable) -> None:
    for stage in STAGES:
        mine, theirs = weights(run.checkpoint(stage)), weights(other.checkpoint(stage))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), stage
        rows, others = (
            [{k: v for k, v in row.items() if k not in TIMED} for row in metrics(r.metrics(stage))]
            for r in (run, other)
        )
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert rows == others
    assert not any(run.folder.rglob("*.partial"))
    assert not any(run.states(stage).exists() for stage in STAGES)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_anywhere_it_ends_in_the_same_weights(
    kills: int,
    asynchronous: bool,
    uninterrupted: Run,
    tmp_path: Path,
    weights: Callable,
    metrics: Callable,
) -> None:
    """Every third kill comes while a state is written, the others at random moments."""
    recipe = uninterrupted.recipe.override(f"async_checkpoints={str(asynchronous).lower()}")
    chance, landed, number = random.Random(kills), 0, 0
    run = Run(tmp_path / "0")
    while landed < kills:
        number += 1
        assert number < 3 * kills, "too few of the kills came before the end"
        if run.is_finished("finetune"):  # and one more run to kill
            assert_same(train(recipe, run.folder), uninterrupted, weights, metrics)
            run = Run(tmp_path / str(number))
        stage = "finetune" if run.is_finished("pretrain") else "pretrain"
        before, states = num_lines(run.metrics(stage)), run.states(stage)
        if number % 3 == 0:
            landed += killed_at(
                recipe,
                run.folder,
                lambda states=states: any(states.glob(".step-*.partial")),
                0.003 * chance.random(),
            )
        else:
            lines = before + chance.randrange(4)
            landed += killed_at(
                recipe,
                run.folder,
                lambda run=run, stage=stage, lines=lines: is_behind(run, stage, lines),
                0.04 * chance.random(),
            )
    assert_same(train(recipe, run.folder), uninterrupted, weights, metrics)


def test_a_killed_run_over_a_server_goes_on_with_another_cache(
    tiny_run_recipe: Callable,
    tmp_path: Path,
    weights: Callable,
    metrics: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row groups behind an address: what the cache holds does not matter."""
    pytest.importorskip("pyarrow")
    server = Server()
    for number in range(2):
        server.files[f"{number}.parquet"] = parquet_bytes(number)
    root = server.address + "/{0..1}.parquet"
    data = f"[{{dataset: auto, root: '{root}', cache_gb: 1, window_rows: 40}}]"
    recipe = tiny_run_recipe(*(f"stages.{stage}.data={data}" for stage in STAGES))

    monkeypatch.setenv("MIPHA_CACHE", str(tmp_path / "first"))
    whole = train(recipe, tmp_path / "whole")
    run = Run(tmp_path / "run")
    assert killed_at(recipe, run.folder, lambda: num_lines(run.metrics("finetune")) >= 3, 0.0)
    monkeypatch.setenv("MIPHA_CACHE", str(tmp_path / "second"))
    assert_same(train(recipe, run.folder), whole, weights, metrics)
    server.server.shutdown()
    server.server.server_close()


@pytest.mark.parametrize(
    "changes",
    [
        {"image": "tiles"},
        {"image": "tiles", "shuffle": 2},
        {"image": "anyres"},
        {"image": "native", "min_image_tokens": 2, "max_image_tokens": 12},
    ],
    ids=["tiles", "shuffled", "anyres", "native"],
)
def test_a_killed_run_of_each_kind_of_picture_ends_in_the_same_weights(
    changes: dict[str, object],
    tiny_run_recipe: Callable,
    tmp_path: Path,
    weights: Callable,
    metrics: Callable,
) -> None:
    recipe = tiny_run_recipe(
        *(f"model.{key}={value}" for key, value in changes.items()),
        *(f"stages.{stage}.row_tokens=400" for stage in STAGES),
    )
    run, whole = Run(tmp_path / "run"), train(recipe, tmp_path / "whole")
    assert killed_at(recipe, run.folder, lambda: num_lines(run.metrics("finetune")) >= 3, 0.0)
    assert_same(train(recipe, run.folder), whole, weights, metrics)


def test_a_killed_run_with_adapters_ends_in_the_same_weights(
    tiny_run_recipe: Callable, tmp_path: Path, weights: Callable, metrics: Callable
) -> None:
    lora = ("language_model=lora", "vision_tower=last-1", "lora.rank=4")
    recipe = tiny_run_recipe(
        "stages.pretrain.tuning.language_model=lora",
        *(f"stages.finetune.tuning.{change}" for change in lora),
    )
    run, whole = Run(tmp_path / "run"), train(recipe, tmp_path / "whole")
    moments = (("pretrain", 1), ("finetune", 1), ("finetune", 4))
    killed = [
        killed_at(recipe, run.folder, lambda s=s, n=n: num_lines(run.metrics(s)) >= n, 0.0)
        for s, n in moments
    ]
    assert sum(killed) >= 2, "too few of the kills came before the end"
    assert_same(train(recipe, run.folder), whole, weights, metrics)
    for stage in STAGES:
        mine, theirs = (
            load_file(done.stage(stage) / "adapter" / "adapter_model.safetensors")
            for done in (run, whole)
        )
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), stage
        assert (run.stage(stage) / "tuning.json").read_text() == (
            whole.stage(stage) / "tuning.json"
        ).read_text()


# With another number of processes sums are taken in another order, so trained weights may differ in
# their last bits. What must not differ is the state: all of it comes back, to the bit.

RESUMED = """
import json, os
from pathlib import Path
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.tensor import DTensor
from mipha.engine import states
from mipha.recipe import load_recipe
from mipha.training import loop
from mipha.training.pipeline import train
from tests.data.test_addresses import Server
from tests.data.test_blocks import parquet_bytes

os.environ.update(LAUNCHED)

def load_state(folder, model, optimizer, world):
    position = states.load_state(folder, model, optimizer, world)
    if position is None:
        return None

    # All of what the processes hold now, and all of what the files hold.
    held = flatten_state_dict(states._content(model, optimizer))[0]
    held = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in held.items()
        if isinstance(value, torch.Tensor)
    }
    state = folder / f"step-{position['step']:08d}"
    known = states._Reader(state).read_metadata().state_dict_metadata
    stored = {
        name: torch.empty(value.size, dtype=value.properties.dtype)
        for name, value in known.items()
        if hasattr(value, "chunks")
    }
    dcp.load(stored, storage_reader=states._Reader(state), no_dist=True)
    if world.is_first:
        row = {
            "stage": folder.parent.name,
            "processes": world.size,
            "step": position["step"],
            "position": position == json.loads((state / "position.json").read_text()),
            "tensors": len(held),
            "moments": sum(name.startswith("optimizer.") for name in held),
            "lost": sorted(stored.keys() ^ held.keys()),
            "differ": [name for name in held if not torch.equal(held[name], stored[name])],
        }
        with (Path(FOLDER) / "resumed.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\\n")
    return position

loop.load_state = load_state
train(load_recipe(RECIPE), FOLDER)
"""


def launch(
    driver: Path, recipe: Path, folder: Path, size: int, **environment: str
) -> list[BaseProcess]:
    """Train in some processes, as torchrun would, but for the time to start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in map(str, range(size)):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        launched |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(size))
        launched |= {"MASTER_PORT": str(port), **environment}
        given = {"LAUNCHED": launched, "RECIPE": str(recipe), "FOLDER": str(folder)}
        processes.append(forked.start_function(runpy.run_path, str(driver), given))
    return processes


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed_by_another_number_of_processes(
    kills: int, tiny_run_recipe: Callable, tmp_path: Path, weights: Callable, metrics: Callable
) -> None:
    """What a resumed run holds is what the state before it holds, bit for bit."""
    recipe = tiny_run_recipe(
        "sharding=fsdp",
        *(f"stages.{stage}.adam_eps=1e-2" for stage in STAGES),
        *("stages.finetune.max_steps=12", "stages.finetune.epochs=3"),
        *(f"stages.{stage}.checkpoint_every=1" for stage in STAGES),
    )
    undisturbed = train(recipe, tmp_path / "undisturbed")
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    (tmp_path / "driver.py").write_text(RESUMED)

    # Kill all processes of a launch at a random moment; the next launch has another number of them.
    chance, landed, number, runs = random.Random(kills), 0, 0, [Run(tmp_path / "0")]
    sizes = (1, 2, 3, 2, 1, 3)
    while landed < kills:
        assert number < 3 * kills, "too few of the kills came before the end"
        run, size = runs[-1], sizes[number % len(sizes)]
        stage = "finetune" if run.is_finished("pretrain") else "pretrain"
        lines = num_lines(run.metrics(stage)) + chance.randrange(1, 4)
        processes = launch(tmp_path / "driver.py", tmp_path / "recipe.yaml", run.folder, size)
        while any(process.is_alive() for process in processes) and not is_behind(run, stage, lines):
            time.sleep(0.001)
        time.sleep(0.04 * chance.random())
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        landed += all(process.exitcode == -signal.SIGKILL for process in processes)
        number += 1
        if run.is_finished("finetune"):  # and one more run to kill
            runs.append(Run(tmp_path / str(number)))

    # Every run ends as the undisturbed one does, but for the last bits.
    resumed = []
    for run in runs:
        train(recipe, run.folder)
        for stage in STAGES:
            rows, others = metrics(run.metrics(stage)), metrics(undisturbed.metrics(stage))
            assert [row["step"] for row in rows] == list(range(1, len(others) + 1))
            for row, other in zip(rows, others, strict=True):
                counted = {k for k, value in other.items() if type(value) is int}
                assert {k: row[k] for k in counted} == {k: other[k] for k in counted}
                assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
            mine, theirs = (weights(done.checkpoint(stage)) for done in (run, undisturbed))
            for name in theirs:
                torch.testing.assert_close(mine[name], theirs[name], rtol=1e-2, atol=1e-3)
        if (run.folder / "resumed.jsonl").exists():
            resumed += metrics(run.folder / "resumed.jsonl")

    # Whatever was loaded is what was stored.
    assert len(resumed) >= kills // 2
    assert any(row["processes"] > 1 for row in resumed)
    for row in resumed:
        assert row["position"] and not row["lost"] and not row["differ"], row
        assert row["moments"] > 1 and row["tensors"] > row["moments"]
    print(json.dumps({"kills": landed, "launches": number, "resumed": resumed}))


def test_a_run_over_a_server_goes_on_with_more_processes(
    tiny_run_recipe: Callable, tmp_path: Path, weights: Callable, metrics: Callable
) -> None:
    """One process is killed, and two go on from the state: to the same bits with any cache."""
    pytest.importorskip("pyarrow")
    server = Server()
    for number in range(2):
        server.files[f"{number}.parquet"] = parquet_bytes(number)
        server.files[f"{number}.tar"], server.files[f"{number}.tar.idx"] = tar_bytes(number)
    data = ", ".join(
        f"{{dataset: auto, root: '{server.address}/{{0..1}}.{kind}', cache_gb: 1, window_rows: 40}}"
        for kind in ("parquet", "tar")
    )
    recipe = tiny_run_recipe(*(f"stages.{stage}.data=[{data}]" for stage in STAGES))
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    (tmp_path / "driver.py").write_text(RESUMED)

    def started(folder: Path, size: int, cache: str) -> list[BaseProcess]:
        given = tmp_path / "driver.py", tmp_path / "recipe.yaml", folder, size
        return launch(*given, MIPHA_CACHE=str(tmp_path / cache))

    def ended(processes: list[BaseProcess]) -> list[int | None]:
        for process in processes:
            process.join(500)
        return [process.exitcode for process in processes]

    # Kill one process, and go on with two: with its cache, and with an empty one.
    assert ended(started(tmp_path / "whole", 1, "first")) == [0]
    (process,) = started(tmp_path / "full", 1, "second")
    while num_lines(Run(tmp_path / "full").metrics("finetune")) < 3 and process.is_alive():
        time.sleep(0.001)
    process.kill()
    assert ended([process]) == [-signal.SIGKILL]
    shutil.copytree(tmp_path / "full", tmp_path / "empty")
    assert ended(started(tmp_path / "full", 2, "second")) == [0, 0]
    server.requests.clear()
    assert ended(started(tmp_path / "empty", 2, "third")) == [0, 0]
    asked = Counter(request for request in server.requests if request[0] == "GET")
    assert asked and set(asked.values()) == {1}
    server.server.shutdown()
    server.server.server_close()

    # Samples and tokens are those of one process, and weights but for the last bits.
    full, empty, whole = (Run(tmp_path / name) for name in ("full", "empty", "whole"))
    assert_same(full, empty, weights, metrics)
    for stage in STAGES:
        rows, others = metrics(full.metrics(stage)), metrics(whole.metrics(stage))
        counted = [key for key, value in others[0].items() if type(value) is int]
        assert len(rows) == len(others) and "samples" in counted
        for row, other in zip(rows, others, strict=True):
            assert [row[key] for key in counted] == [other[key] for key in counted]
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
    resumed = metrics(full.folder / "resumed.jsonl")
    assert [(row["processes"], row["lost"], row["differ"]) for row in resumed] == [(2, [], [])]


# Agents of torchrun as two nodes; what `torchrun` itself runs, but for the time to start.
NODE = """
import os, signal, threading, time
from pathlib import Path
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from mipha.recipe import load_recipe
from mipha.training.pipeline import train

def die_later():
    metrics = Path(FOLDER) / "finetune" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\\n") >= 2):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)

def work():
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    with (Path(FOLDER).parent / "attempts").open("a") as file:
        file.write(f"{os.environ['RANK']} {attempt}\\n")
    if KILL and os.environ["RANK"] == "1" and attempt == "0":
        threading.Thread(target=die_later, daemon=True).start()
    train(load_recipe(RECIPE), FOLDER)

config = LaunchConfig(
    min_nodes=2,
    max_nodes=2,
    nproc_per_node=1,
    run_id="two nodes",
    rdzv_backend="c10d",
    rdzv_endpoint=ENDPOINT,
    max_restarts=3,
    monitor_interval=0.1,
    start_method="fork",
)
elastic_launch(config, work)()
"""


def train_on_two_nodes(driver: Path, recipe: Path, folder: Path, kill: bool) -> list[int | None]:
    """Return the exit codes of both nodes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    given = {"RECIPE": str(recipe), "FOLDER": str(folder), "ENDPOINT": endpoint, "KILL": kill}
    nodes = [forked.start_function(runpy.run_path, str(driver), given) for _ in range(2)]
    for node in nodes:
        node.join(500)
        node.kill()
    return [node.exitcode for node in nodes]


def test_after_the_loss_of_a_process_torchrun_resumes_by_itself(
    tiny_run_recipe: Callable, tmp_path: Path, weights: Callable, metrics: Callable
) -> None:
    """--max-restarts: both nodes start again, and end in the bits of an undisturbed run."""
    recipe = tiny_run_recipe(
        *("sharding=fsdp", "stages.pretrain.max_steps=1", "stages.finetune.max_steps=4"),
        "stages.finetune.checkpoint_every=1",
        family="phi",
    )
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    (tmp_path / "driver.py").write_text(NODE)
    for name, kill in (("whole", False), ("killed", True)):
        folder = tmp_path / name / "run"
        folder.parent.mkdir()
        codes = train_on_two_nodes(tmp_path / "driver.py", tmp_path / "recipe.yaml", folder, kill)
        assert codes == [0, 0]

    attempts = (tmp_path / "killed" / "attempts").read_text().split("\n")[:-1]
    assert sorted(attempts) == ["0 0", "0 1", "1 0", "1 1"]
    run, whole = Run(tmp_path / "killed" / "run"), Run(tmp_path / "whole" / "run")
    assert_same(run, whole, weights, metrics)
