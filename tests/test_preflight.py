"""Mistakes that can be known without torch are named before it is imported or a file is made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mipha import preflight
from mipha.preflight import check_device, check_new_folder, check_writable
from mipha.recipe import load_recipe
from mipha.run import create_run

PROGRAM = """
import json, sys
from typer.testing import CliRunner
from mipha.cli import app
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    done = CliRunner().invoke(app, arguments)
    found[name] = (done.exit_code, done.stderr, "torch" in sys.modules)
print(json.dumps(found))
"""

MISTAKES: dict[str, tuple[list[str], str]] = {
    "train, recipe": (["train", "quickstar", "-o", "new"], "no recipe 'quickstar'"),
    "train, other run": (["train", "quickstart", "-o", "run", "seed=4"], "run of another recipe"),
    "train, file": (["train", "quickstart", "-o", "file"], "file is a file, not a folder"),
    "train, below a file": (["train", "quickstart", "-o", "file/run"], "cannot be written to"),
    "train, tower": (
        ["train", "quickstart", "-o", "new", "model.vision_tower=siglip"],
        "no vision tower 'siglip': did you mean siglip",
    ),
    "train, language model": (
        ["train", "quickstart", "-o", "new", "model.language_model=./nowhere"],
        "no language model './nowhere'",
    ),
    "train, hub id": (
        ["train", "quickstart", "-o", "new", "model.language_model=nobody/none"],
        "language model 'nobody/none' cannot be read from nobody/none",
    ),
    "train, template": (
        ["train", "quickstart", "-o", "new", "model.chat_template=chatmal"],
        "no chat template 'chatmal': did you mean chatml",
    ),
    "train, data": (
        ["train", "quickstart", "-o", "new", "data.finetune=nothing.jsonl"],
        "no data at nothing.jsonl: check the path",
    ),
    "train, data set": (
        ["train", "quickstart", "-o", "new", "data.finetune=easyvqa"],
        "no data set 'easyvqa': did you mean easy_vqa",
    ),
    "train, tracker": (
        ["train", "quickstart", "-o", "new", "--track", "wandbb"],
        "no tracker 'wandbb'",
    ),
    "plan, device": (["plan", "quickstart", "--device", "h900"], "no device 'h900'"),
    "plan, tower": (["plan", "quickstart", "model.vision_tower=siglip"], "no vision tower"),
    "plan, serve": (["plan", "quickstart", "--serve", "--device", "h100"], "this machine's CPU"),
    "plan, dtype": (["plan", "quickstart", "--serve", "--dtype", "int3"], "no dtype 'int3'"),
    "plan, run": (["plan", "quickstart", "--run", "nothing"], "no run folder nothing"),
    "evaluate, run": (["evaluate", "nothing", "-b", "pope"], "no run or model folder nothing"),
    "evaluate, unfinished": (["evaluate", "run", "-b", "easy_vqa"], "has not finished finetune"),
    "evaluate, benchmark": (["evaluate", "model", "-b", "pop", "-o", "new"], "did you mean pope"),
    "evaluate, out": (["evaluate", "model", "-b", "pope", "-o", "file/x"], "cannot be written to"),
    "export, run": (["export", "nothing", "-o", "new"], "no run or model folder nothing"),
    "export, out": (["export", "model", "-o", "run"], "run exists: choose another -o"),
    "export, gguf run": (
        ["export", "nothing", "--to", "gguf", "-o", "new"],
        "no run or model folder",
    ),
    "export, gguf out": (["export", "model", "--to", "gguf", "-o", "run"], "run exists"),
    "export, gguf kind": (
        ["export", "model", "--to", "gguf", "--quantize", "q9", "-o", "new"],
        "no quantisation 'q9'",
    ),
    "export, adapter": (["export", "run", "--merge", "-o", "new"], "run has no adapter_config"),
    "export, adapter out": (["export", "adapter", "--merge", "-o", "run"], "run exists"),
    "serve, run": (["serve", "nothing"], "nothing"),
    "serve, device": (["serve", "model", "--device", "cudaa"], "no device 'cudaa': did you mean"),
    "serve, no gpu": (["serve", "model", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    "serve, dtype": (["serve", "model", "--dtype", "int8"], "no dtype 'int8'"),
    "chat, run": (["chat", "nothing"], "no run or model folder nothing"),
    "chat, image": (["chat", "model", "--image", "no.png"], "no image no.png"),
    "chat, dtype": (["chat", "model", "--dtype", "int8"], "no dtype 'int8'"),
    "align, data": (
        ["align", "sft", "smollm2-135m-sft", "-o", "new", "data=nothing.json"],
        "data nothing.json is not there",
    ),
    "align, model": (
        ["align", "sft", "smollm2-135m-sft", "-o", "new", "data=file", "language_model=smol"],
        "no language model 'smol'",
    ),
    "align, folder": (
        ["align", "sft", "smollm2-135m-sft", "-o", "model", "data=file"],
        "model is not empty and not an alignment step",
    ),
    "quickstart, folder": (["quickstart", "-o", "file"], "file is a file, not a folder"),
    "quickstart, override": (["quickstart", "-o", "new", "sed=1"], "did you mean seed"),
    "study, recipe": (["study", "run", "own.yaml", "-o", "new"], "no vision tower 'siglip'"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a model folder, an adapter, a file and a study."""
    here = tmp_path_factory.mktemp("here")
    create_run(here / "run", load_recipe("quickstart"))
    (here / "run" / "pretrain").mkdir()
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text("{}")
    (here / "model" / "model.safetensors").touch()
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    (here / "file").touch()
    scale = {
        "recipe": "quickstart",
        "axes": {"tower": {"dinov2": [], "siglip": ["model.vision_tower=siglip"]}},
        "evaluate": [{"benchmark": "easy_vqa"}],
    }
    tree = {"name": "own", "title": "Own", "source": "none", "scales": {"mini": scale}}
    (here / "own.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return here


@pytest.fixture(scope="module")
def found(here: Path) -> dict[str, tuple[int, str, bool]]:
    """Every mistake to its exit code, its message and whether torch is imported by then."""
    commands = {name: arguments for name, (arguments, _) in MISTAKES.items()}
    before = sorted(here.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
        env={
            "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
            "HF_HUB_OFFLINE": "1",
            "HOME": str(here),
            "CUDA_VISIBLE_DEVICES": "",
        },
    )
    assert sorted(here.rglob("*")) == before, "a refused command leaves nothing"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_without_torch(
    name: str, found: dict[str, tuple[int, str, bool]]
) -> None:
    code, message, has_torch = found[name]
    assert code == 2 and MISTAKES[name][1] in message, message
    assert len(message.splitlines()) == 1 or "quickstart, override" in name, message
    assert not has_torch


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing of the check remains"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/run cannot be written to \(Not a directory\): choose"):
        check_writable(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="file exists: choose another -o, or remove it"):
        check_new_folder(tmp_path / "file")


@pytest.mark.parametrize(
    ("build", "gpus", "device", "sentence"),
    [
        ({"cuda": None, "hip": None}, 0, "cuda", "torch is installed without CUDA: leave it out"),
        ({"cuda": "13.0", "hip": None}, 0, "cuda", "this machine has none, or no driver"),
        ({"cuda": "13.0", "hip": None}, 2, "cuda:2", "this machine has 2: leave it out"),
        ({"cuda": "13.0", "hip": None}, 2, "cuda:x", "no device 'cuda:x'"),
        ({"cuda": "13.0", "hip": None}, 2, "gpu", "no device 'gpu'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, build: dict, gpus: int, device: str, sentence: str
) -> None:
    monkeypatch.setattr(preflight, "_torch_version", lambda: build)
    monkeypatch.setattr(preflight, "_count_gpus", lambda: gpus)
    with pytest.raises(ValueError, match=sentence):
        check_device(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cpu", "mps", None])
def test_a_device_that_is_there_passes(monkeypatch: pytest.MonkeyPatch, device: str | None) -> None:
    monkeypatch.setattr(preflight, "_torch_version", lambda: {"cuda": "13.0", "hip": None})
    monkeypatch.setattr(preflight, "_count_gpus", lambda: 2)
    check_device(device)


def test_torch_tells_its_build_without_being_imported() -> None:
    import torch

    assert preflight._torch_version()["cuda"] == torch.version.cuda
    assert preflight._torch_version()["__version__"] == str(torch.__version__)


def test_a_path_that_is_not_utf_8_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\\udcff' is not UTF-8, .*: choose another -o"):
        check_writable(tmp_path / os.fsdecode(b"bad\xff"))
