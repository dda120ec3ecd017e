"""One checkpoint asked in four ways: by itself, behind our server, as GGUF, and by an engine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mipha.cli import app
from mipha.files import read_lines
from tests import forked
from tests.deploy.serve.conftest import serving  # noqa: F401  (a fixture)


def mipha(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(folder: Path) -> dict[str, tuple[str, int, bool]]:
    return {
        row["question_id"]: (row["text"], row["num_tokens"], row["finished"])
        for row in rows(folder / "predictions.jsonl")
    }


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mipha.models.build import save_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_checkpoint(*tiny_model("llama"), folder)
    return folder


@pytest.fixture(scope="module")
def own(tiny_data: Path) -> Path:
    """A test set with text alone, images, and a second turn."""
    return tiny_data


@pytest.fixture(scope="module")
def directly(checkpoint: Path, own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the checkpoint itself: of a benchmark, and of an own test set."""
    out = tmp_path_factory.mktemp("directly")
    done = mipha("evaluate", checkpoint, "--data", own, "--max-new-tokens", 6, "-o", out)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def assistant(checkpoint: Path) -> Any:
    """What `serving` serves."""
    from mipha.assistant import load

    return load(checkpoint, "cpu")


@pytest.fixture
def url(serving: Callable) -> Iterator[str]:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch, serving() as server:
        patch.setenv("no_proxy", "127.0.0.1")
        yield f"{server.url}/v1"


def test_behind_a_server_it_gives_the_same_answers(
    url: str, own: Path, directly: Path, tmp_path: Path
) -> None:
    """Image by image, turn by turn, sixteen at a time; and the same scores."""
    more = ("--data", own, "--max-new-tokens", 6, "-o", tmp_path)
    done = mipha("evaluate", url, "--model", "tiny", "--parallel", 16, *more)
    assert done.exit_code == 0, done.output
    assert texts(tmp_path / "train") == texts(directly / "train")
    assert len({text for text, _, _ in texts(directly / "train").values()}) > 5

    ours, theirs = (
        json.loads((folder / "train" / "scores.json").read_text())
        for folder in (directly, tmp_path)
    )
    assert ours["scores"] == theirs["scores"] and ours["prompts_sha256"] == theirs["prompts_sha256"]
    assert theirs["model"]["endpoint"] == url and theirs["model"]["model"] == "tiny"
    assert len(theirs["fingerprint"]) == 64 and ours["fingerprint"] is None

    # The folder is this model's: another name on the server is another model.
    done = mipha("evaluate", url, "--model", "other", *more)
    assert done.exit_code == 2 and "made with another model" in done.stderr


def test_a_benchmark_is_asked_over_http_as_it_is_directly(
    url: str, checkpoint: Path, official_files: Path, tmp_path: Path
) -> None:
    for model, name in (((checkpoint,), "a"), ((url, "--model", "tiny"), "b")):
        more = ("-b", "pope", "--data-root", official_files, "-o", tmp_path / name)
        done = mipha("evaluate", *model, *more)
        assert done.exit_code == 0, done.output
    assert texts(tmp_path / "a" / "pope") == texts(tmp_path / "b" / "pope")


def test_boxes_are_asked_and_scored_in_the_form_of_the_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Box of a question, box of an answer, page, and the refusal of another form."""
    folder = shutil.copytree(checkpoint, tmp_path / "boxes")
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"boxes": "unit3"}))
    Image.new("RGB", (80, 40), "red").save(tmp_path / "a.png")
    row = {"image": "a.png", "captions": ["the cat", "it"], "bbox": [20, 10, 40, 30]}
    (tmp_path / "refs.jsonl").write_text(json.dumps(row) + "\n")

    more = ("--data", tmp_path / "refs.jsonl", "--max-new-tokens", 6, "-o", tmp_path / "out")
    done = mipha("evaluate", folder, "bbox_format=xywh", *more)
    assert done.exit_code == 0, done.output
    scores = json.loads((tmp_path / "out" / "refs" / "scores.json").read_text())
    assert [score["metric"] for score in scores["scores"]] == ["accuracy", "mean_iou"]
    assert "boxes as unit3" in scores["protocol"]
    assert any("because every right answer is one box" in note for note in scores["notes"])
    page = (tmp_path / "out" / "refs" / "worst-cases.html").read_text()
    assert "[0.250, 0.250, 0.750, 1.000]" in page and "data:image/jpeg" in page

    done = mipha("evaluate", folder, "bbox_format=xywh", *more, "--boxes", "loc")
    assert done.exit_code == 2 and "was trained to write boxes as unit3" in done.stderr
    done = mipha("evaluate", folder, "bbox_format=xywh", "-b", "pope")
    assert done.exit_code == 2 and "bbox_format=xywh is for the questions of --data" in done.stderr


def test_predictions_need_no_answers_and_go_on_after_a_kill(
    checkpoint: Path, own: Path, directly: Path, tmp_path: Path
) -> None:
    """What was asked before the kill is not asked again; the file is there when all is done."""
    out = tmp_path / "predictions.jsonl"
    typed = ["predict", checkpoint, own, "-o", out, "--max-new-tokens", "6", "--batch-size", "1"]
    kept = tmp_path / ".predictions.jsonl.partial" / "train" / "predictions.jsonl"
    started = forked.start(["mipha", *typed], tmp_path / "said.txt")
    until = time.monotonic() + 300
    while not (kept.is_file() and kept.stat().st_size) and time.monotonic() < until:
        time.sleep(0.01)
    started.kill()
    started.join()
    before = list(read_lines(kept))
    if not out.exists():
        assert before
        marked = "".join(json.dumps(row | {"before": True}) + "\n" for row in before)
        kept.write_text(marked, encoding="utf-8")
        assert mipha(*typed).exit_code == 0
        assert sum("before" in row for row in rows(out)) == len(before)

    assert texts(tmp_path) == texts(directly / "train") and not kept.exists()
    row = rows(out)[2]  # the first sample has two questions
    assert row["question"].startswith("Which colour is shape 1?")
    assert [Path(image).name for image in row["images"]] == ["1.png"]
    again = mipha(*typed)
    assert again.exit_code == 2 and "exists: choose another -o" in again.stderr


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs llama.cpp")
def test_an_engine_is_compared_with_its_checkpoint(
    checkpoint: Path, own: Path, tmp_path: Path
) -> None:
    more = ("--data", own, "--max-new-tokens", 2, "--limit", 6)
    mipha("evaluate", checkpoint, *more, "-o", tmp_path / "directly")
    directly = tmp_path / "directly"
    done = mipha("evaluate", checkpoint, "--engine", "llama.cpp", *more, "-o", tmp_path)
    assert done.exit_code == 0, done.output
    engine, ours = texts(tmp_path / "train"), texts(directly / "train")
    num_same = sum(engine[name][0] == ours[name][0] for name in ours)
    said = f"llama.cpp gives the answers of transformers in float32 to {num_same} of {len(ours)}"
    assert said in done.stdout.replace("\n", " ")

    content = json.loads((tmp_path / "train" / "scores.json").read_text())
    check = content["engine_check"]
    assert (check["n"], check["n_same"]) == (len(ours), num_same)
    scored = json.loads((directly / "train" / "scores.json").read_text())["scores"][0]["value"]
    assert check["reference_score"] == pytest.approx(scored)
    assert check["score"] == pytest.approx(content["scores"][0]["value"])
    differing = rows(tmp_path / "train" / "engine-differences.jsonl")
    assert {row["question_id"] for row in differing} == {
        name for name in ours if engine[name][0] != ours[name][0]
    }

    # The exported file is a model as well, and answers as it did before.
    (exported,) = tmp_path.glob("gguf-f16-*")
    done = mipha("evaluate", exported / "model-f16.gguf", *more, "-o", tmp_path / "gguf")
    assert done.exit_code == 0, done.output
    assert texts(tmp_path / "gguf" / "train") == engine


def test_options_that_have_no_effect_are_refused(checkpoint: Path, own: Path) -> None:
    for typed, words in (
        (["http://localhost:1/v1", "--data", own], "needs --model, the name of a model"),
        ([checkpoint, "--data", own, "--model", "m"], "--model is for the URL of a server"),
        ([checkpoint, "--data", own, "--parallel", 4], "--parallel is for the URL"),
        ([checkpoint, "--data", own, "--engine", "vllm"], "needs the program vllm"),
        ([checkpoint, "--data", own, "--engine", "sglang"], "no engine 'sglang'"),
        (["http://h/v1", "--model", "m", "--engine", "vllm", "--data", own], "has no effect"),
        ([checkpoint, "-b", "pope", "--metric", "exact"], "--metric is for the questions of"),
        ([checkpoint, "--data", own, "--key-env", "NO_SUCH_KEY"], "$NO_SUCH_KEY, which is not set"),
        ([checkpoint], "no benchmark was named"),
    ):
        done = mipha("evaluate", *typed)
        assert done.exit_code == 2 and words in done.stderr, (typed, done.output)
