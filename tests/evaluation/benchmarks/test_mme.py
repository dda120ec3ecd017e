"""MME: the first four characters, pairs of questions, subtasks that are there, both layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mipha.comparison.statistics import intervals, tally, values
from mipha.evaluation.benchmark import Judgement
from mipha.evaluation.benchmarks import mme
from tests.evaluation.official import BrokenLabel, Official, write_file, write_images

ASK = "Please answer yes or no."
SHORT = "\nAnswer the question using a single word or phrase."

# Subtask to its lines; some official questions have two spaces before the request.
FILES = {
    "existence": f"1.jpg\tIs there a cat?  {ASK}\tYes\n1.jpg\tIs there a dog? {ASK}\tNo\n"
    f"2.jpg\tA car? {ASK}\tYes\n2.jpg\tA bus? {ASK}\tNo\n",
    "color": f"1.jpg\tIs it red? {ASK}\tYes\n1.jpg\tIs it blue? {ASK}\tNo\n",
    "OCR": f"0001.jpg\tIs it 'a'? {ASK}\tYes\n0001.jpg\tIs it 'b'? {ASK}\tNo\n",
    "code_reasoning": f"0001.png\tIs it 7? {ASK}\tYes\n0001.png\tIs it 8? {ASK}\tNo\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for subtask, lines in FILES.items():
        (tmp_path / f"{subtask}.txt").write_text(lines)
    for image in (
        "existence/1.jpg",
        "existence/2.jpg",
        "color/1.jpg",
        "OCR/images/0001.jpg",
        "code_reasoning/0001.png",
    ):
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / image).touch()
    (tmp_path / "readme.txt").write_text("other files do not matter")
    return tmp_path


def judge(folder: Path, **texts: str) -> Judgement:
    """Right answers everywhere but where told otherwise: `existence_0` is `existence/0`."""
    asked = mme.read_labels(folder)
    changed = {
        f"{subtask}/{number}": text
        for subtask, _, number, text in (
            (*name.rpartition("_"), text) for name, text in texts.items()
        )
    }
    assert changed.keys() <= {question.id for question in asked}
    return mme.score(
        asked, {question.id: question.facts["answer"].capitalize() for question in asked} | changed
    )


def numbers(judgement: Judgement) -> dict[str, float]:
    return values(tally(judgement.contributions), mme.measure)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("YES.", "yes"),
        ("no", "no"),
        ("No, it is", "no"),
        ("Eyes", "yes"),
        ("Not sure", "no"),
        ("Snow", "no"),
        ("Canoe", "no"),
        ("Piano", "other"),
        ("noye", "no"),
        (" yes", "yes"),
        (" no", "no"),
        ("  no", "no"),
        ("  Yes", "other"),
        ("**Yes**", "other"),
        ("The answer is yes", "other"),
        ("I know", "other"),
        ("", "other"),
        ("y", "other"),
        ("No\nYes", "no"),
        ("\nYes", "other"),
        ("\rYes", "other"),
        ("Y\nes", "other"),
        ("Yes\tit is", "other"),
        ("\tYes", "other"),
        ("Yes\nit\tis", "yes"),
    ],
)
def test_which_answer_is_read(text: str, answer: str) -> None:
    assert mme.read_answer(text) == answer


def test_numbers_by_hand(folder: Path) -> None:
    judgement = judge(
        folder, existence_0="Piano", color_1="Yes", code_reasoning_0="no", code_reasoning_1="yes"
    )
    assert judgement.per_question["existence/0"] == 0 == judgement.per_question["color/1"]
    assert sum(judgement.per_question.values()) == 3 + 1 + 2 + 0
    assert judgement.parsed is not None and judgement.parsed["existence/0"] == "other"
    expected = {
        "perception": (75 + 50) + (50 + 0) + 200,
        "cognition": 0,
        "existence.score": 125,
        "existence.acc": 75,
        "existence.acc_plus": 50,
        "color.score": 50,
        "color.acc": 50,
        "color.acc_plus": 0,
        "OCR.score": 200,
        "OCR.acc": 100,
        "OCR.acc_plus": 100,
        "code_reasoning.score": 0,
        "code_reasoning.acc": 0,
        "code_reasoning.acc_plus": 0,
    }
    found = numbers(judgement)
    assert found == pytest.approx(expected) and list(found) == list(expected)


def test_sums_are_over_the_subtasks_that_are_there_and_say_so(folder: Path) -> None:
    perception, cognition = judge(folder).notes
    assert perception.startswith(
        "perception is the sum of 3 of 10 subtasks, without count, position, posters, celebrity, "
        "scene,"
    )
    assert cognition.startswith(
        "cognition is the sum of 1 of 4 subtasks, without commonsense_reasoning,"
    )
    (folder / "code_reasoning.txt").unlink()
    found = numbers(judge(folder))
    assert (
        found["perception"] == 600
        and str(found["cognition"]) == "nan"
        and "code_reasoning.score" not in found
    )
    assert intervals(tally(judge(folder).contributions), mme.measure, num_resamples=50)[
        "perception"
    ] == (600, 600)


def test_all_subtasks_right_are_2000_and_800_points_without_a_note(tmp_path: Path) -> None:
    for subtask in mme.SUBTASKS:
        (tmp_path / f"{subtask}.txt").write_text(FILES["OCR"])
    judgement = judge(tmp_path)
    assert (numbers(judgement)["perception"], numbers(judgement)["cognition"], judgement.notes) == (
        2000,
        800,
        (),
    )


def test_a_tab_spoils_its_own_answer_only_and_is_told(folder: Path) -> None:
    """Officially its line is lost, and the later ones pair up wrongly."""
    judgement = judge(folder, existence_1="No\tno")
    found = numbers(judgement)
    assert (found["existence.acc"], found["existence.acc_plus"]) == (75, 50)
    assert judgement.notes[-1].startswith("1 answers hold a tab and are wrong")


def test_half_a_pair_counts_for_acc_alone_and_is_told(folder: Path) -> None:
    asked = [question for question in mme.read_labels(folder) if question.id != "existence/3"]
    judgement = mme.score(asked, {question.id: "Yes" for question in asked})
    found = numbers(judgement)
    assert (found["existence.acc"], found["existence.acc_plus"]) == (pytest.approx(200 / 3), 0)
    assert judgement.notes[-1].startswith("1 images have only one of their two questions")


def test_clusters_are_images_shared_by_the_subtasks_of_coco(folder: Path) -> None:
    sums = tally(judge(folder, existence_0="no").contributions)
    assert set(sums.clusters) == {"1", "2", "OCR/0001", "code_reasoning/0001"}
    assert intervals(sums, mme.measure, num_resamples=200)["OCR.score"] == (200, 200)


def test_questions_are_those_of_the_protocol(folder: Path) -> None:
    asked = mme.BENCHMARK.questions(folder, "test")
    assert [question.id for question in asked] == [
        "existence/0", "existence/1", "existence/2", "existence/3", "color/0", "color/1", "OCR/0",
        "OCR/1", "code_reasoning/0", "code_reasoning/1",
    ]  # fmt: skip
    assert asked[0].text == "Is there a cat?" + SHORT and asked[1].text == "Is there a dog?" + SHORT
    assert [asked[i].image for i in (3, 6)] == [
        folder / "existence/2.jpg",
        folder / "OCR/images/0001.jpg",
    ]
    assert asked[1].facts == {
        "answer": "no",
        "subtask": "existence",
        "pair": "existence/0",
        "image": "1",
    }
    assert mme.read_labels(folder)[0].text == f"Is there a cat?  {ASK}"
    assert mme.BENCHMARK.doubts(asked, "test") == []


def test_the_release_has_one_text_an_image_beside_it_or_in_a_folder_of_its_own(
    folder: Path,
) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / "existence/2.txt").write_text(f"A car? {ASK}\tYes\nA bus? {ASK}\tNo\n\n")
    (folder / "existence/1.txt").write_text(f"A cat? {ASK}\tYes\nA dog? {ASK}\tNo")
    (folder / "OCR/questions_answers_YN").mkdir()
    (folder / "OCR/questions_answers_YN/0001.txt").write_text(
        f"Is it 'a'? {ASK}\tYes\nIs it 'b'? {ASK}\tNo\n"
    )
    asked = mme.BENCHMARK.questions(folder, "test")
    assert [
        (question.id, question.text.removesuffix(SHORT), question.facts["answer"])
        for question in asked
    ] == [
        ("existence/0", "A cat?", "yes"),
        ("existence/1", "A dog?", "no"),
        ("existence/2", "A car?", "yes"),
        ("existence/3", "A bus?", "no"),
        ("OCR/0", "Is it 'a'?", "yes"),
        ("OCR/1", "Is it 'b'?", "no"),
    ]
    assert [asked[i].image for i in (0, 4)] == [
        folder / "existence/1.jpg",
        folder / "OCR/images/0001.jpg",
    ]
    assert {question.facts["pair"] for question in asked} == {"existence/0", "existence/1", "OCR/0"}
    (folder / "existence/3.txt").write_text(f"A car? {ASK}\tYes\n")
    with pytest.raises(ValueError, match=r"3\.txt has 1 lines, not two"):
        mme.read_labels(folder)


def test_lines_out_of_order_are_doubted(folder: Path) -> None:
    lines = FILES["existence"].splitlines(keepends=True)
    (folder / "existence.txt").write_text("".join(lines[i] for i in (0, 2, 1, 3)))
    (doubt,) = mme.BENCHMARK.doubts(mme.read_labels(folder), "test")
    assert doubt.startswith("existence/1 and the line before it")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("1.jpg\tQ?\tYes\n1.jpg\tQ?\tMaybe\n", "line 2 has the answer 'Maybe', not Yes or No"),
        ("1.jpg\tQ?\tYes\n1.jpg Q? No\n", "line 2 has 1 fields, not 3"),
        ("1.jpg\tQ?\tYes\tYes\n1.jpg\tQ?\tNo\tNo\n", "line 1 has 4 fields, not 3"),
        ("1.jpg\tQ?\tYes\n\n1.jpg\tQ?\tNo\n1.jpg\tQ?\tNo\n", "line 2 has 1 fields, not 3"),
        ("1.jpg\tQ?\tYes\n", "has 1 lines, not two per image"),
        ("", "has 1 lines, not two per image"),
    ],
)
def test_a_malformed_line_is_named(folder: Path, content: str, sentence: str) -> None:
    (folder / "color.txt").write_text(content)
    with pytest.raises(ValueError, match=rf"color\.txt {sentence}"):
        mme.read_labels(folder)


def test_missing_things_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="no split 'dev': choose test"):
        mme.BENCHMARK.questions(folder, "dev")
    with pytest.raises(ValueError, match="no packaged copy: get MME_Benchmark_release_version"):
        mme.BENCHMARK.questions(None, "test")
    with pytest.raises(ValueError, match=r"OCR\.txt is one file: give the folder"):
        mme.read_labels(folder / "OCR.txt")
    (folder / "OCR/images/0001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image .*OCR.0001\.jpg"):
        mme.BENCHMARK.questions(folder, "test")
    (folder / "OCR.txt").write_bytes(b"\xff\xfe\t")
    with pytest.raises(ValueError, match=r"OCR\.txt is not UTF-8"):
        mme.read_labels(folder)
    with pytest.raises(
        FileNotFoundError, match=r"nowhere has neither existence\.txt nor existence/"
    ):
        mme.read_labels(folder / "nowhere")


# Official files in small, for the tests of the command line and of the evaluation.


SUBTASKS = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)


def write_official(folder: Path) -> None:
    for subtask in SUBTASKS:
        lines = "".join(
            f"0001.jpg\tIs it {subtask} {which}? Please answer yes or no.\t{which}\n"
            for which in ("Yes", "No")
        )
        write_file(folder / f"{subtask}.txt", lines)
        write_images(folder / subtask, ("0001.jpg",))


OFFICIAL = Official(
    write=write_official,
    gold={
        f"{subtask}/{number}": answer
        for subtask in SUBTASKS
        for number, answer in enumerate(("Yes", "No"))
    },
    size="2,374",
    readings=("parsed",),
    broken_label=BrokenLabel(
        "OCR.txt", "\tNo\n", "\tMaybe\n", ("OCR.txt line 2 has the answer 'Maybe', not Yes or No",)
    ),
    metric="perception",
    unit="points",
    best=2000.0,
    image="landmark/0001.jpg",
    # The score is made of those subtasks that are there, so a prediction has no question.
    without_file="no question has the id OCR/0",
    prompts=(
        "    <image>\n    Is it existence Yes?\n"
        "    Answer the question using a single word or phrase.<|im_end|>\n",
    ),
)
