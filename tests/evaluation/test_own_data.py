"""Own test sets: which metric fits, what each gives, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mipha.cli import app
from mipha.data.dataset import data_recipe
from mipha.evaluation.benchmark import Plan, Reply
from mipha.evaluation.own_data import (
    Rubric,
    is_near,
    normalise,
    options_of,
    plan_images,
    plan_own_data,
    read_rubric,
    word_f1,
)
from mipha.evaluation.score import score_file, score_predictions
from tests.evaluation.judge_server import serving

PEOPLE = ["red"] * 7 + ["dark red", "grey", "grey"]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(answer, ..., name=, **more)`: a file of questions with these right answers."""

    def file(*answers: Any, name: str = "test.jsonl", **more: Any) -> Path:
        for number in range(len(answers)):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number // 2}.png")
        rows = [
            {"image": f"{n // 2}.png", "question": f"What is {n}?", "answers": right} | more
            if isinstance(right, list)
            else {"image": f"{n // 2}.png", "question": f"What is {n}?", "answer": right} | more
            for n, right in enumerate(answers)
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return file


def plan(path: Path, *more: Any, **options: Any) -> Plan:
    return plan_own_data(data_recipe(str(path)), *more, **options)


def scores(path: Path, *said: str, **options: Any) -> list[float]:
    asked = plan(path, **options)
    questions = asked.questions
    texts = dict(zip([one.id for one in questions], said, strict=True))
    judgement = asked.benchmark.score(questions, texts, None)
    return [judgement.per_question[one.id] for one in questions]


@pytest.mark.parametrize(
    ("answers", "metric", "reason"),
    [
        (["red", "a dark blue car"], "exact", "no answer has more than 5 words"),
        (["3", "12"], "exact", "the answers are counts"),
        (["-3", "12"], "number", "the answers are numbers"),
        (["3.5", "12"], "number", "the answers are numbers"),
        (["1,200", "12 %"], "number", "the answers are numbers"),
        (["red", "a dark blue car on a road"], "f1", "some answers have more than 5 words"),
        ([PEOPLE, PEOPLE], "vqa", "every question has 4 answers or more"),
        ([["red", "crimson"], "blue"], "exact", "no answer has more than 5 words"),
    ],
)
def test_the_metric_is_derived_and_said(
    answers: list[Any], metric: str, reason: str, write: Callable[..., Path]
) -> None:
    asked = plan(write(*answers))
    assert asked.benchmark.headline.name == metric and asked.name == "test"
    assert f"scored by {metric}, because {reason}; --metric chooses another" in asked.doubts
    chosen = plan(write(*answers), "anls")
    assert chosen.benchmark.headline.name == "anls"
    assert not any("because" in note for note in chosen.doubts)


def test_longer_answers_that_say_the_right_one_are_counted(write: Callable[..., Path]) -> None:
    asked = plan(write("red", ["no", "none"], "cat"))
    said = {"test/1": "It is red, I think.", "test/2": "Nobody knows.", "test/3": "Cat."}
    judgement = asked.benchmark.score(asked.questions, said, None)
    assert list(judgement.per_question.values()) == [0, 0, 1]
    assert any("1 answers say a right one among other words" in note for note in judgement.notes)


def test_options_are_scored_by_their_letter(write: Callable[..., Path]) -> None:
    path = write("cat", "A", options=["dog", "cat", "cow"])
    assert plan(path).benchmark.headline.name == "choice"
    assert scores(path, "B", "A") == [1, 1]
    assert scores(path, "The answer is B.", "(A)") == [1, 1]
    assert scores(path, "a cat", "a dog or a cat") == [1, 0]
    assert scores(write("b", "(a)", options=["dog", "cat"]), "The answer is B", "A. dog") == [1, 1]
    assert scores(write("a", "b", options=["b", "a"]), "B", "A") == [1, 1]
    numbers = write("C", "A", options=["1", "2", "12"])
    assert scores(numbers, "12", "1") == scores(numbers, "12.", "(a)") == [1, 1]
    assert scores(numbers, "1 or 2", "b") == [0, 0]
    path = write("cat", "A", options=["dog", "cat", "cow"])
    asked = plan(path)
    judgement = asked.benchmark.score(asked.questions, {"test/1": "hm", "test/2": "A"}, None)
    assert "1 answers name none of their options, and count as wrong" in judgement.notes
    assert judgement.parsed == {"test/1": None, "test/2": "A"}


def test_a_missing_answer_is_named_with_the_key_that_may_hold_it(
    write: Callable[..., Path],
) -> None:
    with pytest.raises(ValueError, match=r"1 of 2 questions have no right answer, .* line 1: add"):
        plan(write(float("nan"), "red"))
    unread = r'2 of 2 questions .*\(2 of 2 records: nothing reads the key "truth"\): add'
    with pytest.raises(ValueError, match=unread):
        plan(write(None, None, truth="red"))


def test_ids_that_are_not_used_are_named(write: Callable[..., Path], tmp_path: Path) -> None:
    asked = plan(write("red", "blue", id="x"))
    assert any("several records have the id x" in note for note in asked.doubts)
    (tmp_path / "p.jsonl").write_text('{"question_id": "x", "text": "red"}\n')
    with pytest.raises(ValueError, match=r"no question has the id x .*; its ids are places, such"):
        score_file(asked.benchmark, tmp_path, tmp_path / "p.jsonl")


def test_options_may_stand_in_the_question() -> None:
    assert options_of("Which?\nA. a cat\nB) a dog\n(C) none") == {
        "A": "a cat",
        "B": "a dog",
        "C": "none",
    }
    assert options_of("A. The first\nC. The third") == options_of("Is it A. Smith?") == {}


@pytest.mark.parametrize(
    ("metric", "right", "worth"),
    [
        ("exact", "Red car", {"red  car.": 1, '"Red car"': 1, "a red car": 0, "": 0}),
        ("exact", "Café", {"cafe\u0301": 1, "cafe": 0}),
        ("exact", "1200", {"1,200": 1, "1200.": 1, "1,20": 0}),
        ("exact", ["red", "crimson"], {"Crimson!": 1, "blue": 0}),
        ("number", "1200", {"1,250": 1, "$1,200": 1, "about 1190 people": 1, "1300": 0, "": 0}),
        ("number", "-3.2", {"−3.2 °C": 1, "-3.2": 1, "3.2": 0}),
        ("number", "3.2", {"−3.2": 0}),
        ("number", "12%", {"12.3 %": 0, "12.3%": 1, "0.12": 1}),
        ("number", "unknown", {"Unknown": 1, "3": 0}),
        ("vqa", PEOPLE, {"red": 1, "the dark red": 0.3, "Grey.": 0.6, "blue": 0}),
        ("anls", "gresham mill", {"Gresham Mills": pytest.approx(12 / 13), "no": 0}),
        ("f1", "a red car", {"The red car": 1, "red": pytest.approx(2 / 3), "blue": 0, "": 0}),
    ],
)
def test_every_metric_goes_from_0_to_1(
    metric: str, right: Any, worth: dict[str, Any], write: Callable[..., Path]
) -> None:
    for said, expected in worth.items():
        assert scores(write(right), said, metric=metric) == [expected], said


def test_normalised_texts_are_not_confused() -> None:
    assert normalise("-3") == normalise("3") == "3"  # a mark around it; `number` knows the sign
    assert normalise("50%") != normalise("50") and not is_near("-3", "3")
    assert normalise(" ") == "" and word_f1("", "") == 1


def test_what_a_metric_cannot_score_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"--metric vqa needs 4 answers or more, which 1 of 2 .*2"):
        plan(write(PEOPLE, "red"), "vqa")
    with pytest.raises(
        ValueError, match=r"--metric choice needs options, .* 1 of 1 questions lack"
    ):
        plan(write("red"), "choice")
    with pytest.raises(ValueError, match="no metric 'exakt': did you mean exact"):
        plan(write("red"), "exakt")
    with pytest.raises(ValueError, match="--metric judge and --rubric FILE belong together"):
        plan(write("red"), "judge")
    with pytest.raises(ValueError, match=r"1 of 2 questions have no right answer, .*line 2"):
        plan(write("red", None))
    assert len(plan(write("red", None), with_answers=False).questions) == 2
    with pytest.raises(ValueError, match="--max-new-tokens is 0"):
        plan(write("red"), max_new_tokens=0)


def test_a_name_of_a_benchmark_is_not_taken(write: Callable[..., Path]) -> None:
    assert plan(write("red", name="pope.jsonl")).key == "own-pope"


def test_images_of_a_folder_get_one_question(write: Callable[..., Path]) -> None:
    asked = plan_images(write("red", "red", "red").parent, "What is it?").questions
    assert [(one.id, one.asked) for one in asked] == [
        ("0.png", "What is it?"),
        ("1.png", "What is it?"),
    ]
    with pytest.raises(FileNotFoundError, match="holds no image file"):
        plan_images(Path("/nowhere"), "What?")


# ---- Boxes ---------------------------------------------------------------------------------------


@pytest.fixture
def boxes(tmp_path: Path) -> Callable[..., Path]:
    """`boxes((question, answer, box, ...), ...)`: a file of questions about an 80 x 40 image."""

    def file(*rows: tuple[Any, ...]) -> Path:
        Image.new("RGB", (80, 40)).save(tmp_path / "a.png")
        path = tmp_path / "boxes.jsonl"
        with path.open("w") as stream:
            for question, answer, *found in rows:
                turns = [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
                row = {"messages": turns, "images": ["a.png"], "objects": {"bbox": found}}
                stream.write(json.dumps(row) + "\n")
        return path

    return file


WHERE = ("Where is it?", "At <bbox>.", [20, 10, 60, 40])
WHAT = ("What is at <bbox>?", "<bbox>", [0, 0, 8, 4], [0, 0, 40, 20])


def test_answers_that_are_boxes_are_scored_by_their_overlap(boxes: Callable[..., Path]) -> None:
    asked = plan(boxes(WHERE, WHAT))
    assert "scored by box, because every right answer is one box; --metric chooses another" in (
        asked.doubts
    )
    assert [metric.name for metric in asked.benchmark.metrics] == ["accuracy", "mean_iou"]
    assert [one.text for one in asked.questions] == ["Where is it?", "What is at [0, 0, 100, 100]?"]
    assert asked.questions[0].facts["answers"] == ("At [250, 250, 750, 1000].",)

    names = [one.id for one in asked.questions]
    said = dict(zip(names, ["[250, 250, 750, 625]", "no"], strict=True))
    judgement = asked.benchmark.score(asked.questions, said, None)
    assert list(judgement.per_question.values()) == [1, 0]  # an IoU of exactly 0.5
    assert "1 of 2 answers hold no box in the form thousand, and count as wrong" in judgement.notes


def test_boxes_are_asked_and_read_in_the_form_of_the_model(boxes: Callable[..., Path]) -> None:
    path = boxes(WHERE, WHAT)
    asked = plan(path, form="loc")
    assert asked.questions[1].text == "What is at <loc0000><loc0000><loc0102><loc0102>?"
    assert "boxes as loc" in asked.benchmark.protocol
    texts = [one.facts["answers"][0] for one in asked.questions]
    assert scores(path, *texts, form="loc") == [1, 1]
    assert scores(path, *texts) == [0, 0]


def test_models_with_two_forms_are_compared_pair_by_pair(
    boxes: Callable[..., Path], tmp_path: Path
) -> None:
    from mipha.evaluation.paired import compare_paired

    path = boxes(WHERE, WHAT)
    for form in ("thousand", "unit3"):
        asked = plan(path, form=form)
        right = {one.id: one.facts["answers"][0] for one in asked.questions}
        if form == "unit3":
            right[asked.questions[0].id] = "no"
        folder = tmp_path / form / "evaluation" / "boxes"
        folder.mkdir(parents=True)
        header = {"prompts_sha256": "", "checkpoint_sha256": "", "max_new_tokens": 8}
        (folder / "predictions.meta.json").write_text(json.dumps(header))
        score_predictions(asked, right, folder)
    rows = compare_paired(tmp_path / "thousand", tmp_path / "unit3", 100)
    assert [(row.metric, row.paired.difference) for row in rows] == [
        ("accuracy", 50),
        ("mean_iou", 50),
    ]


def test_several_boxes_are_matched(boxes: Callable[..., Path]) -> None:
    several = ("Detect.", "<bbox>, <bbox>", [0, 0, 40, 20], [40, 20, 80, 40])
    none = ("Detect.", "There are none.")
    path = boxes(several, none)
    asked = plan(path)
    assert asked.benchmark.headline.name == "boxes"
    assert scores(path, "[500, 500, 1000, 1000], [0, 0, 500, 500]", "There are none.") == [1, 1]
    assert scores(path, "[0, 0, 500, 500]", "[0, 0, 1, 1]") == [pytest.approx(2 / 3), 0]
    silent = dict.fromkeys([one.id for one in asked.questions], "There are none.")
    judgement = asked.benchmark.score(asked.questions, silent, None)
    assert "1 answers hold no box in the form thousand, where some are" in judgement.notes


def test_what_no_metric_of_boxes_fits_is_refused(boxes: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"1 of 2 right answers are texts, .* and the others boxe"):
        plan(boxes(WHERE, ("What?", "A cat.")))
    with pytest.raises(ValueError, match=r"1 of 1 right answers are points"):
        plan(boxes(("Point.", "<bbox>", [10, 10])))
    with pytest.raises(
        ValueError, match=r"--metric box needs a right answer with one box, which 1"
    ):
        plan(boxes(WHERE, ("What?", "A cat.")), "box")
    with pytest.raises(ValueError, match=r"--metric boxes needs a right answer with boxes"):
        plan(boxes(("Point.", "<bbox>", [10, 10])), "boxes")
    assert scores(boxes(("Point.", "<bbox>", [40, 20])), "[500, 500]", metric="exact") == [1]


def test_the_worst_boxes_are_drawn(boxes: Callable[..., Path], tmp_path: Path) -> None:
    import base64
    import io
    import re

    asked = plan(boxes(WHERE))
    said = {one.id: "[0, 0, 500, 500]" for one in asked.questions}
    header = {"prompts_sha256": "", "checkpoint_sha256": "", "max_new_tokens": 8}
    (tmp_path / "predictions.meta.json").write_text(json.dumps(header))
    score_predictions(asked, said, tmp_path)
    page = (tmp_path / "worst-cases.html").read_text()
    assert "read as" in page and "0.000, 0.000, 0.500, 0.500" in page and "IoU 0.11" in page

    content = base64.b64decode(re.search(r"data:image/jpeg;base64,([^\"]+)", page)[1])
    image = Image.open(io.BytesIO(content))
    assert image.size == (80, 40)
    red, green, _ = image.getpixel((20, 30))  # left edge of the right box
    assert green > red + 20
    red, green, _ = image.getpixel((10, 0))  # upper edge of what was said
    assert red > green + 20


def test_columns_of_boxes_are_a_test_set_too(tmp_path: Path) -> None:
    Image.new("RGB", (80, 40)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "", "answer": ["the cat", "it"], "bbox": [20, 10, 40, 30]}
    (tmp_path / "refs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="say bbox_format=xyxy or bbox_format=xywh"):
        plan(tmp_path / "refs.jsonl")
    data = data_recipe(str(tmp_path / "refs.jsonl"), settings=["bbox_format=xywh"])
    asked = plan_own_data(data).questions
    assert asked[0].asked == "the cat"
    assert [one.facts["answers"] for one in asked] == [("[250, 250, 750, 1000]",)] * 2


# ---- A judge with a rubric -----------------------------------------------------------------------


@pytest.fixture
def rubric(tmp_path: Path) -> Path:
    path = tmp_path / "rubric.txt"
    path.write_text("scale: 1 to 5\n{question} Right: {gold}. Said: {answer}. {json}\n")
    return path


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("Score: 5", 1.0),
        ("Good.\n**Score:** 3", 0.5),
        ("Score: 2, no, it is\nScore: 4", 0.75),
        ("4", 0.75),
        ("<think>Score: 1</think>Score: 5", 1.0),
        ("Score: 6", None),
        ("It is a 4 of 5", None),
        ("4/5", 0.75),
        ("Score: **4**/5", 0.75),
        ("**Score:** **4** (out of 5)", 0.75),
        ("Score: 4 (80%)", 0.75),
        ("Score: 4, since", 0.75),
        ("4/10", None),
        ("Score: 4/10", None),
        ("Score: 4 out of 10", None),
        ("Score: 4%", None),
        ("Score: 3,5", None),
        ("Score: 3-4", None),
        ("Score: 3 or 4", None),
        ("", None),
    ],
)
def test_a_grade_is_read_on_the_scale(reply: str, grade: float | None) -> None:
    assert Rubric("{answer}", 1, 5).read(Reply(reply)) == grade
    if reply == "Score: 5":
        assert Rubric("{answer}", 1, 5).read(Reply(reply, is_cut=True)) is None


def test_a_rubric_that_cannot_work_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("How good is it?")
    with pytest.raises(ValueError, match=r"has no .answer."):
        read_rubric(tmp_path / "r.txt")
    (tmp_path / "r.txt").write_text("scale: 5 to 1\n{answer}")
    with pytest.raises(ValueError, match=r"the scale goes from 5 to 1"):
        read_rubric(tmp_path / "r.txt")
    with pytest.raises(FileNotFoundError, match="no rubric"):
        read_rubric(tmp_path / "gone.txt")


def test_answers_are_graded_by_the_rubric_and_it_is_recorded(
    write: Callable[..., Path], rubric: Path, tmp_path: Path
) -> None:
    path, predictions = write("red", "blue", "green"), tmp_path / "predictions.jsonl"
    said = {"test/1": "red", "test/2": "{gold}", "test/3": "hm"}
    predictions.write_text(
        "".join(json.dumps({"question_id": k, "text": v}) + "\n" for k, v in said.items())
    )
    typed = ["score", str(path), "--predictions", str(predictions), "--rubric", str(rubric)]
    with serving() as server:
        server.script = ["Score: 5", "Score: 2", "hm", "hm", "hm"]
        out = tmp_path / "scores.json"
        judge = ["--judge", server.url, "--judge-model", "j", "--json", str(out)]
        done = CliRunner().invoke(app, [*typed, *judge])
    assert done.exit_code == 1, done.output  # one answer has no grade
    prompts = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert prompts[0] == (
        "What is 0? Right: red. Said: red. {json}\n\nEnd your reply with one line `Score: N`, "
        "where N is a number from 1 to 5."
    )
    assert "Said: {gold}." in prompts[1]

    content = json.loads(out.read_text())
    assert (content["metric"], content["headline"]) == ("judge", pytest.approx(62.5))
    assert list(content["failed"]) == ["test/3"]
    assert "scale 1 to 5" in content["protocol"] and "Said: {answer}" in content["protocol"]
    no_judge = CliRunner().invoke(app, typed)
    assert no_judge.exit_code == 2 and "give one with --judge URL" in no_judge.output


# ---- Results -------------------------------------------------------------------------------------


def result(path: Path, folder: Path, said: str, **options: Any) -> None:
    asked = plan(path, **options)
    folder = folder / asked.key
    folder.mkdir(parents=True)
    meta = {"prompts_sha256": "p", "checkpoint_sha256": "c", "max_new_tokens": 8}
    (folder / "predictions.meta.json").write_text(json.dumps(meta))
    score_predictions(asked, {one.id: said for one in asked.questions}, folder)


def test_two_results_on_one_test_set_are_compared_by_image(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("red", "red", "red", "blue")
    result(path, tmp_path / "a", "red")
    result(path, tmp_path / "b", "blue")
    out = tmp_path / "paired.json"
    typed = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--paired", "--json", str(out)]
    assert CliRunner().invoke(app, typed).exit_code == 0
    (row,) = json.loads(out.read_text())
    assert (row["benchmark"], row["metric"], row["unit"]) == ("test", "exact", "%")
    assert row["paired"]["difference"] == 50 and row["paired"]["num_clusters"] == 2

    # Another metric, and other questions under the same ids, are no pair.
    result(path, tmp_path / "c", "red", metric="anls")
    typed[2] = str(tmp_path / "c")
    assert "is scored by exact and" in CliRunner().invoke(app, typed).output
    result(write("red", "red", "red", "green"), tmp_path / "d", "red")
    typed[2] = str(tmp_path / "d")
    assert "did not answer the same questions" in CliRunner().invoke(app, typed).output


def test_the_page_shows_the_worst_answers_and_runs_nothing_of_the_data(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    result(write("red", "<b>bold</b>", "blue", "grey"), tmp_path / "out", "<script>x</script>")
    page = (tmp_path / "out" / "test" / "worst-cases.html").read_text(encoding="utf-8")
    assert page.count('<div class="card">') == 4 and page.count("data:image/jpeg") == 4
    assert "<script>" not in page and "&lt;script&gt;x&lt;/script&gt;" in page
    for words in ("What is 3?", "&lt;b&gt;bold&lt;/b&gt;", "test.jsonl, line 2", "exact 0.0 %"):
        assert words in page

    result(write("red", "red", "blue"), tmp_path / "other", "red")
    page = (tmp_path / "other" / "test" / "worst-cases.html").read_text(encoding="utf-8")
    assert page.count('<div class="card">') == 1 and "2 are answered without fault" in page
