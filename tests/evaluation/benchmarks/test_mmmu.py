"""MMMU: letters that are read and drawn, open answers, several images, files of subjects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmarks import mmmu
from tests.evaluation.official import (
    EXAMPLES,
    BrokenLabel,
    Official,
    Upload,
    check_example,
    make_image,
    read_expected,
    read_texts,
    write_parquet,
)

FILE = "validation-00000-of-00001.parquet"
LETTER = "\nAnswer with the option's letter from the given choices directly."
FOUR = {"A": "oil", "B": "ink", "C": "chalk", "D": "glue"}
NINE = {letter: f"option {letter.lower()}" for letter in "ABCDEFGHI"}


def record(
    question_id: str, options: str, answer: str, question: str = "<image 1> Which?", images: int = 1
) -> dict[str, Any]:
    """A row of the official file; there are seven columns of images."""
    shown = {
        f"image_{number}": {"bytes": make_image(f"{question_id} {number}"), "path": None}
        if number <= images
        else {"bytes": None, "path": None}
        for number in range(1, 8)
    }
    kind = "open" if options == "[]" else "multiple-choice"
    named = {"id": question_id, "question": question, "options": options, "answer": answer}
    return named | shown | {"question_type": kind, "subfield": "Drawing"}


ART = [
    record("validation_Art_1", "['oil', 'ink', 'chalk', 'glue']", "C"),
    record(
        "validation_Art_2",
        "['<image 2>', '<image 3>']",
        "B",
        "Which is older than <image 1>?",
        images=3,
    ),
]
MATH = [
    record("validation_Math_1", "[]", "['24/7', '3.429']", "<image 1> What is x?"),
    record("validation_Math_2", "['1', '2']", "A"),
]


def write_official(folder: Path) -> None:
    write_parquet(folder / "Math" / FILE, MATH)
    write_parquet(folder / "Art" / FILE, ART)
    for subject, options in (("Art", "['oil', 'ink']"), ("Math", "[]")):
        hidden = [record(f"test_{subject}_1", options, "?")]
        write_parquet(folder / subject / "test-00000-of-00001.parquet", hidden)


def as_upload(texts: Mapping[str, str]) -> dict[str, str]:
    """The open answer as it is; the letter is read, or drawn with the official seed."""
    letters = {"A": "A", "B": "B", "yes": "A", "no": "A"}
    return {
        "test_Art_1": letters[texts["test_Art_1"]],
        "test_Math_1": texts["test_Math_1"],
    }


def test_the_official_scorer_says_the_same() -> None:
    content = check_example("mmmu", "annotations")
    variants = read_expected("mmmu")["variants"]
    assert content["metrics"]["unreadable_is_wrong"] == variants["unreadable_is_wrong"]
    assert content["submission"]["validation_Math_1"] == "x = 3.43"
    asked = {question.id: question for question in mmmu.read_labels(EXAMPLES / "mmmu/annotations")}
    prompts = variants["prompts"]
    assert {name: asked[name].text for name in prompts} == prompts

    wanted = read_expected("mmmu")["parsed_open"]
    texts = read_texts("mmmu")
    for name, keys in wanted.items():
        assert sorted(map(str, mmmu.read_open_answer(texts[name]))) == sorted(map(str, keys))


def test_draws_do_not_depend_on_the_order_of_questions() -> None:
    asked = mmmu.read_labels(EXAMPLES / "mmmu/annotations")
    texts = read_texts("mmmu")
    assert mmmu.score(asked[::-1], texts).parsed == mmmu.score(asked, texts).parsed


# The official results.
@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("A", "A"), ("A.", "A"), ("(A) oil", "A"), ("A oil", "A"), ("Answer: A", "A")),
        *(("The answer is A.", "A"), ("A.,", "A"), ("A rather than (B)", "B")),
        *(("It is (B), not (A)", "A"), ("B or A", "A"), ("It is A dog", "A")),
        *(("I would say that this is Glue", "D"), ("it is the glue, as I think", "B")),
        *(("a", None), ("(a)", None), ("A)", None), ("A\n", None), ("**A**", None)),
        *(("[A]", None), ("A. oil", None), ("A: oil", None), ("A,.", None), ("Answer:A", None)),
        *(('"A"', None), ("glue", None), ("this is the glue, surely", None), ("", None)),
    ],
)
def test_which_letter_is_read(text: str, letter: str | None) -> None:
    assert mmmu.read_letter(text, FOUR) == letter


def test_letters_go_as_far_as_the_options() -> None:
    assert mmmu.read_letter("C, as I think", NINE) == "I"
    assert mmmu.read_letter("C, as I think", FOUR) is None
    assert mmmu.read_letter("one two three four five and six", {"A": "", "B": "six"}) == "A"


# The official results.
@pytest.mark.parametrize(
    ("text", "answer", "is_right"),
    [
        *(("The answer is $360.", "360", True), ("x = 3.43", "3.429", True), (".286", "286", True)),
        *(("It is 1,000", "1000", True), ("2e3", "2000", True), ("the result is 8,4", "84", True)),
        *(("so it is 7. Not 8", "8", True), ("this 60", "60", True), ("5\n6 = 7", "7", True)),
        *(("3 = 4\nit is 5", "4", False), ("Tampa, Florida", "tampa", True)),
        *(("abc", "b", False), ("a b c", "b", True), ("12", "1", False), ("nan", "nan", False)),
        *(("inf", "inf", True), ("", "x", False), ("is .", "5", False)),
    ],
)
def test_open_answers(text: str, answer: str, is_right: bool) -> None:
    assert mmmu.is_right_open(mmmu.read_open_answer(text), [answer]) == is_right


def test_one_image_or_all_that_a_question_names(tmp_path: Path) -> None:
    write_official(tmp_path)
    first, second, *_ = mmmu.BENCHMARK.questions(tmp_path)
    assert first.id == "validation_Art_1" and first.image == make_image("validation_Art_1 1")
    assert second.image == make_image("validation_Art_2 1")
    assert first.text == ("<image 1> Which?\n(A) oil\n(B) ink\n(C) chalk\n(D) glue\n" + LETTER)

    every = mmmu.BENCHMARK.questions(tmp_path, "all-images")
    assert [len(question.images) for question in every] == [1, 3, 1, 1]
    assert every[1].images == tuple(make_image(f"validation_Art_2 {n}") for n in (1, 2, 3))
    assert [question.facts for question in every] == [
        question.facts for question in mmmu.read_labels(tmp_path)
    ]
    hidden = mmmu.BENCHMARK.questions(tmp_path, "test")
    assert [question.id for question in hidden] == ["test_Art_1", "test_Math_1"]
    assert "answer" not in hidden[0].facts


def test_one_file_of_all_subjects_is_the_same(tmp_path: Path) -> None:
    write_official(tmp_path)
    write_parquet(tmp_path / "one" / "data" / FILE, [*MATH, *ART])
    (one, parts) = (mmmu.read_labels(folder) for folder in (tmp_path / "one", tmp_path))
    assert one == parts
    judgement = mmmu.score(one, {question.id: "A" for question in one})
    found = values(tally(judgement.contributions), mmmu.measure)
    assert found["overall"] == 25 and found["guessed"] == 0
    assert found["domain.Science"] == 50 and found["subject.Art"] == found["open"] == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer": "E"}, "answer 'E' should be one of A, B, C, D"),
        ({"options": "oil, ink"}, "options 'oil, ink' is not the text of a list"),
        ({"options": "[]"}, "question_type 'multiple-choice' does not go with 0 options"),
        ({"id": "validation_Music_Box_1"}, "id 'validation_Music_Box_1' names no subject"),
        ({"id": "validation_Art_2"}, "row 1 has the id validation_Art_2 of"),
    ],
)
def test_a_malformed_row_is_named(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / FILE, [ART[0] | change, ART[1]])
    with pytest.raises(ValueError, match=sentence):
        mmmu.read_labels(path)


# Official files in small, for the tests of the command line and of the evaluation.

OFFICIAL = Official(
    write=write_official,
    gold={
        "validation_Art_1": "(C)",
        "validation_Art_2": "B",
        "validation_Math_1": "x = 3.43",
        "validation_Math_2": "A.",
    },
    size="900",
    readings=("parsed", "submission"),
    broken_label=BrokenLabel(
        f"Art/{FILE}",
        "\x01\x00\x00\x00C",
        "\x01\x00\x00\x00E",
        ("row 0: answer 'E' should be one of A, B, C, D",),
    ),
    not_parsed=("validation_Math_1",),
    metric="overall",
    without_file="validation-*.parquet",
    other_files=(f"Math/{FILE}",),
    upload="mmmu.json",
    served={
        "test": Upload("mmmu.json", "", ["test_Art_1", "test_Math_1"], "EvalAI", content=as_upload)
    },
    prompts=("    <image>\n    <image 1> Which?\n    (A) oil\n", "(D) glue\n    \n    Answer with"),
)
