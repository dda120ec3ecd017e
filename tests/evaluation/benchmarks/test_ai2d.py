"""AI2D: the .parquet files, what is read of an answer, and labels at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmarks import ai2d
from tests.evaluation.official import (
    BrokenLabel,
    Official,
    check_example,
    make_image,
    read_expected,
    write_parquet,
    write_table,
)

FILE = "data/test-00000-of-00001.parquet"
LETTER = "\nAnswer with the option's letter from the given choices directly."


def record(answer: str, options: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    image = {"bytes": make_image(options[0]), "path": None}
    named = {"question": "Which part?", "options": list(options), "answer": answer, "image": image}
    return named | changes


RECORDS = [
    record("0", ("leaf", "root")),
    record("2", ("sun", "moon", "star", "sea")),
    record("1", ("leaf", "a", "b")),
]


def test_the_official_scorer_says_the_same() -> None:
    content = check_example("ai2d", "annotations", parsed="compared")
    variants = read_expected("ai2d")["variants"]
    assert content["metrics"]["vlmevalkit"] == pytest.approx(variants["vlmevalkit, exact_matching"])


def test_prompts_are_the_official_ones() -> None:
    example = ai2d.read_labels(Path(__file__).parents[1] / "examples" / "ai2d" / "annotations")
    texts = {question.id: question.text for question in example}
    prompts = read_expected("ai2d")["variants"]["prompts"]
    assert {name: texts[name] for name in prompts} == prompts


# The official results: the text as it is compared with "a".
@pytest.mark.parametrize(
    ("text", "compared"),
    [
        *(("A", "a"), ("a", "a"), ("(A)", "a"), ("A.", "a"), ("A:", "a"), ("**A**", "a")),
        *(('"A"', "a"), ("A)", "a"), ("A. text", "a"), ("  A.B", "a"), ("X. text", "x")),
        *(
            ("A) text", "a text"),
            ("A: text", "a text"),
            ("A text", "a text"),
            ("a. text", "a text"),
        ),
        *(("Answer: A", "answer a"), ("The answer is A.", "the answer is a"), ("A\nB", "a\nb")),
        *(("A .", "a "), ("( A )", " a "), ("A。", "a。"), ("“A”", "“a”"), ("", "")),
    ],
)
def test_how_an_answer_is_compared(text: str, compared: str) -> None:
    assert ai2d.normalise(text) == compared


def test_questions_are_rows_and_images_are_clusters(tmp_path: Path) -> None:
    shared = [*RECORDS[:2], RECORDS[2] | {"image": RECORDS[0]["image"]}]
    for number, rows in enumerate((shared[:2], shared[2:])):
        write_parquet(tmp_path / "data" / f"test-0000{number}-of-00002.parquet", rows)
    asked = ai2d.BENCHMARK.questions(tmp_path)
    assert [question.id for question in asked] == ["0", "1", "2"]
    assert asked[0].text == "Which part?\nA. leaf\nB. root" + LETTER
    assert asked[0].image == make_image("leaf") and asked[2].image is asked[0].image
    labelled = ai2d.read_labels(tmp_path)
    assert [question.facts for question in labelled] == [question.facts for question in asked]
    assert {question.image for question in labelled} == {None}

    judgement = ai2d.score(labelled, {"0": "A. leaf", "1": "star", "2": "C"})
    assert judgement.per_question == {"0": 1, "1": 0, "2": 0}
    sums = tally(judgement.contributions)
    assert len(sums.clusters) == 2
    assert values(sums, ai2d.measure) == pytest.approx({"overall": 100 / 3, "vlmevalkit": 200 / 3})


def test_the_table_of_vlmevalkit_asks_the_same(tmp_path: Path) -> None:
    write_parquet(tmp_path / FILE, RECORDS)
    rows = []
    for number, row in enumerate(RECORDS):
        options = dict(zip("ABCD", [*row["options"], "", ""][:4], strict=True))
        named = {"index": 7 + number, "question": row["question"], **options}
        answer = "ABCD"[int(row["answer"])]
        rows.append(named | {"answer": answer, "image": row["image"]["bytes"]})
    path = write_table(tmp_path / "table" / "AI2D_TEST.tsv", rows)

    official = ai2d.BENCHMARK.questions(tmp_path)
    table = ai2d.BENCHMARK.questions(path.parent)
    assert [question.id for question in table] == ["7", "8", "9"]
    for ours, theirs in zip(official, table, strict=True):
        assert (ours.text, ours.facts, ours.image) == (theirs.text, theirs.facts, theirs.image)

    write_table(path, [rows[0] | {"answer": "C"}])
    with pytest.raises(ValueError, match=r"line 2: answer 'C' .* 2 options, .* its letter"):
        ai2d.read_labels(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer": "4"}, "row 1: answer '4' should be the number of one of its 4 options"),
        ({"answer": "a"}, "row 1: answer 'a' should be the number"),
        ({"options": ["sun"]}, "row 1: options .* should have at least 2"),
        ({"question": None}, "row 1: question None should be a valid string"),
        ({"image": {"bytes": None, "path": "a.png"}}, "row 1 has no image"),
    ],
)
def test_a_malformed_row_is_named(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / FILE, [RECORDS[0], RECORDS[1] | change])
    with pytest.raises(ValueError, match=rf"parquet {sentence}"):
        ai2d.BENCHMARK.questions(tmp_path)


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    write_parquet(folder / FILE, RECORDS)


OFFICIAL = Official(
    write=write_official,
    gold={"0": "A", "1": "(c)", "2": "B. a"},
    size="3,088",
    readings=("normalised",),
    broken_label=BrokenLabel(
        FILE,
        "\x01\x00\x00\x002",
        "\x01\x00\x00\x007",
        ("row 1: answer '7' should be the number of one of its 4 options",),
    ),
    metric="overall",
    without_file="test-*.parquet",
    prompts=("    <image>\n    Which part?\n    A. leaf\n    B. root\n    Answer with",),
)
