"""`mipha tune`: what it derives, what it refuses, and what it says of before and after."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mipha import own_data
from mipha.cli import app
from mipha.data.mixture import Mixture
from mipha.evaluation.general import general_questions
from mipha.own_data import (
    MOST_TRAINED,
    compare_answers,
    derive,
    fit_memory,
    normalised,
    own_questions,
    prepare,
    this_machine,
)
from mipha.planning.plan import Device
from mipha.run import Run
from tests import forked
from tests.training.test_kill import kill_at, num_lines


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


def test_killed_anywhere_it_ends_in_the_same_answers_and_weights(
    stock_llava: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    """`kill -9` before training, between two steps, and before the last questions."""
    words = (stock_llava(), rows, "stages.tune.held_out=0.3", "stages.tune.max_steps=6")
    words += ("stages.tune.checkpoint_every=1", "-o")
    assert run_cli(*words, tmp_path / "whole").exit_code == 0
    whole, run = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    moments: list[Callable[[], bool]] = [
        (run.folder / "answers-before.json").exists,
        lambda: num_lines(run.metrics("tune")) >= 3,
        lambda: run.is_finished("tune"),
    ]
    killed = [
        kill_at(forked.start(["mipha", "tune", *words, run.folder], tmp_path / "said.txt"), moment)
        for moment in moments
    ]
    assert all(killed), (tmp_path / "said.txt").read_text()[-2000:]

    assert run_cli(*words, run.folder).exit_code == 0
    assert (whole.folder / "tuned.json").read_text() == (run.folder / "tuned.json").read_text()
    for file in ("checkpoint/model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(each.stage("tune") / file) for each in (whole, run))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), file


def test_replay_mixes_a_quarter_of_old_samples_in(
    stock_llava: Callable[..., Path], rows: Path, tiny_data: Path
) -> None:
    prepared = prepare(str(stock_llava()), str(rows), replay=str(tiny_data))
    own, old = prepared.recipe.stages["tune"].data
    assert own.root == rows and old.root == tiny_data and old.cap == 10
    assert any("replay: 10 samples" in note for note in prepared.notes)


def test_of_few_rows_some_that_are_trained_on_are_asked(
    stock_llava: Callable[..., Path], rows: Path
) -> None:
    recipe = prepare(str(stock_llava()), str(rows)).recipe
    asked, skipped = own_questions(recipe)
    assert (len(asked), skipped) == (MOST_TRAINED, 0)
    held_out = recipe.override("stages.tune.held_out=0.3")
    asked, skipped = own_questions(held_out)
    wanted = Mixture(held_out.stages["tune"].data, 0.3).on_side("validation")
    assert [one["id"] for one in asked] == [sample.id for sample in wanted] and not skipped


def test_full_trains_the_language_model_whole(stock_llava: Callable[..., Path], rows: Path) -> None:
    base = str(stock_llava())
    full, adapters = (prepare(base, str(rows), full=full).recipe for full in (True, False))
    assert full.stages["tune"].tuning.language_model == "full"
    assert adapters.stages["tune"].tuning.language_model == "lora"
    assert full.stages["tune"].tuning.vision_tower == "frozen"


def checked(rows: int, per_image: int = 1, longest: float = 100) -> Any:
    class Found:
        num_samples = num_images = rows
        num_distinct = rows // per_image

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


def test_a_fix_is_advised_where_it_can_be_made(
    stock_llava: Callable[..., Path], tmp_path: Path
) -> None:
    rows = '{"question": "a?", "answer": "b"}\n{"question": "a?", "answer": ""}\n'
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "a.csv").write_text("question,answer\na?,b\na?,\n")
    for name, fix in (("a.jsonl", "and leave those rows out with .*--fix"), ("a.csv", "fix them")):
        with pytest.raises(ValueError, match=rf"see all with `mipha check .*`, .*{fix}"):
            prepare(str(stock_llava()), str(tmp_path / name))


def unlink_shard(folder: Path) -> None:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    next(folder.glob("model-00002*")).unlink()


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def unmaskable(folder: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


@pytest.mark.parametrize(
    ("breaks", "sentence"),
    [
        (edit_config(model_type="qwen2_vl"), "holds a 'qwen2_vl', not a LLaVA"),
        (edit_config(model_type="llava_onevision"), "llava_onevision"),
        (unlink_shard, "shards"),
        (cut_weights, "model.safetensors"),
        (edit_config(image_token_index=7), "for an image, but the model wants 7"),
        (unmaskable, "chat"),
    ],
    ids=["class", "onevision", "shard", "cut", "tokens", "template"],
)
@pytest.mark.parametrize("verb", ["tune", "train", "plan"])
def test_a_start_that_cannot_be_is_one_sentence_before_a_weight_is_read(
    stock_llava: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    breaks: Callable[[Path], None],
    sentence: str,
    verb: str,
) -> None:
    breaks(folder := stock_llava())

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("mipha.models.build.load_saved_model", load)
    words = {
        "tune": ("tune", folder, rows, "-o", tmp_path / "run"),
        "train": ("train", "tune", f"model.checkpoint={folder}", f"data.tune={rows}"),
        "plan": ("plan", "tune", f"model.checkpoint={folder}", f"data.tune={rows}"),
    }[verb]
    words += ("-o", tmp_path / "run") if verb == "train" else ()
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 2, done.output
    said = " ".join(done.output.split())
    assert said.count("mipha: ") == 1 and sentence in said, said
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_is_one_sentence(
    stock_llava: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    base, other = stock_llava(), stock_llava()
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", {"format": "pt"})
    assert run_cli(base, rows, "-o", tmp_path / "run", "stages.tune.max_steps=1").exit_code == 0
    adapter, image = tmp_path / "run" / "tune" / "adapter", rows.with_name("0.png")
    told = json.loads((tmp_path / "run" / "tuned.json").read_text())
    assert told["trained_on"]["questions"] == MOST_TRAINED and "held_out" not in told
    for words in (
        ("chat", other, "--adapter", adapter, "--image", image),
        ("evaluate", other, "--adapter", adapter, "-b", "easy_vqa", "-o", tmp_path / "out"),
        ("export", adapter, "--merge", "--base", other, "-o", tmp_path / "merged"),
    ):
        done = CliRunner().invoke(app, [str(word) for word in words], input="\n")
        assert done.exit_code == 2, done.output
        assert f"was trained on another base than {other}" in " ".join(done.output.split())


def test_a_plan_that_does_not_fit_is_one_sentence(
    stock_llava: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Device("small", "cpu", None, 1e6, False)
    monkeypatch.setattr(own_data, "this_machine", lambda precision: small)
    done = run_cli(stock_llava(), rows, "-o", tmp_path / "run")
    assert done.exit_code == 2 and not (tmp_path / "run").exists()
    assert "and this machine has 0.0 GB" in " ".join(done.output.split())


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
