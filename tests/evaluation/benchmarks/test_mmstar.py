"""MMStar: both files, what is read from the first characters, categories, axes and their mean."""

from __future__ import annotations

import base64
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import intervals, tally, values
from mipha.evaluation.benchmark import Judgement
from mipha.evaluation.benchmarks import mmstar
from tests.evaluation.official import (
    BrokenLabel,
    Official,
    check_example,
    make_image,
    write_file,
    write_parquet,
)

COLUMNS = ("index", "question", "image", "answer", "category", "l2_category", "bench")
INSTRUCTION = "\nAnswer with the option's letter from the given choices directly"
QUESTION = "Which <image 1>?\nOptions: A: red, B: blue, C: nan, D: grey"

# index, answer, category, axis
ROWS = [
    (0, "A", "math", "geometry"),
    (1, "B", "math", "geometry"),
    (2, "C", "math", "statistical reasoning"),
    (7, "D", "science & technology", "electronics & energy & mechanical eng."),
]
TEXTS = {"0": "A", "1": "A", "2": "the answer is\nc", "7": "(D) grey"}


def record(index: Any, answer: Any, category: Any, axis: Any, **changes: Any) -> dict[str, Any]:
    named = {
        "index": index,
        "question": QUESTION,
        "image": make_image(str(index)),
        "answer": answer,
    }
    return named | {"category": category, "l2_category": axis, "bench": "MMMU"} | changes


RECORDS = [record(*row) for row in ROWS]


def write_table(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """The .tsv file of the official code: images in base64, quotes around new lines."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, records[0], delimiter="\t")
    writer.writeheader()
    for row in records:
        image = row["image"]
        cell = base64.b64encode(image).decode() if isinstance(image, bytes) else image
        writer.writerow({**row, "image": cell})
    write_file(path, file.getvalue())
    return path


def measured(judgement: Judgement) -> dict[str, float]:
    return values(tally(judgement.contributions), mmstar.measure)


# The official results on answers to the option letters A to D.
@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("A", "A"), ("a", "A"), (" (a)", "A"), ("A. text", "A"), ("\n D", "D")),
        *(("Option\nA", "A"), ("option b.", "B"), ("The answer is\nA", "A")),
        *(("The answer is c.", "C"), ("Because", "B"), ("Definitely C", "D")),
        *(("AC", "A"), ("A or B", "A"), ("Actually it is B", "A"), ("Answer: B", "A")),
        *(("**A**", None), ("[A]", None), ('"A"', None)),
        *(("The answer is: A", None), ("The answer is (A)", None), ("Option: A", None)),
        *(("It is A", None), ("1. A", None), ("", None), ("(", None), ("( A)", None)),
        *(("option", None), ("option ", None), ("E", None), ("red", None), ("option  A", None)),
    ],
)
def test_which_letter_is_read(text: str, letter: str | None) -> None:
    assert mmstar.read_answer(text) == letter


def test_the_official_scorer_says_the_same() -> None:
    check_example("mmstar", "annotations")


def test_numbers_by_hand(tmp_path: Path) -> None:
    labelled = mmstar.read_labels(write_table(tmp_path / "MMStar.tsv", RECORDS))
    judgement = mmstar.score(labelled, TEXTS)
    assert judgement.per_question == {"0": 1, "1": 0, "2": 1, "7": 1}
    assert judgement.parsed == {"0": "A", "1": "A", "2": "C", "7": "D"}
    expected = {
        "overall": 75,
        "axes_mean": 250 / 3,
        "category.math": 200 / 3,
        "category.science & technology": 100,
        "l2_category.electronics & energy & mechanical eng.": 100,
        "l2_category.geometry": 50,
        "l2_category.statistical reasoning": 100,
    }
    found = measured(judgement)
    assert found == pytest.approx(expected) and list(found) == list(expected)


def test_images_are_the_clusters_in_both_files_and_with_both_readers(tmp_path: Path) -> None:
    shared = [*RECORDS[:2], RECORDS[2] | {"image": make_image("0")}, RECORDS[3]]
    table = write_table(tmp_path / "MMStar.tsv", shared)
    parquet = write_parquet(tmp_path / "mmstar.parquet", shared)
    facts = [
        [question.facts for question in read]
        for path in (table, parquet)
        for read in (mmstar.read_labels(path), mmstar.BENCHMARK.questions(path))
    ]
    assert facts[0] == facts[1] == facts[2] == facts[3]
    sums = tally(mmstar.score(mmstar.read_labels(table), TEXTS).contributions)
    assert len(sums.clusters) == 3
    low, high = intervals(sums, mmstar.measure, num_resamples=200)["overall"]
    assert low < 75 < high


def test_questions_are_those_of_the_protocol(tmp_path: Path) -> None:
    in_structs = [
        row | {"image": {"bytes": row["image"], "path": f"{row['index']}.png"}} for row in RECORDS
    ]
    paths = (
        write_table(tmp_path / "MMStar.tsv", RECORDS),
        write_parquet(tmp_path / "mmstar.parquet", RECORDS),
        write_parquet(tmp_path / "structs.parquet", in_structs),
    )
    for path in paths:
        asked = mmstar.BENCHMARK.questions(path, "val")
        assert [question.id for question in asked] == list(TEXTS)
        assert [question.image for question in asked] == [row["image"] for row in RECORDS]
        assert asked[0].text == QUESTION + INSTRUCTION
        labelled = mmstar.read_labels(path)
        assert {question.image for question in labelled} == {None}
        assert [question.facts for question in labelled] == [question.facts for question in asked]


def test_the_parquet_file_comes_first_and_labels_need_no_images(tmp_path: Path) -> None:
    write_table(tmp_path / "MMStar.tsv", RECORDS)
    write_parquet(tmp_path / "mmstar.parquet", RECORDS[:1])
    assert len(mmstar.BENCHMARK.questions(tmp_path)) == 1
    bare = [{key: value for key, value in row.items() if key != "image"} for row in RECORDS]
    path = write_parquet(tmp_path / "bare.parquet", bare)
    assert [question.facts["image"] for question in mmstar.read_labels(path)] == list(TEXTS)
    with pytest.raises(ValueError, match=r"bare\.parquet row 0 has no image"):
        mmstar.BENCHMARK.questions(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer": "E"}, "answer 'E' should be 'A', 'B', 'C' or 'D'"),
        ({"answer": "a"}, "answer 'a' should be 'A', 'B', 'C' or 'D'"),
        ({"index": 0}, r"has the index 0 of .*: keep one of the two"),
        ({"index": -1}, "index '?-1'? should be"),
        ({"l2_category": ""}, "l2_category '' should have at least 1 character"),
    ],
)
@pytest.mark.parametrize(
    ("write", "name", "place"),
    [(write_table, "MMStar.tsv", "line 5"), (write_parquet, "mmstar.parquet", "row 1")],
)
def test_a_malformed_row_is_named(
    write: Any, name: str, place: str, change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, [RECORDS[0], RECORDS[1] | change])
    with pytest.raises(ValueError, match=rf"{name} {place}:? {sentence}"):
        mmstar.read_labels(path)


def test_a_file_of_another_kind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split_off = [row | dict.fromkeys("ABCD", "red") for row in RECORDS]
    with pytest.raises(ValueError, match=r"VLMEvalKit's file: get mmstar\.parquet or MMStar\.tsv"):
        mmstar.read_labels(write_table(tmp_path / "MMStar.tsv", split_off))
    with pytest.raises(ValueError, match=r"MMStar\.tsv line 3: the image is not base64"):
        mmstar.BENCHMARK.questions(
            write_table(tmp_path / "MMStar.tsv", [RECORDS[0] | {"image": "A"}])
        )
    with pytest.raises(FileNotFoundError, match=r"has no mmstar\.parquet or MMStar\.tsv: get"):
        (tmp_path / "empty").mkdir()
        mmstar.read_labels(tmp_path / "empty")

    path = write_parquet(tmp_path / "mmstar.parquet", [{"index": 0, "question": "?"}])
    with pytest.raises(ValueError, match=r"has no column answer or category or l2_category"):
        mmstar.read_labels(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"mmstar\.parquet is not a \.parquet file"):
        mmstar.read_labels(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "mipha-vlm\[evaluation\]"'):
        mmstar.read_labels(path)


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    """`MMStar.tsv`: the tests of every benchmark change its text."""
    write_table(folder / "MMStar.tsv", RECORDS)


OFFICIAL = Official(
    write=write_official,
    gold={"0": "A", "1": "(b) blue", "2": "The answer is C.", "7": "Option D"},
    size="1,500",
    readings=("parsed",),
    broken_label=BrokenLabel(
        "MMStar.tsv",
        "\tC\tmath",
        "\tE\tmath",
        ("MMStar.tsv line ", "answer 'E' should be 'A', 'B', 'C' or 'D'"),
    ),
    metric="overall",
    prompts=(
        "    <image>\n    Which <image 1>?\n    Options: A: red, B: blue, C: nan, D: grey\n"
        "    Answer with the option's letter from the given choices directly<|im_end|>\n",
    ),
)
