"""`mipha tune`: what it derives, what it refuses, and what it says of before and after."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mipha import own_data
from mipha.cli import app
from mipha.evaluation.general import general_questions
from mipha.own_data import compare_answers, derive, fit_memory, normalised, prepare, this_machine
from mipha.planning.plan import Device
from mipha.run import Run


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40 questions about pictures of their own."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number in range(40):
        colour = ("red", "green", "blue")[number % 3]
        image = Image.new("RGB", (80 + number, 60), colour)
        image.save(folder / f"{number}.png")
        row = {"image": f"{number}.png", "question": "Which colour?", "answer": colour}
        lines.append(json.dumps(row))
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return folder / "mine.jsonl"


def run_cli(*words: object) -> Any:
    return CliRunner().invoke(app, ["tune", *map(str, words)])


def test_one_command_checks_plans_trains_and_compares(
    stock_llava: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = stock_llava(), tmp_path / "run"
    words = (base, rows, "-o", out, "stages.tune.held_out=0.3", "stages.tune.max_steps=2")

    # Killed between training and the last questions, the same command goes on.
    def killed(run: Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(own_data, "compare_answers", killed)
        assert run_cli(*words).exit_code != 0
    made = [out / name for name in ("answers-before.json", "tune/checkpoint/model.safetensors")]
    times = [path.stat().st_mtime_ns for path in made]
    done = run_cli(*words)
    assert done.exit_code == 0, done.output
    assert [path.stat().st_mtime_ns for path in made] == times

    # It says what it derived, and what became of the images.
    said = " ".join(done.output.split())
    assert "data: 40 samples, 40 different images, no errors" in said
    assert "scaled and cropped to 28 x 28, 4 tokens each; WARNING: details below" in said
    assert "of this machine's" in said and "before and after" in said

    # Both sets were asked, twice.
    found = json.loads((out / "tuned.json").read_text())
    assert found["general"]["questions"] == len(general_questions())
    assert 0 < found["held_out"]["questions"] < 40
    for when in ("before", "after"):
        low, high = found["held_out"][when]["interval"]
        assert low <= found["held_out"][when]["accuracy"] <= high
    card = (out / "tune" / "checkpoint" / "README.md").read_text()
    assert "tuned further" in card and str(tmp_path) not in card


def test_replay_mixes_a_quarter_of_old_samples_in(
    stock_llava: Callable[..., Path], rows: Path, tiny_data: Path
) -> None:
    prepared = prepare(str(stock_llava()), str(rows), replay=str(tiny_data))
    own, old = prepared.recipe.stages["tune"].data
    assert own.root == rows and old.root == tiny_data and old.cap == 10
    assert any("replay: 10 samples" in note for note in prepared.notes)


def test_full_trains_the_language_model_whole(stock_llava: Callable[..., Path], rows: Path) -> None:
    base = str(stock_llava())
    full, adapters = (prepare(base, str(rows), full=full).recipe for full in (True, False))
    assert full.stages["tune"].tuning.language_model == "full"
    assert adapters.stages["tune"].tuning.language_model == "lora"
    assert full.stages["tune"].tuning.vision_tower == "frozen"


def checked(rows: int, per_image: int = 1, longest: float = 100) -> Any:
    class Found:
        num_samples = num_images = rows
        num_pictures = rows // per_image

        class _Length:
            name, maximum = "sample length", longest

        histograms = (_Length,)

    return Found


@pytest.mark.parametrize(
    ("rows", "epochs", "batch_size", "held_out"),
    [(20, 3, 8, 0), (199, 3, 8, 0), (200, 3, 8, 0.1), (3_000, 2, 16, 0.1), (60_000, 1, 64, 0.02)],
)
def test_settings_follow_from_the_number_of_rows(
    rows: int, epochs: int, batch_size: int, held_out: float
) -> None:
    values, notes = derive(checked(rows), 3_000_000_000, 2048, full=False)
    assert (values["epochs"], values["batch_size"], values["held_out"]) == (
        epochs,
        batch_size,
        held_out,
    )
    assert values["learning_rate"] == 2e-4 and values["part_learning_rates"] == {"projector": 2e-5}
    assert any("held out: nothing" in note for note in notes) == (not held_out)


def test_rows_hold_the_longest_sample_and_the_context_bounds_them() -> None:
    assert derive(checked(50, longest=700), 10**9, 4096, False)[0]["row_tokens"] == 704
    assert derive(checked(50, longest=9_000), 10**9, 4096, False)[0]["row_tokens"] == 4096
    assert derive(checked(50, longest=30), 10**9, 4096, False)[0]["row_tokens"] == 256
    assert derive(checked(50, per_image=2), 10**9, 4096, False)[0]["batching"] == "shared-image"


def test_a_plan_saves_memory_by_itself_or_says_what_would(
    stock_llava: Callable[..., Path], rows: Path
) -> None:
    recipe = prepare(str(stock_llava()), str(rows)).recipe
    fitted, notes = fit_memory(recipe, this_machine("float32"))
    assert fitted == recipe and any(note.startswith("plan: ") for note in notes)
    small = Device("small", "cpu", None, 1e6, False)
    with pytest.raises(ValueError, match=r"training takes .* GB, and this machine has 0.0 GB: add"):
        fit_memory(recipe, small)


def test_bad_input_is_one_sentence_before_anything_loads(
    stock_llava: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"image": "gone.png", "question": "What?", "answer": "x"}\n')
    base = stock_llava()
    for words, sentence in (
        (("nowhere", rows), "no checkpoint nowhere: give a run"),
        ((base, tmp_path / "gone.jsonl"), "gone.jsonl"),
        ((base, broken), "has 1 error, the first in"),
        ((base, rows, "model.image_size=56"), "which the checkpoint decides"),
        ((base, rows, "stages.tune.typo=1"), "unknown key"),
    ):
        done = CliRunner().invoke(app, ["tune", *map(str, words), "-o", str(tmp_path / "run")])
        assert done.exit_code == 2, done.output
        assert sentence in done.output + (done.stderr or "")
    assert not (tmp_path / "run").exists()


def test_answers_are_compared_without_case_and_punctuation(tmp_path: Path) -> None:
    assert normalised(" Red. ") == normalised("red") != normalised("red one")

    def rows_of(*right: bool) -> list[dict[str, Any]]:
        return [
            {"id": str(n), "question": f"Q{n}", "answer": str(one), "right": one}
            for n, one in enumerate(right)
        ]

    for when, right in (("before", (True, True, False)), ("after", (True, False, True))):
        content = {"held_out": [], "not_asked": 0, "general": rows_of(*right)}
        (tmp_path / f"answers-{when}.json").write_text(json.dumps(content))
    found = compare_answers(Run(tmp_path))
    assert "held_out" not in found
    general = found["general"]
    assert (general["difference"], general["gained"], general["same_answer"]) == (0, 1, 1)
    assert [one["question"] for one in general["lost"]] == ["Q1"]


def test_the_general_questions_have_right_and_wrong_answers() -> None:
    questions = {question.id: question for question in general_questions()}
    assert len(questions) == len(general_questions()) == 28
    assert all(question.is_right(question.accepted[0]) for question in questions.values())
    assert not any(question.is_right("I do not know") for question in questions.values())
    place = questions["place-left"]
    assert place.is_right("On the left.") and not place.is_right("left or right")
    drawn = [question.image for question in questions.values() if question.image]
    assert len({image.tobytes() for image in drawn}) == 5 + 4 + 2
