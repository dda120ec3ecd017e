"""The published layouts, and everything that can be wrong with a row."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest

from mipha.data.alignment import (
    Instruction,
    check_leak,
    load_instructions,
    load_preferences,
    split_by_prompt,
)

PAIR = {
    "prompt": "How do I open a lock?",
    "response_0": "Ask a locksmith.",
    "response_1": "Break it.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
TASK = {"instruction": "Add them.", "input": "2 and 3", "output": "5"}


def written(path: Path, rows: list[Any]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(
        lzma.compress(lines.encode())
        if path.suffix == ".xz"
        else (json.dumps(rows) if path.suffix == ".json" else lines).encode()
    )
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.xz"])
def test_instructions_are_the_instruction_and_its_input_on_the_next_line(
    tmp_path: Path, name: str
) -> None:
    path = written(
        tmp_path / name, [TASK, {"instruction": "Say\u2028hi.", "input": "", "output": "hi"}]
    )
    first, second = load_instructions(path)
    assert first == Instruction(f"{path} row 1", "Add them.\n2 and 3", "5")
    assert (second.prompt, second.response) == (
        "Say\u2028hi.",
        "hi",
    )  # a separator that Unicode knows ends no line of JSON


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.xz"])
def test_preferences_keep_the_two_labels_apart(tmp_path: Path, name: str) -> None:
    (row,) = load_preferences(written(tmp_path / name, [PAIR]))
    assert row.responses == ("Ask a locksmith.", "Break it.")
    assert (row.better, row.safer, row.safe) == (1, 0, (True, False))


def test_parquet_reads_as_json_does(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([PAIR]), tmp_path / "a.parquet")
    (from_parquet,), (from_json,) = (
        load_preferences(tmp_path / "a.parquet"),
        load_preferences(written(tmp_path / "a.jsonl", [PAIR])),
    )
    assert from_parquet.responses == from_json.responses
    assert (from_parquet.better, from_parquet.safe) == (from_json.better, from_json.safe)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"better_response_id": None},
            "row 2: its label 'better_response_id' is None, but must be 0 or 1",
        ),
        ({"safer_response_id": 2}, "row 2: its label 'safer_response_id' is 2"),
        (
            {"is_response_1_safe": None},
            "row 2: its label 'is_response_1_safe' is None, but must be False or True",
        ),
        ({"is_response_0_safe": "yes"}, "row 2: its label 'is_response_0_safe' is 'yes'"),
        ({"response_1": " Ask a locksmith."}, "row 2: both responses are the same"),
        ({"prompt": "  "}, "row 2: its prompt is empty"),
        ({"response_0": ""}, "row 2: its response_0 is empty"),
        ({"response_0": None}, "row 2: 'response_0' must be text, but is None"),
        ({"prompt": "half \ud83d"}, "row 2: 'prompt' holds half of a character"),
    ],
)
def test_a_faulty_pair_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        load_preferences(written(tmp_path / "a.jsonl", [PAIR, PAIR | change]))
    assert said in str(refused.value)


def test_a_missing_label_is_refused_even_where_empty_rows_are_left_out(tmp_path: Path) -> None:
    unlabelled = {key: value for key, value in PAIR.items() if key != "safer_response_id"}
    with pytest.raises(ValueError, match="row 1: its label 'safer_response_id' is None"):
        load_preferences(written(tmp_path / "a.jsonl", [unlabelled]), skipped=[])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"output": "\n"}, "row 2: its response is empty"),
        ({"instruction": ""}, "row 2: its prompt"),
    ],
)
def test_an_empty_instruction_is_refused_or_left_out_and_counted(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = written(tmp_path / "a.json", [TASK, TASK | change])
    with pytest.raises(ValueError, match=said):
        load_instructions(path)
    skipped: list[str] = []
    assert len(load_instructions(path, skipped)) == 1
    assert len(skipped) == 1 and said in skipped[0]


def test_what_an_instruction_holds_beside_its_texts_is_named(tmp_path: Path) -> None:
    row = TASK | {"history": [["Add 1 and 1.", "2"]], "topic": "sums"}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (instruction,) = load_instructions(tmp_path / "a.json")
    assert [remark.kind for remark in instruction.remarks] == ["unread-content", "unread-key"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'[{"instruction": "x"', "is not valid JSON: its list is not closed"),
        ("a.jsonl", json.dumps(TASK).encode() + b'\n{"b"\n', "line 2: this is not valid JSON"),
        ("a.jsonl", b"[1]\n", "row 1 is not an object"),
        ("a.jsonl", b"\n", "has no rows"),
        ("a.jsonl.xz", b"no", "cannot be unpacked"),
        ("a.txt", b"no", "is no .json"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_instructions(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no data file"):
        load_instructions(tmp_path / "none.json")


def rows_of(prompts: list[str]) -> list[Instruction]:
    return [
        Instruction(f"row {number}", prompt, "r") for number, prompt in enumerate(prompts, start=1)
    ]


def test_no_prompt_is_on_both_sides_and_no_row_is_lost() -> None:
    rows = rows_of(
        [
            f"{prompt} {number % 100}"
            for prompt in ("Say", "say ", " SAY\n")
            for number in range(200)
        ]
    )
    train, test = split_by_prompt(rows, held_out=0.2, seed=3)
    sides = [{" ".join(row.prompt.split()).lower() for row in side} for side in (train, test)]
    assert not sides[0] & sides[1]
    assert sorted(row.id for row in [*train, *test]) == sorted(row.id for row in rows)
    assert 10 <= len(sides[1]) <= 30  # of 100 prompts; binomial, 20 expected
    check_leak(train, test)


def test_a_prompts_side_hangs_on_nothing_but_itself_and_the_seed() -> None:
    rows = rows_of([f"prompt {number}" for number in range(100)])
    held_out = {row.id for row in split_by_prompt(rows, 0.3, seed=0)[1]}
    shuffled = random.Random(0).sample(rows, 60)
    assert {row.id for row in split_by_prompt(shuffled, 0.3, seed=0)[1]} == held_out & {
        row.id for row in shuffled
    }
    assert {row.id for row in split_by_prompt(rows, 0.3, seed=1)[1]} != held_out


def test_nothing_held_out_is_fine_and_an_empty_side_is_not() -> None:
    rows = rows_of(["a", "b"])
    assert split_by_prompt(rows, 0.0, seed=0) == (rows, [])
    with pytest.raises(
        ValueError, match=r"held_out=0\.001 of 2 different prompts leaves none to hold out"
    ):
        split_by_prompt(rows, 0.001, seed=0)
    with pytest.raises(ValueError, match="leaves none to train on"):
        split_by_prompt(rows, 0.999999, seed=0)


def test_a_leak_names_both_rows() -> None:
    train, test = rows_of(["a", "Say  hi"]), [Instruction("test row 9", "say hi ", "r")]
    with pytest.raises(
        ValueError,
        match=r"test row 9 is held out, but row 2 trains on the same prompt \(1 held-out",
    ):
        check_leak(train, test)
