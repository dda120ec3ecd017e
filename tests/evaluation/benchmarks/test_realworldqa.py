"""RealWorldQA: two files, two protocols, and what each reads of an answer."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmarks import realworldqa
from tests.evaluation.official import (
    BrokenLabel,
    Official,
    check_example,
    make_image,
    write_file,
    write_parquet,
)

LETTER = "\nAnswer with the option's letter from the given choices directly."
COLUMNS = ("image", "answer", "index", "A", "B", "C", "D", "question")

# answer, index, options, question
ROWS = [
    ("A", "410", ("Left", "Right", "", ""), "Which way?"),
    ("C", "411", ("One", "None", "Three", "NA"), "How many?"),
    ("B", "412", ("Left", "Right", "", ""), "Which way now?"),
]


def write_table(path: Path, rows: list[Any] = ROWS) -> Path:
    lines = ["\t".join(COLUMNS)]
    for answer, index, options, question in rows:
        image = base64.b64encode(make_image(index)).decode()
        lines.append("\t".join((image, answer, index, *options, question)))
    write_file(path, "\n".join(lines) + "\n")
    return path


def test_the_official_scorers_say_the_same() -> None:
    table = check_example("realworldqa", "annotations.tsv")
    assert "by VLMEvalKit's .tsv file and rules" in table["notes"][-1]
    file = check_example("realworldqa", "annotations.parquet", example="realworldqa_official")
    assert "by xAI's .parquet file and lmms-eval's rules" in file["notes"][-1]


def test_options_that_pandas_takes_for_nothing_are_not_there(tmp_path: Path) -> None:
    asked = realworldqa.BENCHMARK.questions(write_table(tmp_path / "RealWorldQA.tsv"))
    assert asked[0].text == "Which way?\nA. Left\nB. Right" + LETTER
    assert asked[1].text == "How many?\nA. One\nC. Three" + LETTER
    assert asked[1].facts["choices"] == {"A": "One", "C": "Three"}
    judgement = realworldqa.score(asked, {"410": "left", "411": "B", "412": "Right or left"})
    assert judgement.parsed == {"410": "A", "411": None, "412": None}


def test_a_row_without_options_and_one_in_chinese(tmp_path: Path) -> None:
    rows = [("3", "1", ("",) * 4, "How many?"), ("A", "2", ("左", "右", "", ""), "哪边?")]
    path = write_table(tmp_path / "RealWorldQA.tsv", rows)
    asked = realworldqa.BENCHMARK.questions(path)
    assert asked[0].text == "How many?\nAnswer the question directly."
    assert asked[1].text == "哪边?\nA. 左\nB. 右\n请直接回答选项字母。"
    judgement = realworldqa.score(asked, {"1": "3", "2": "A"})
    assert judgement.per_question == {"1": 0, "2": 1}


def test_the_kinds_of_questions_of_the_official_file(tmp_path: Path) -> None:
    instruction = "Please answer directly with a single word or number."
    rows = [
        {"question": f" Which?\n{instruction}\n", "answer": answer, "image": make_image(answer)}
        for answer in ("A", "3", "Yes")
    ]
    path = write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    asked = realworldqa.BENCHMARK.questions(tmp_path)
    assert asked[0].text == f"Which?\n{instruction}" and asked[0].image == make_image("A")
    judgement = realworldqa.score(asked, {"0": "It is A", "1": "three", "2": "Yes. "})
    found = values(tally(judgement.contributions), realworldqa.measure)
    assert found == pytest.approx({"accuracy": 200 / 3, "multiple_choice": 100, "open": 50})
    write_table(tmp_path / "RealWorldQA.tsv")
    assert len(realworldqa.read_labels(tmp_path)[0].facts["choices"]) == 2, "the .tsv comes first"
    assert realworldqa.read_labels(path)[0].facts["choices"] is None


def test_a_malformed_row_is_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "RealWorldQA.tsv", [ROWS[0], ROWS[0]])
    with pytest.raises(ValueError, match=r"line 3 has the index 410 of .* line 2: keep one"):
        realworldqa.read_labels(path)
    with pytest.raises(FileNotFoundError, match=r"has no RealWorldQA\.tsv or data/test"):
        (tmp_path / "empty").mkdir()
        realworldqa.read_labels(tmp_path / "empty")


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    write_table(folder / "RealWorldQA.tsv")


OFFICIAL = Official(
    write=write_official,
    gold={"410": "A", "411": "Three", "412": "(B)"},
    size="765",
    readings=("parsed",),
    broken_label=BrokenLabel(
        "RealWorldQA.tsv",
        "\tC\t411",
        "\tcc\t411",
        ("RealWorldQA.tsv line 3: answer 'cc' should be the letter of an option",),
    ),
    prompts=("    <image>\n    Which way?\n    A. Left\n    B. Right\n    Answer with",),
)
