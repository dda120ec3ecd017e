"""A small quickstart on real weights and data: all phases, summary, checkpoint and chat."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Ten commands on real weights: minutes.
pytestmark = [pytest.mark.weights, pytest.mark.slow]

SMALL = (
    "stages.pretrain.max_steps=3",
    "stages.pretrain.batch_size=4",
    "stages.finetune.max_steps=2",
    "stages.finetune.batch_size=8",
    "stages.finetune.row_tokens=256",
    "stages.pretrain.held_out=0.001",  # few images to be asked about
    "stages.finetune.held_out=0.001",
)

# This process has stock transformers and no mipha.
STOCK = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
assert "mipha" not in sys.modules
folder, asked = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
for image, question in asked:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=Image.open(image).convert("RGB"), text=text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    out = out[0, inputs["input_ids"].shape[1] :]
    print("ANSWER", processor.decode(out, skip_special_tokens=True).strip())
"""


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Interrupted in training and while questions are asked, then finished."""
    folder = tmp_path_factory.mktemp("tour") / "run"
    _interrupt_when(folder / "finetune/metrics.jsonl", *_tour(folder))
    ledger = json.loads((folder / "quickstart.json").read_text())
    assert not ledger["train"]["finished"] and ledger["train"]["seconds"] > 0
    _interrupt_when(folder / "evaluation/easy_vqa/predictions.meta.json", *_tour(folder))
    ledger = json.loads((folder / "quickstart.json").read_text())
    assert ledger["train"]["finished"] and not ledger["evaluate"]["finished"]
    return folder, _mipha(*_tour(folder))


def test_the_tour_ends_in_a_summary(tour: tuple[Path, str]) -> None:
    folder, said = tour
    for row in (
        "yes no minority",
        "baseline: majority",
        "baseline: question only",
        "same model trained blind",
        "before finetune",
        "mipha chat",
        "mipha serve",
        "mipha tune",
    ):
        assert row in said
    assert (folder / "contact-sheet.png").stat().st_size > 5_000

    ledger = json.loads((folder / "quickstart.json").read_text())
    assert all(
        record["finished"] and record["seconds"] > 0 and record["peak_memory_gib"] > 0.1
        for record in ledger.values()
    )

    for stage, steps in (("pretrain", 3), ("finetune", 2)):
        lines = [
            json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()
        ]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert (folder / stage / "loss.png").is_file()


def test_a_second_tour_does_nothing_again(tour: tuple[Path, str]) -> None:
    folder, _ = tour
    before = (folder / "finetune/checkpoint/model.safetensors").stat().st_mtime_ns
    said = _mipha(*_tour(folder))
    assert "$ mipha" not in said and "yes no minority" in said
    assert (folder / "finetune/checkpoint/model.safetensors").stat().st_mtime_ns == before


def test_stock_transformers_gives_the_same_answers(tour: tuple[Path, str]) -> None:
    folder, _ = tour
    # Few steps leave near ties, so both answer in float32.
    asked_again = ("-b", "easy_vqa", "--limit", "24", "--dtype", "float32", "-o", folder / "again")
    _mipha("evaluate", str(folder), *map(str, asked_again))
    rows = [
        json.loads(line)
        for line in (folder / "again/easy_vqa/predictions.jsonl").read_text().splitlines()
    ][::6]
    from mipha.evaluation.benchmarks.easy_vqa import BENCHMARK

    questions = BENCHMARK.questions()
    asked = {question.id: (str(question.image), question.text) for question in questions}
    asked_rows = json.dumps([asked[row["question_id"]] for row in rows])

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", STOCK, str(folder / "finetune/checkpoint"), asked_rows]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        cwd=folder,
        check=False,
    )

    answers = [
        line.removeprefix("ANSWER").strip()
        for line in done.stdout.splitlines()
        if line.startswith("ANSWER")
    ]
    assert answers == [row["text"] for row in rows], done.stderr[-2000:]


def test_chat_answers(tour: tuple[Path, str]) -> None:
    folder, _ = tour
    from mipha.data.datasets.easy_vqa import image_path

    said = _mipha(
        "chat",
        str(folder),
        "--image",
        str(image_path(None, "test", 0)),
        stdin="what color is the shape?\n/quit\n",
    )
    assert len(said.split("> ", 1)[1].strip()) > 3


def _tour(folder: Path) -> tuple[str, ...]:
    return ("quickstart", "-o", str(folder), "--limit", "24", "--baselines", *SMALL)


def _interrupt_when(file: Path, *command: str) -> None:
    """Run a command, and send its processes Ctrl-C when a file appears."""
    child = subprocess.Popen(
        [sys.executable, "-m", "mipha", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not file.exists() and child.poll() is None:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate()
    assert child.returncode == 130, said[-3000:]
    assert "run the same command again to go on" in said


def _mipha(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mipha", *command],
        capture_output=True,
        text=True,
        input=stdin,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
