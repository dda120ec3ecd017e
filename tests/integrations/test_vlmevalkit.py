"""The adapter for VLMEvalKit, where that is installed: pip install ms-vlmeval, or a checkout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("vlmeval.vlm.base", reason="needs VLMEvalKit", exc_type=ImportError)

from mipha.assistant import load
from mipha.integrations.vlmevalkit import Mipha
from mipha.models.build import save_checkpoint


def test_it_answers_as_the_assistant_does(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model, processor = tiny_model("qwen2", "siglip")
    save_checkpoint(model, processor, tmp_path / "model")
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "a.png")
    adapter = Mipha(str(tmp_path / "model"), max_new_tokens=6)
    message = [
        {"type": "image", "value": str(tmp_path / "a.png")},
        {"type": "text", "value": "what is it?"},
    ]
    expected = (
        load(tmp_path / "model").answer(tmp_path / "a.png", "what is it?", max_new_tokens=6).text
    )
    assert adapter.generate_inner(message) == expected
    both = [message[1], message[0], {"type": "text", "value": "or"}, message[0]]
    asked = "what is it?\n<image>\nor\n<image>"
    images = [tmp_path / "a.png"] * 2
    assert (
        adapter.generate_inner(both)
        == load(tmp_path / "model").answer(images, asked, max_new_tokens=6).text
    )
