"""ChartQA: three forms of its files, the halves and their mean, the exchanged variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmarks import chartqa
from tests.evaluation.official import (
    BrokenLabel,
    Official,
    check_example,
    make_image,
    write_file,
    write_images,
    write_parquet,
    write_table,
)

SHORT = "\nAnswer the question using a single word or phrase."
HUMAN = [("a.png", "How many?", "100"), ("a.png", "Which?", "Tolland")]
AUGMENTED = [("b.png", "What share?", "0.62")]
IDS = ["human/0", "human/1", "augmented/0"]


def as_records(rows: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    return [{"imgname": name, "query": query, "label": label} for name, query, label in rows]


def write_official(folder: Path) -> None:
    write_file(folder / "test_human.json", as_records(HUMAN))
    write_file(folder / "test_augmented.json", as_records(AUGMENTED))
    write_images(folder / "png", ["a.png", "b.png"])


def in_parquet(kind: str) -> list[dict[str, Any]]:
    """The augmented question first, to show that the order of the halves is fixed."""
    rows = []
    for half, (name, query, label) in [
        ("augmented", AUGMENTED[0]),
        *(("human", row) for row in HUMAN),
    ]:
        image = {"bytes": make_image(f"png/{name}"), "path": name}
        if kind == "lmms-lab":
            named = {"type": f"{half}_test", "question": query, "answer": label}
        else:
            named = {"human_or_machine": int(half == "augmented"), "query": query, "label": [label]}
        rows.append(named | {"image": image})
    return rows


@pytest.mark.parametrize("annotations", ["annotations", "test.parquet"])
def test_the_official_scorer_says_the_same(annotations: str) -> None:
    content = check_example("chartqa", annotations)
    assert content["notes"] == ["1 of 13 answers end in a full stop, and a word with one is wrong"]


@pytest.mark.parametrize("kind", ["lmms-lab", "HuggingFaceM4"])
def test_all_forms_of_the_files_ask_the_same(kind: str, tmp_path: Path) -> None:
    write_official(tmp_path / "ChartQA Dataset" / "test")
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", in_parquet(kind))
    official = chartqa.BENCHMARK.questions(tmp_path)  # the .json files come first
    table = chartqa.BENCHMARK.questions(tmp_path / "data")
    assert [question.id for question in official] == [question.id for question in table] == IDS
    assert official[0].text == "How many?" + SHORT
    for ours, theirs in zip(official, table, strict=True):
        assert ours.text == theirs.text and ours.facts["answers"] == theirs.facts["answers"]
        assert isinstance(ours.image, Path) and ours.image.read_bytes() == theirs.image
    assert {question.image for question in chartqa.read_labels(tmp_path / "data")} == {None}


def test_the_table_of_vlmevalkit_asks_the_same(tmp_path: Path) -> None:
    write_official(tmp_path)
    rows = [
        {"index": number, "question": query, "answer": label, "split": f"test_{half}"}
        | {"image": make_image(f"png/{name}")}
        for number, (half, (name, query, label)) in enumerate(
            [("augmented", AUGMENTED[0]), *(("human", row) for row in HUMAN)]
        )
    ]
    path = write_table(tmp_path / "table" / "ChartQA_TEST.tsv", rows)
    official, table = (
        chartqa.BENCHMARK.questions(folder) for folder in (tmp_path, tmp_path / "table")
    )
    assert [question.id for question in table] == IDS
    for ours, theirs in zip(official, table, strict=True):
        assert ours.text == theirs.text and ours.facts["answers"] == theirs.facts["answers"]
        assert isinstance(ours.image, Path) and ours.image.read_bytes() == theirs.image

    # A list in brackets is text, as in the official file, and one of Python is several answers.
    answers = ["[Retail, Wholesale]", "[3, 5]", "['62', '62%']"]
    write_table(path, [row | {"answer": one} for row, one in zip(rows, answers, strict=True)])
    table = {question.text: question for question in chartqa.read_labels(path)}
    assert [table[row["question"] + SHORT].facts["answers"] for row in rows] == [
        ["[Retail, Wholesale]"],
        ["[3, 5]"],
        ["62", "62%"],
    ]


def test_numbers_by_hand(tmp_path: Path) -> None:
    write_official(tmp_path)
    labelled = chartqa.read_labels(tmp_path)
    texts = {"human/0": "105.2", "human/1": "tolland ", "augmented/0": "62%"}
    judgement = chartqa.score(labelled, texts)
    assert judgement.per_question == {"human/0": 0, "human/1": 0, "augmented/0": 1}
    # Exchanged, 5 % of the prediction is tolerated, and the prediction is stripped.
    expected = {"relaxed_accuracy": 100 / 3, "human": 0, "augmented": 100, "swapped": 100}
    found = values(tally(judgement.contributions), chartqa.measure)
    assert found == pytest.approx(expected | {"average_of_splits": 50})


def test_files_at_fault_are_named(tmp_path: Path) -> None:
    write_official(tmp_path)
    with pytest.raises(ValueError, match=r"test_human\.json is one file of two: give the folder"):
        chartqa.read_labels(tmp_path / "test_human.json")
    (tmp_path / "test_human.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no test_human\.json: get `ChartQA Dataset"):
        chartqa.read_labels(tmp_path)
    rows = [in_parquet("lmms-lab")[0] | {"type": "machine"}]
    with pytest.raises(ValueError, match="row 0: half 'machine' should be 'human' or 'augmented'"):
        chartqa.read_labels(write_parquet(tmp_path / "test.parquet", rows))


# Official files in small, for the tests of the command line and of the evaluation.

OFFICIAL = Official(
    write=write_official,
    gold={"human/0": "98", "human/1": "TOLLAND", "augmented/0": "62%"},
    size="2,500",
    readings=(),
    broken_label=BrokenLabel(
        "test_human.json",
        '"label": "100"',
        '"label": 100',
        ("test_human.json record 0 (from 0): label 100 should be a valid string",),
    ),
    metric="relaxed_accuracy",
    image="png/b.png",
    other_files=("test_augmented.json",),
    prompts=("    <image>\n    How many?\n    Answer the question using a single word",),
)
