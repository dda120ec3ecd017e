"""docs/alignment.md: every step is there, and rows with the fields of the page are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mipha.alignment.recipe import STEPS, list_alignment_recipes, load_alignment_recipe
from mipha.data.alignment import load_image_preferences, load_instructions, load_preferences

TEXT = (Path(__file__).parents[2] / "docs" / "alignment.md").read_text(encoding="utf-8")


def test_every_step_has_its_row() -> None:
    section = TEXT.partition("## The steps")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", section, flags=re.MULTILINE)) == set(STEPS)


def test_the_commands_name_recipes_of_their_step() -> None:
    commands = re.findall(r"^mipha align ([\w-]+) ([\w-]+) -o", TEXT, flags=re.MULTILINE)
    assert len(commands) >= 4
    for step, name in commands:
        assert load_alignment_recipe(name).step == step
    small = [name for name in list_alignment_recipes() if name.startswith("smollm2-135m-")]
    assert "`smollm2-135m-*`" in TEXT and {load_alignment_recipe(n).step for n in small} == set(
        STEPS
    )


@pytest.mark.parametrize(
    ("layout", "load"),
    [
        ("Alpaca's", load_instructions),
        ("PKU-SafeRLHF's", load_preferences),
        ("pairs", load_image_preferences),
    ],
)
def test_rows_with_the_fields_of_the_page_are_read(layout: str, load, tmp_path: Path) -> None:
    cell = re.search(rf"^\| [^|]+ \| {layout} \| ([^|]+) \|$", TEXT, flags=re.MULTILINE)[1]
    fields = re.findall(r"`(\w+)`", re.sub(r"\(or [^)]*\)", "", cell))
    row = {key: _value(key) for key in fields}
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert len(load(path)) == 1

    # Each of the fields is needed, but for the input of an instruction.
    for key in set(fields) - {"input"}:
        path.write_text(json.dumps({k: v for k, v in row.items() if k != key}) + "\n")
        with pytest.raises(
            ValueError, match="question" if key == "prompt" and "image" in row else key
        ):
            load(path)


def _value(key: str) -> object:
    if key == "image":
        return "image.png"
    if key.endswith("_id"):
        return 0
    return True if key.startswith("is_") else f"some {key}"
