from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mipha.evaluation import predict as module
from mipha.evaluation.benchmark import Benchmark, Judgement, Metric, Plan, Question, Split
from mipha.evaluation.predict import fingerprint, merge, predict, prompts_hash, read_predictions
from mipha.files import append_line


@dataclass
class Said:
    text: str
    num_tokens: int = 1
    finished: bool = True


class FakeAssistant:
    """An assistant without weights, for the promises about what happens around a model.

    Answers `<image>: <question>` in batches, last question first; cannot read an image whose name
    says broken.

    Args:
        stop_after: Raise KeyboardInterrupt when that many questions were answered.
        say: What to answer, from (image, question).
    """

    def __init__(
        self, stop_after: int | None = None, say: Callable[[Any, str], str] | None = None
    ) -> None:
        self.stop_after = stop_after
        self.asked: list[str] = []
        self.say = say or (lambda image, question: f"{image and image.name}: {question}")

    def answer_many(
        self,
        pairs: Sequence[tuple[Path | None, str]],
        *,
        max_new_tokens: int,
        batch_size: int,
        on_answers: Callable[[list[int], list[Said]], None],
    ) -> list[Said]:
        answers: dict[int, Said] = {}
        order = list(reversed(range(len(pairs))))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for index in batch:
                image = pairs[index][0]
                if image is not None and "broken" in image.name:
                    raise ValueError(f"image {image} cannot be read: broken")
            self.asked += [pairs[index][1] for index in batch]
            answers.update({index: Said(self.say(*pairs[index])) for index in batch})
            on_answers(batch, [answers[index] for index in batch])
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
        return [answers[index] for index in range(len(pairs))]


def make_questions(count: int, broken: tuple[int, ...] = (), per_image: int = 1) -> list[Question]:
    names = [f"{'broken' if n in broken else 'good'}-{n // per_image}.png" for n in range(count)]
    return [
        Question(f"q{n}", f"what is {n}?", Path("/images") / name) for n, name in enumerate(names)
    ]


TOY = Benchmark(
    name="toy",
    metrics=(Metric("accuracy", "%", "all questions"),),
    splits={"test": Split(10)},
    protocol="none",
    source="get it nowhere",
    max_new_tokens=8,
    read=lambda root, split: [],
    read_labels=lambda path: [],
    score=lambda questions, predictions, judge: Judgement({}, []),
    measure=lambda totals: {},
)


def ask(
    assistant: Any,
    questions: list[Question],
    folder: Path,
    limit: int | None = None,
    max_new_tokens: int = 8,
    **options: Any,
) -> None:
    plan = Plan(replace(TOY, max_new_tokens=max_new_tokens), "test", questions, limit=limit)
    defaults = {"checkpoint_sha256": "abc", "batch_size": 4, "progress": False}
    predict(assistant, plan, folder, **defaults | options)


def run(assistant: Any, questions: list[Question], folder: Path, **options: Any) -> dict[str, str]:
    ask(assistant, questions, folder, **options)
    return merge(folder, questions)


def errors(folder: Path) -> dict[str, str]:
    return {
        row["question_id"]: row["error"]
        for row in map(json.loads, (folder / "errors.jsonl").read_text().splitlines())
    }


def test_every_question_gets_its_own_answer(tmp_path: Path) -> None:
    questions = make_questions(10)
    predictions = run(FakeAssistant(), questions, tmp_path)
    assert (
        predictions
        == {f"q{n}": f"good-{n}.png: what is {n}?" for n in range(10)}
        == read_predictions(tmp_path)
    )
    written = [
        json.loads(line)["question_id"]
        for line in (tmp_path / "predictions.jsonl").read_text().splitlines()
    ]
    assert written == [question.id for question in questions], (
        "in the order of the questions, not of the answers"
    )
    row = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert set(row) == {"question_id", "text", "num_tokens", "finished"}
    assert not (tmp_path / "errors.jsonl").exists()


@pytest.mark.parametrize("torn", [False, True])
def test_a_stopped_run_goes_on_and_asks_nothing_twice(tmp_path: Path, torn: bool) -> None:
    questions = make_questions(10)
    whole = run(FakeAssistant(), questions, tmp_path / "whole")
    first, second = FakeAssistant(stop_after=4), FakeAssistant()
    with pytest.raises(KeyboardInterrupt):
        run(first, questions, tmp_path / "stopped")
    if torn:
        with (tmp_path / "stopped" / "predictions.jsonl").open("ab") as file:
            file.write(b'{"question_id": "q0", "text": "wro')
    assert run(second, questions, tmp_path / "stopped") == whole
    assert sorted(first.asked + second.asked) == sorted(question.text for question in questions)
    third = FakeAssistant()
    assert run(third, questions, tmp_path / "stopped") == whole and third.asked == []


def test_a_limited_run_is_a_beginning_of_the_full_one(tmp_path: Path) -> None:
    questions, assistant = make_questions(10), FakeAssistant()
    assert set(run(assistant, questions, tmp_path, limit=3)) == {"q0", "q1", "q2"}
    assert len(run(assistant, questions, tmp_path)) == 10 == len(assistant.asked)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"checkpoint_sha256": "other"}, "made with another model"),
        ({"max_new_tokens": 9}, r"max_new_tokens=8 \(now 9\)"),
        ({"prompts": True}, "made with other prompts"),
    ],
)
def test_predictions_of_something_else_are_refused_and_kept(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    questions = make_questions(3)
    run(FakeAssistant(), questions, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if change.pop("prompts", False):
        questions = [*questions[:2], replace(questions[2], text="what else?")]
    with pytest.raises(ValueError, match=sentence):
        run(FakeAssistant(), questions, tmp_path, **change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_predictions_without_a_header_are_refused(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text('{"question_id": "q0", "text": "yes"}\n')
    with pytest.raises(ValueError, match="nobody knows whose"):
        run(FakeAssistant(), make_questions(2), tmp_path)


def test_one_broken_image_costs_its_own_questions_only(tmp_path: Path) -> None:
    questions, assistant = make_questions(50, broken=(7, 30)), FakeAssistant()
    predictions = run(assistant, questions, tmp_path)
    assert set(predictions) == {f"q{n}" for n in range(50)} - {"q7", "q30"}
    assert (
        set(errors(tmp_path)) == {"q7", "q30"}
        and "cannot be read: broken" in errors(tmp_path)["q7"]
    )
    assert (
        "" not in predictions.values() and len(assistant.asked) == len(set(assistant.asked)) == 48
    )


def test_failed_questions_are_asked_again_and_the_errors_go_when_they_are_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = make_questions(6, broken=(2,))
    run(FakeAssistant(), questions, tmp_path)

    class Mended(FakeAssistant):
        def answer_many(self, pairs: Any, **options: Any) -> Any:
            return super().answer_many([(None, text) for _, text in pairs], **options)

    mended = Mended()
    assert len(run(mended, questions, tmp_path)) == 6 and mended.asked == ["what is 2?"]
    assert not (tmp_path / "errors.jsonl").exists()


def test_many_questions_on_one_broken_image_are_one_fault(tmp_path: Path) -> None:
    broken = tuple(range(30))
    questions = make_questions(40, broken=broken, per_image=30)
    assert len(run(FakeAssistant(), questions, tmp_path)) == 10 and len(errors(tmp_path)) == 30


def test_many_broken_images_among_good_ones_do_not_stop_it(tmp_path: Path) -> None:
    questions = make_questions(60, broken=tuple(range(0, 60, 2)))
    assert (
        len(run(FakeAssistant(), questions, tmp_path, batch_size=1)) == 30 == len(errors(tmp_path))
    )


def test_when_everything_fails_it_stops_early_with_the_reason(tmp_path: Path) -> None:
    questions = make_questions(500, broken=tuple(range(500)))
    with pytest.raises(ValueError, match=r"20 images in a row failed.*cannot be read: broken"):
        run(FakeAssistant(), questions, tmp_path)
    assert len(errors(tmp_path)) == 20


def test_questions_without_an_image_are_faults_each_by_itself(tmp_path: Path) -> None:
    questions = [Question(f"q{n}", f"what is {n}?", None) for n in range(30)]

    def fail(image: Path, question: str) -> str:
        raise ValueError("no words")

    with pytest.raises(ValueError, match=r"20 images in a row failed"):
        run(FakeAssistant(say=fail), questions, tmp_path, batch_size=1)


def test_full_memory_and_a_crash_in_one_question_are_written_down(tmp_path: Path) -> None:
    def say(image: Path, question: str) -> str:
        if question in ("what is 3?", "what is 8?"):
            raise RuntimeError("out of memory")
        return "fine"

    assert len(run(FakeAssistant(say=say), make_questions(12), tmp_path)) == 10
    assert errors(tmp_path) == dict.fromkeys(("q3", "q8"), "RuntimeError: out of memory")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_processes_share_the_images_and_one_file_remains(tmp_path: Path, num_ranks: int) -> None:
    questions = make_questions(22, broken=(4, 5), per_image=2)
    whole = run(FakeAssistant(), questions, tmp_path / "one")
    assistants = [FakeAssistant() for _ in range(num_ranks)]
    for rank, assistant in enumerate(assistants):
        ask(assistant, questions, tmp_path / "many", rank=rank, num_ranks=num_ranks)
    assert merge(tmp_path / "many", questions) == whole
    asked = [set(assistant.asked) for assistant in assistants]
    assert all(asked) and sum(map(len, asked)) == 20 == len(set.union(*asked))
    shown = [{questions[int(text.split()[-1][:-1])].image for text in texts} for texts in asked]
    assert sum(map(len, shown)) == len(set.union(*shown)), "questions about one image stay together"
    for name in ("predictions.jsonl", "errors.jsonl"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == [
        "errors.jsonl",
        "predictions.jsonl",
        "predictions.meta.json",
    ]


def test_what_several_processes_left_is_gone_on_with_by_one(tmp_path: Path) -> None:
    questions = make_questions(20, broken=(3,))
    first = FakeAssistant(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        ask(first, questions, tmp_path, batch_size=2, rank=1, num_ranks=2)
    last = FakeAssistant()
    assert len(run(last, questions, tmp_path)) == 19 and len(last.asked) == 15
    assert set(errors(tmp_path)) == {"q3"}


def test_a_full_disk_is_not_a_questions_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(path: Path, row: dict[str, Any]) -> None:
        if path.name == "predictions.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        append_line(path, row)

    with monkeypatch.context() as patch:
        patch.setattr(module, "append_line", no_space)
        with pytest.raises(OSError, match="No space left"):
            run(FakeAssistant(), make_questions(3), tmp_path)
    assert not (tmp_path / "errors.jsonl").exists()


def test_ids_that_repeat_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"):
        run(FakeAssistant(), make_questions(2) * 2, tmp_path)


def test_the_bar_counts_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = make_questions(6, broken=(2,))
    run(FakeAssistant(), questions, tmp_path, progress=True)
    shown = capsys.readouterr()
    assert "6/6" in shown.err and "toy" in shown.err and shown.out == ""


def test_prompt_hash_tells_prompts_ids_order_and_images_apart_but_not_folders() -> None:
    a, b = make_questions(2)
    hashes = {
        prompts_hash(questions)
        for questions in (
            [a, b],
            [b, a],
            [a],
            [replace(a, text="x"), b],
            [replace(a, id="x"), b],
            [replace(a, image=None), b],
            [replace(a, image=b"png"), b],
            [replace(a, image=b"jpg"), b],
        )
    }
    assert len(hashes) == 8
    assert prompts_hash([replace(a, image=Path("/elsewhere/good-0.png")), b]) == prompts_hash(
        [a, b]
    )


def test_the_hash_of_prompts_knows_several_images_and_their_order() -> None:
    (question,) = make_questions(1)
    a, b = Path("/images/a.png"), b"pixels"
    shown = (a, (a,), (a, b), (b, a), (Path("/moved/a.png"), b), None)
    hashes = [prompts_hash([replace(question, image=image)]) for image in shown]
    assert hashes[2] == hashes[4] and len(set(hashes)) == 5


def test_fingerprint_changes_with_what_the_model_is_and_with_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("accuracy 97 %")
    assert fingerprint(tmp_path) == first
    (tmp_path / "chat_template.jinja").write_text("USER:")
    second = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert len({first, second, fingerprint(tmp_path)}) == 3
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        fingerprint(tmp_path)
