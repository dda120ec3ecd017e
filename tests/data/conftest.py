"""Small data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mipha.recipe import DataRecipe


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., DataRecipe]:
    """`write(name, images)`: a messages file, a sample for each; None means no image."""

    def file(name: str, images: list[str | None], /, **options: object) -> DataRecipe:
        lines = [
            {"messages": conversation(f"{name} {i}?"), "images": [image] if image else []}
            for i, image in enumerate(images)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return DataRecipe(dataset="messages", root=tmp_path / f"{name}.jsonl", **options)

    return file
