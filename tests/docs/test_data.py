"""The code of docs/data.md, and its tables of keys and forms."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import get_args

from mipha.recipe import ReadingRecipe, RegionForm

TEXT = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")


def test_the_code_prints_what_it_says() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().strip() == code.strip().rpartition("# ")[2]


def test_every_key_and_form_is_described() -> None:
    for name in (*ReadingRecipe.model_fields, *get_args(RegionForm)):
        assert f"`{name}`" in TEXT, name
