"""Runs where lmms-eval is installed: pip install lmms-eval==0.7.3 --no-deps pytz loguru."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="needs lmms-eval")

from lmms_eval.api.instance import Instance

from mipha.assistant import load
from mipha.integrations.lmms_eval import Mipha, manifest
from mipha.models.build import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = tiny_model("qwen2", "siglip")
    folder = tmp_path_factory.mktemp("lmms") / "model"
    save_checkpoint(model, processor, folder)
    return folder


def requests(model: Mipha, count: int) -> list[Instance]:
    """As lmms-eval's tasks make them: six arguments each."""
    docs = [
        {"image": Image.new("RGB", (8, 8), (20 * n, 0, 0)), "question": f"what is {n}?"}
        for n in range(count)
    ]
    model.task_dict["toy"] = {"test": docs}

    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        content = [
            {"type": "image", "url": doc["image"]},
            {"type": "text", "text": doc["question"]},
        ]
        return [{"role": "user", "content": content}]

    options = {"max_new_tokens": 6, "until": ["\n\n"], "do_sample": False}
    return [
        Instance(
            request_type="generate_until",
            arguments=(docs[n]["question"], messages, options, n, "toy", "test"),
            idx=0,
            metadata={"task": "toy", "doc_id": n, "repeats": 1},
        )
        for n in range(count)
    ]


def test_it_answers_as_the_assistant_does_in_order(checkpoint: Path) -> None:
    model = Mipha(str(checkpoint), batch_size=2)
    asked = requests(model, 5)
    assistant = load(checkpoint)
    docs = model.task_dict["toy"]["test"]
    expected = [
        assistant.answer(doc["image"], doc["question"], max_new_tokens=6).text.partition("\n\n")[0]
        for doc in docs
    ]
    assert model.generate_until(asked) == expected


def test_what_it_cannot_do_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="not temperature"):
        Mipha(str(checkpoint), temperature=1)
    model = Mipha(str(checkpoint))
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    (request,) = requests(model, 1)
    request.args[2].update(do_sample=True, temperature=0.7)
    with pytest.raises(ValueError, match="asks for sampling"):
        model.generate_until([request])


def test_the_manifest_names_the_class() -> None:
    assert (
        manifest.model_id == "mipha"
        and manifest.chat_class_path == f"{Mipha.__module__}.{Mipha.__name__}"
    )
