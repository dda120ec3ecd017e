"""Two processes train what one trains; all cases share one launch, because starting is slow."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mipha.engine.states import list_states
from mipha.models.build import build
from mipha.models.tuning import layers_of
from mipha.recipe import Recipe
from mipha.run import Run, open_run
from mipha.training import pipeline, placement
from mipha.training.pipeline import train
from mipha.training.placement import mesh_of, round_frozen
from mipha.training.stage import Stage
from mipha.world import World
from tests import forked

STAGES = ("pretrain", "finetune")

# With this epsilon, rounding of gradients that are truly 0 moves no weight; see test_loop.
SMOOTH = (
    *(f"stages.{stage}.adam_eps=1e-2" for stage in STAGES),
    "stages.finetune.learning_rate=3e-2",
)

DRIVER = """
import json, os, signal, threading, time
from pathlib import Path
import torch
from mipha.recipe import load_recipe
from mipha.training import pipeline, placement
from mipha.training.pipeline import train

# As on a GPU: layers of two types are sharded together.
pipeline.round_frozen = lambda model, device: placement.round_frozen(model, torch.device("cuda"))
os.environ.update(LAUNCHED)  # what torchrun sets, given by the test

# Count the sums over copies of the model, which its processes have alike.
sums, sum_up = [], torch.distributed.all_reduce
def counted(tensor, *rest, **options):
    sums.append(tensor.numel())
    return sum_up(tensor, *rest, **options)
torch.distributed.all_reduce = counted

def stop_after(metrics, lines):
    while not (metrics.exists() and metrics.read_bytes().count(b"\\n") >= lines):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGTERM)

for case in json.loads(CASES):
    folder = Path(case["folder"])
    if case["stop_after"] and LAUNCHED["RANK"] == "0":
        watched = (folder / "finetune" / "metrics.jsonl", case["stop_after"])
        threading.Thread(target=stop_after, args=watched, daemon=True).start()
    try:
        train(load_recipe(case["recipe"]), folder)
        assert not case["stop_after"], "was not stopped"
    except KeyboardInterrupt:
        assert case["stop_after"], "was stopped"
    if LAUNCHED["RANK"] == "0":
        (folder / "sums.json").write_text(json.dumps(sums))
    sums.clear()
"""


def launch(driver: Path, cases: list[dict[str, Any]], size: int = 2, local: int = 2) -> None:
    """Run the driver in some processes, as torchrun would, forked from one that has the imports.

    Args:
        local: Processes of a machine, as far as they are told.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        launched = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % local),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(local),
        }
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        given = {"LAUNCHED": launched, "CASES": json.dumps(cases)}
        processes.append(forked.start_function(runpy.run_path, str(driver), given))
    while any(process.is_alive() for process in processes) and not any(
        process.exitcode for process in processes
    ):
        processes[0].join(0.1)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # where one has failed, the other waits for it
    assert not any(codes), f"exit codes {codes}: see the captured output"


PICTURES: dict[str, dict[str, Any]] = {
    "tiles": {"image": "tiles"},
    "shuffled": {"image": "tiles", "shuffle": 2},
    "anyres": {"image": "anyres"},
    "native": {"image": "native", "min_image_tokens": 2, "max_image_tokens": 12},
}


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Which number is {i}?"},
                {"role": "assistant", "content": f"{i} " * (1 + i)},
            ]
        }
        for i in range(6)
    ]
    path = tmp_path_factory.mktemp("text") / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def recipes(tiny_run_recipe: Callable, text_only: Path) -> dict[str, Recipe]:
    finetune = "stages.finetune."
    cases = {
        # One row a process: where one of the two has an image, the other has none.
        "skewed": (
            finetune + "batching=padded",
            finetune + "batch_size=2",
            finetune + "max_steps=8",
        ),
        "shared": (finetune + "batching=shared-image", finetune + "activation_checkpointing=true"),
        # Pictures of other shapes, and again rows without any beside rows with.
        **{
            name: (
                *(f"model.{key}={value}" for key, value in keys.items()),
                *(f"stages.{stage}.row_tokens=400" for stage in ("pretrain", "finetune")),
                finetune + "batching=padded",
                finetune + "batch_size=2",
                finetune + "max_steps=4",
            )
            for name, keys in PICTURES.items()
        },
        # One row in all, without an image: the second process has nothing of its own to do.
        "text only": (
            f"data.finetune={text_only}",
            finetune + "batch_size=2",
            finetune + "micro_batch_rows=2",
        ),
        "frozen": (
            finetune + "tuning.language_model=frozen",
            finetune + "part_learning_rates={vision_tower: 0.001}",
        ),
        "lora": tuple(
            finetune + f"tuning.{change}"
            for change in ("vision_tower=last-1", "language_model=lora", "lora.dropout=0")
        ),
        "validated": (
            finetune + "held_out=0.4",
            finetune + "validate_every=2",
            finetune + "batch_size=3",
        ),
        "in bfloat16": ("precision=bfloat16", finetune + "tuning.language_model=last-1"),
        "async": (
            "sharding=ddp",
            "async_checkpoints=true",
            finetune + "checkpoint_every=1",
            finetune + "activation_checkpointing=[vision_tower]",
        ),
        **{
            f"copies, {rows} rows a pass": (
                "sharding=ddp",
                finetune + "batching=padded",
                finetune + "batch_size=8",
                finetune + "max_steps=3",
                finetune + f"micro_batch_rows={rows}",
            )
            for rows in (1, 4)
        },
        "reshard 2 to 1": (finetune + "max_steps=8",),
        "reshard 1 to 2": (finetune + "max_steps=8", finetune + "checkpoint_every=3"),
    }
    parts = {
        "shared": ("qwen2", "clip"),
        "text only": ("gemma", "dinov2"),
        "skewed": ("stablelm", "vit"),
    }
    made = {}
    for name, overrides in cases.items():
        # The tiny model fits into every process, so auto is ddp.
        if name != "packed" and "sharding=ddp" not in overrides:
            overrides = ("sharding=fsdp", *overrides)
        family, tower = parts.get(name, ("llama", "siglip"))
        made[name] = tiny_run_recipe(*SMOOTH, *overrides, family=family, tower=tower)
    return made


@pytest.fixture(scope="module")
def by_two(recipes: dict[str, Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder of each recipe, trained by two processes; some were stopped midway."""
    root = tmp_path_factory.mktemp("two")
    cases: list[dict[str, Any]] = []
    for name, recipe in recipes.items():
        (root / f"{name}.yaml").write_text(recipe.dump())
        stop_after = 3 if name == "reshard 2 to 1" else 0
        cases.append(
            {
                "recipe": str(root / f"{name}.yaml"),
                "folder": str(root / name),
                "stop_after": stop_after,
            }
        )
    start_with_one(recipes["reshard 1 to 2"], root / "reshard 1 to 2")
    (root / "driver.py").write_text(DRIVER)
    launch(root / "driver.py", cases)
    return root


def start_with_one(recipe: Recipe, folder: Path) -> None:
    """Train the first few steps in this process, until a signal as from Ctrl-C."""
    metrics = folder / "finetune" / "metrics.jsonl"

    def stop() -> None:
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train(recipe, folder)


CASES = [
    "skewed",
    *PICTURES,
    "shared",
    "text only",
    "frozen",
    "lora",
    "validated",
    "in bfloat16",
    "async",
    "copies, 1 rows a pass",
    "reshard 1 to 2",
]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(
    case: str,
    recipes: dict[str, Recipe],
    by_two: Path,
    tmp_path: Path,
    weights: Callable,
    metrics: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        pipeline,
        "round_frozen",
        lambda model, device: round_frozen(model, torch.device("cuda")),
    )
    two, one = open_run(by_two / case), train(recipes[case], tmp_path / "one")
    assert_equal(one, two, weights, metrics)


def test_copies_sum_their_gradients_once_a_step(by_two: Path) -> None:
    """However many micro-batches a step has."""
    four, one = (
        json.loads((by_two / f"copies, {rows} rows a pass" / "sums.json").read_text())
        for rows in (1, 4)
    )
    assert len(one) > 6 and sum(one) > 10_000, "gradients are among them"
    assert four == one


def test_four_processes_on_two_machines_train_what_one_trains(
    tiny_run_recipe: Callable, tmp_path: Path, weights: Callable, metrics: Callable
) -> None:
    """Weights are sharded within a machine, gradients summed over both."""
    recipe = tiny_run_recipe(
        *SMOOTH,
        "stages.finetune.batching=padded",
        "stages.finetune.max_steps=4",
        "async_checkpoints=true",
    )
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    (tmp_path / "driver.py").write_text(DRIVER)
    case = {
        "recipe": str(tmp_path / "recipe.yaml"),
        "folder": str(tmp_path / "four"),
        "stop_after": 0,
    }
    launch(tmp_path / "driver.py", [case], size=4)
    assert_equal(train(recipe, tmp_path / "one"), open_run(tmp_path / "four"), weights, metrics)


@pytest.mark.parametrize(
    ("sharding", "size", "local", "shape"),
    [
        ("fsdp", 4, 2, (4,)),
        ("ddp", 4, 2, (4, 1)),
        ("hsdp", 6, 3, (2, 3)),
    ],
)
def test_how_processes_share_a_model(
    sharding: str, size: int, local: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(
        "mipha.training.placement.init_device_mesh", lambda device, shape, **names: shape
    )
    assert mesh_of(sharding, World(0, size, torch.device("cpu"))) == shape


@pytest.mark.parametrize(
    ("sharding", "local", "memory", "able", "chosen"),
    [
        ("auto", 4, 1e12, 4, "ddp"),
        ("auto", 1, 1e12, 4, "ddp"),
        ("auto", 4, 1e12, 3, "fsdp"),  # one device of four is smaller
        ("auto", 4, 1e6, 0, "fsdp"),
        ("auto", 2, 1e12, 4, "hsdp"),
        ("fsdp", 4, 1e12, 4, "fsdp"),
    ],
)
def test_auto_holds_the_whole_model_where_it_fits_on_every_device(
    sharding: str,
    local: int,
    memory: float,
    able: int,
    chosen: str,
    tiny_run_recipe: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    asked: list[int] = []

    def total(world: World, value: torch.Tensor) -> torch.Tensor:
        asked.append(int(value))
        return torch.tensor(able)

    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(World, "total", total)
    monkeypatch.setattr(placement, "device_memory", lambda world: memory)
    recipe = tiny_run_recipe(f"sharding={sharding}")
    world = World(0, 4, torch.device("cpu"))
    assert placement.choose_sharding(Stage(Run(tmp_path), recipe, "finetune", world)) == chosen
    said = capsys.readouterr().out
    if local == 2 or sharding != "auto":
        assert not asked and not said
    else:
        assert asked == [int(memory == 1e12)] and said.startswith(f"sharding: {chosen}, ")


@pytest.mark.parametrize(("local", "size"), [(4, 4), (4, 6)])
def test_sharding_over_machines_wants_several_alike(
    local: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    with pytest.raises(
        ValueError,
        match=r"sharding=hsdp needs several machines .* "
        rf"{local} of the {size} processes are on this one: use fsdp",
    ):
        mesh_of("hsdp", World(0, size, torch.device("cpu")))


def test_one_process_goes_on_where_two_stopped(
    recipes: dict[str, Recipe], by_two: Path, tmp_path: Path, weights: Callable, metrics: Callable
) -> None:
    two = open_run(by_two / "reshard 2 to 1")
    done = len(metrics(two.metrics("finetune")))
    assert 3 <= done < 8
    assert [path.name for path in list_states(two.states("finetune"))][-1] == f"step-{done:08d}"
    assert_equal(
        train(recipes["reshard 2 to 1"], tmp_path / "one"),
        train(recipes["reshard 2 to 1"], two.folder),
        weights,
        metrics,
    )


def assert_equal(one: Run, two: Run, weights: Callable, metrics: Callable) -> None:
    for stage in STAGES:
        mine, theirs = weights(one.checkpoint(stage)), weights(two.checkpoint(stage))
        assert mine.keys() == theirs.keys(), stage
        for name in mine:
            # Sums in another order differ in the last bits; Gemma's embedding scale and six
            # steps multiply that.
            assert (mine[name] - theirs[name]).abs().max() < 1e-4, (stage, name)
        rows, others = metrics(one.metrics(stage)), metrics(two.metrics(stage))
        assert [row["step"] for row in others] == list(range(1, len(rows) + 1))
        for row, other in zip(rows, others, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
            for key in row.keys() & {"validation_loss"}:
                assert row[key] == pytest.approx(other[key], rel=1e-4)
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
            assert all(
                row[key] == other[key]
                for key in ("samples", "images", "tokens", "supervised_tokens", "teraflop")
            )
        for part, mine in tuning(one, stage).items():
            theirs = tuning(two, stage)[part]
            assert mine["change"].pop("relative") == pytest.approx(
                theirs["change"].pop("relative"), rel=1e-2
            ), part
            assert mine["change"].pop("largest") == pytest.approx(
                theirs["change"].pop("largest"), rel=1e-2
            ), part
            assert mine == theirs
    before, after = weights(one.checkpoint("pretrain")), weights(one.checkpoint("finetune"))
    assert max((before[name] - after[name]).abs().max() for name in before) > 1e-2, (
        "weights that hardly move test nothing"
    )


def tuning(run: Run, stage: str) -> dict[str, Any]:
    return json.loads((run.stage(stage) / "tuning.json").read_text())["parts"]


def test_the_units_of_sharding_are_the_layers(
    tiny_parts: Callable, family: str, tower: str
) -> None:
    model, _ = build(tiny_parts(family, tower).recipe())
    layers = layers_of(model)
    assert len(layers) == 2 + 2
    assert not any(isinstance(layer, torch.nn.ModuleList) for layer in layers)
