"""Documents of texts and images in turn: what is no document is named with its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mipha.data.dataset import load_data
from mipha.data.sample import Sample
from mipha.recipe import DataRecipe


def _sample(root: Path, images: list[Any], texts: list[Any]) -> Sample:
    row = {"images": images, "texts": texts, "metadata": "[]"}
    (root / "train.jsonl").write_text(json.dumps(row))
    data = load_data(DataRecipe(dataset="documents", root=root))
    return data.to_sample(data.records[0])


def test_places_are_parted_by_blank_lines(tmp_path: Path) -> None:
    sample = _sample(tmp_path, [None, "a.png", None], [" One. ", None, "Two <image> too."])
    assert [m.role for m in sample.messages] == ["document"]
    assert sample.messages[0].text == "One.\n\n<image>\n\nTwo  too."
    assert sample.images == (tmp_path / "a.png",)
    assert [remark.kind for remark in sample.remarks] == ["foreign-marker"]


@pytest.mark.parametrize(
    ("images", "texts", "sentence"),
    [
        (["a.png", None], ["a", "b"], "line 1: place 0 holds both a text and an image"),
        ([None, None], ["a", None], "place 1 holds nothing"),
        (["a.png"], [None], "no place of the document has text"),
        ([None], ["a", "b"], "it has 2 texts for 1 images; wanted as many of both"),
        ([None], [3], "it is no document of texts and images"),
        (["https://x.org/a.png", None], [None, "a"], "is an address; nothing is downloaded"),
    ],
)
def test_what_is_no_document_is_named(
    images: list, texts: list, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        _sample(tmp_path, images, texts)
