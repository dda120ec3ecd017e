"""Language models with sliding windows: longer prompts are asked alone, and are not packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from mipha.assistant import Assistant
from mipha.models.build import build
from mipha.recipe import Recipe
from mipha.training.pipeline import train
from tests.models.conftest import random_part  # noqa: F401  (a fixture)

WINDOW = 40


@pytest.fixture
def language_model(random_part: Callable[..., Path]) -> Path:  # noqa: F811
    return random_part("MistralForCausalLM", sliding_window=WINDOW, num_key_value_heads=2)


def test_batched_answers_equal_single_ones_and_a_chat_goes_on(
    tiny_parts: Callable, language_model: Path
) -> None:
    torch.manual_seed(0)
    recipe = (
        tiny_parts()
        .recipe()
        .model_copy(update={"language_model": str(language_model), "chat_template": "chatml"})
    )
    assistant = Assistant(*build(recipe))
    image = Image.effect_noise((28, 28), 80).convert("RGB")
    pairs = [
        (image, "what is it?"),
        (image, "what is in the picture? " * 8),
        (None, "is it red or blue or green? " * 6),
    ]

    together = assistant.answer_many(pairs, max_new_tokens=6)
    for (asked_image, question), answer in zip(pairs, together, strict=True):
        assert assistant.answer(asked_image, question, max_new_tokens=6) == answer

    chat = assistant.chat(image)
    first, second = (
        "".join(chat.ask(question, max_new_tokens=6))
        for question in ("what is it?", "which colour is it?")
    )
    assert (
        first.strip() == assistant.answer(image, "what is it?", max_new_tokens=6).text
        and len(chat.messages) == 4
    )
    assert isinstance(second, str)


def test_rows_longer_than_the_window_are_not_packed(
    tiny_run_recipe: Callable[..., Recipe], language_model: Path, tmp_path: Path
) -> None:
    recipe = tiny_run_recipe(
        f"model.language_model={language_model}",
        "model.chat_template=chatml",
        "stages.pretrain.batching=packed",
    )
    with pytest.raises(
        ValueError,
        match=rf"row_tokens=\d+ is more than the {WINDOW} tokens .*"
        rf"batching=padded, or row_tokens={WINDOW}",
    ):
        train(recipe, tmp_path / "run")
