from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mipha.data.images import grey_image
from mipha.evaluation.evaluate import checkpoint_subject, evaluate
from mipha.recipe import load_recipe
from mipha.run import Run

pytestmark = pytest.mark.skipif(find_spec("easy_vqa") is None, reason="needs the package easy-vqa")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "finetune" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "run" / "recipe.yaml").write_text(load_recipe("quickstart").dump())
    return folder


class FakeAssistant:
    """Stands in for the weights; remembers the folder that `evaluate` chose and every request."""

    def __init__(self) -> None:
        self.loaded: Path | None = None
        self.asked: list[str] = []
        self.shown: set[Any] = set()

    def load(
        self, path: Path, device: Any = None, dtype: str = "auto", adapter: Any = None
    ) -> FakeAssistant:
        self.loaded, self.dtype = path, dtype
        return self

    def answer_many(
        self, pairs: Any, *, max_new_tokens: int, batch_size: int, on_answers: Any
    ) -> list[Any]:
        self.asked += [text for _, text in pairs]
        self.shown = {image for image, _ in pairs}
        answers = [
            SimpleNamespace(text="it is a red circle, so yes", num_tokens=8, finished=True)
            for _ in pairs
        ]
        on_answers(list(range(len(pairs))), answers)
        return answers


@pytest.fixture
def assistant(monkeypatch: pytest.MonkeyPatch) -> FakeAssistant:
    fake = FakeAssistant()
    monkeypatch.setitem(sys.modules, "mipha.assistant", SimpleNamespace(load=fake.load))  # type: ignore[arg-type]
    return fake


def test_a_run_is_asked_and_scored_once(model: Path, assistant: FakeAssistant) -> None:
    run = Run(model.parents[1])
    (result,) = evaluate(run, ["easy_vqa"], limit=40, progress=False)
    assert assistant.loaded == model and len(assistant.asked) == 40
    folder = run.evaluation("easy_vqa")
    assert {path.name for path in folder.iterdir()} == {
        "predictions.meta.json",
        "predictions.jsonl",
        "scores.json",
        "tally.json",
        "worst-cases.html",
    }
    assert (
        json.loads((folder / "scores.json").read_text())["scores"][0]["value"]
        == result.scores[0].value
    )
    (again,) = evaluate(str(run.folder), ["easy_vqa", "easy_vqa"], limit=40, progress=False)
    assert again == result and len(assistant.asked) == 40


def test_another_split_has_its_own_folder(model: Path, assistant: FakeAssistant) -> None:
    run = Run(model.parents[1])
    evaluate(run, ["easy_vqa"], limit=5, split="validation", progress=False)
    assert (
        run.evaluation("easy_vqa-validation").is_dir() and not run.evaluation("easy_vqa").exists()
    )


def test_a_blind_model_is_shown_grey_and_keeps_its_own_results(
    model: Path, assistant: FakeAssistant
) -> None:
    run = Run(model.parents[1])
    evaluate(run, ["easy_vqa"], limit=30, progress=False)
    assert len(assistant.shown) > 1
    (result,) = evaluate(run, ["easy_vqa"], limit=30, progress=False, blind=True)
    assert assistant.shown == {grey_image()} and len(assistant.asked) == 60 and result.blind
    assert (
        json.loads((run.evaluation("easy_vqa-blind") / "scores.json").read_text())["blind"] is True
    )
    assert json.loads((run.evaluation("easy_vqa") / "scores.json").read_text())["blind"] is False


def test_a_model_without_a_run_needs_a_place_for_results(
    model: Path, assistant: FakeAssistant, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="give -o"):
        evaluate(model, ["easy_vqa"], limit=5)
    evaluate(model, ["easy_vqa"], limit=5, out=tmp_path / "results", progress=False)
    assert (tmp_path / "results" / "easy_vqa" / "scores.json").is_file()


def test_a_new_checkpoint_does_not_inherit_old_answers(
    model: Path, assistant: FakeAssistant
) -> None:
    evaluate(model.parents[1], ["easy_vqa"], limit=5, progress=False)
    (model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="another model"):
        evaluate(model.parents[1], ["easy_vqa"], limit=5, progress=False)


def test_answers_in_another_type_are_not_mixed(model: Path, assistant: FakeAssistant) -> None:
    run = model.parents[1]
    evaluate(checkpoint_subject(run, dtype="bfloat16"), ["easy_vqa"], limit=5, progress=False)
    assert assistant.dtype == "bfloat16"
    scores = json.loads((Run(run).evaluation("easy_vqa") / "scores.json").read_text())
    assert scores["model"]["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="another model"):
        evaluate(run, ["easy_vqa"], limit=5, progress=False)


def test_mistakes_are_found_before_the_model_is_loaded(
    model: Path, assistant: FakeAssistant, tmp_path: Path
) -> None:
    run = model.parents[1]
    for wrong, sentence in (
        ({"benchmarks": ["easy_vqa", "pop"]}, "no benchmark 'pop'"),
        ({"benchmarks": []}, "no benchmark was named"),
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"split": "dev"}, "no split 'dev'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluate(**{"model": run, "benchmarks": ["easy_vqa"], **wrong})
    with pytest.raises(FileNotFoundError, match=r"questions\.json"):
        evaluate(run, ["easy_vqa"], data_root=tmp_path)
    with pytest.raises(FileNotFoundError, match="no run or model folder"):
        evaluate(tmp_path / "nothing", ["easy_vqa"])
    assert assistant.loaded is None
