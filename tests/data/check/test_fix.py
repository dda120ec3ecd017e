"""The cleaned copy: sound, as near to the data as it can be, and the data untouched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mipha.data.check.findings import KINDS
from mipha.data.check.fix import write_fixed
from mipha.data.check.linter import check_data
from mipha.data.dataset import data_recipe, load_data

sys.path.insert(0, str(Path(__file__).parent))
from tests.data.check.planted import DEFECTS, Corpus, plant


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return plant(tmp_path_factory.mktemp("corpus"), 4 * len(DEFECTS))


def _check(path: Path, **more: Any):
    return check_data(load_data(data_recipe(str(path))), **more)


def _talk(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def test_the_copy_has_what_can_be_trained_on(corpus: Corpus, tiny_model, tiny_run_recipe) -> None:
    before = corpus.planted.read_bytes()
    stage = tiny_run_recipe("stages.finetune.row_tokens=2048").stages["finetune"]
    more = {
        "stage": stage,
        "processor": tiny_model()[1],
        "against": load_data(data_recipe(str(corpus.evaluation))),
    }
    result = _check(corpus.planted, **more)
    fixed = write_fixed(result, corpus.planted.with_name("fixed.jsonl"))
    assert corpus.planted.read_bytes() == before
    assert fixed.note is None

    again = _check(fixed.file, **more)
    assert again.num_errors == 0
    assert {KINDS[finding.kind].action for finding in again.findings} == {
        "keep"
    }  # what a program cannot repair is still said
    assert again.num_rows == fixed.num_kept

    planned = {
        row: {KINDS[kind].action for kind in DEFECTS[name].kinds | DEFECTS[name].with_tokens}
        for row, name in corpus.where.items()
    }
    dropped = {row for row, fixes in planned.items() if "drop" in fixes}
    mended = {row for row, fixes in planned.items() if "repair" in fixes} - dropped
    assert {change.row for change in fixed.changes if change.action == "left out"} == dropped
    assert {change.row for change in fixed.changes if change.action == "mended"} == mended
    lines = before.split(b"\n")
    kept = [line for row, line in enumerate(lines[:-1]) if row not in dropped | mended]
    assert [line for line in fixed.file.read_bytes().split(b"\n") if line in set(kept)] == kept
    listed = fixed.list_file.read_text().splitlines()
    assert len(listed) == len(fixed.changes)
    assert "planted.jsonl, line 2: left out: this is not valid JSON" in listed[0]


def test_texts_are_mended_and_paths_are_not(tmp_path: Path) -> None:
    Image.effect_noise((40, 40), 90).save(tmp_path / "cafÃ©.png")
    row = _talk("<image>\nWas ist das?", "Ein CafÃ©\x07, ge\u200böffnet \ud83d.") | {
        "images": ["cafÃ©.png"],
        "id": "nÂ° 7",
    }
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(row) + "\n\n" + json.dumps(_talk("Hi?", "Hello.")) + "\n"
    )
    fixed = write_fixed(_check(tmp_path / "rows.jsonl"), tmp_path / "new" / "rows.jsonl")
    first, second = map(json.loads, fixed.file.read_text().splitlines())
    assert first == _talk("<image>\nWas ist das?", "Ein Café, geöffnet .") | {
        "images": ["cafÃ©.png"],
        "id": "n° 7",
    }
    assert second == _talk("Hi?", "Hello.")
    assert (
        fixed.note is not None and str(tmp_path.resolve()) in fixed.note
    )  # the pictures did not move
    moved = load_data(data_recipe(str(fixed.file), image_root=[tmp_path]))
    assert check_data(moved).findings == ()


def test_a_json_list_stays_one(tmp_path: Path) -> None:
    rows = [_talk("What?", "A cat."), _talk("What?", ""), _talk("Where?", "In the CafÃ©.")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    fixed = write_fixed(_check(tmp_path / "rows.json"), tmp_path / "fixed.json")
    assert json.loads(fixed.file.read_text()) == [rows[0], _talk("Where?", "In the Café.")]
    assert [(change.row, change.where, change.action) for change in fixed.changes] == [
        (1, "rows.json, row 1", "left out"),
        (2, "rows.json, row 2", "mended"),
    ]


def test_nothing_to_do_gives_the_same_bytes(corpus: Corpus) -> None:
    fixed = write_fixed(_check(corpus.clean), corpus.clean.with_name("same.jsonl"))
    assert fixed.file.read_bytes() == corpus.clean.read_bytes()
    assert (fixed.changes, fixed.list_file.read_text()) == ((), "")


def test_what_cannot_be_done_is_said_before_anything_is_written(
    corpus: Corpus, tmp_path: Path
) -> None:
    result = _check(corpus.clean)
    with pytest.raises(ValueError, match="is the data itself, which is never changed"):
        write_fixed(result, corpus.clean)
    (tmp_path / "link.jsonl").symlink_to(corpus.clean)
    with pytest.raises(ValueError, match="is the data itself"):
        write_fixed(result, tmp_path / "link.jsonl")
    with pytest.raises(ValueError, match=r"give a name that ends in \.jsonl"):
        write_fixed(result, tmp_path / "fixed.json")
    (tmp_path / "rows.csv").write_text("question,answer\nWhat?,A cat.\n")
    with pytest.raises(ValueError, match=r"rows\.csv cannot be fixed: only JSON and JSON lines"):
        write_fixed(_check(tmp_path / "rows.csv"), tmp_path / "fixed.csv")
    many = tmp_path / "many"
    many.mkdir()
    for shard in range(2):
        (many / f"train-0000{shard}.jsonl").write_text(
            json.dumps(_talk(f"What is {shard}?", "A number.")) + "\n"
        )
    with pytest.raises(ValueError, match="many is made of 2 files: check and fix them one by one"):
        write_fixed(_check(many), tmp_path / "fixed.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl", "many", "rows.csv"]
