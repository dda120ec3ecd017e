"""The instruct models' templates, letter by letter, and their trained tokens.

The other templates are tested in tests/data/test_encode.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from mipha.preflight import CHAT_TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE = {"type": "image"}
CHAT = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [IMAGE, {"type": "text", "text": "Which shape?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A circle."}]},
    {"role": "user", "content": "Red?"},
    {"role": "assistant", "content": "no"},
]
# Source: the chat templates published with gemma-3-1b-it, Llama-3.2-1B-Instruct (without its dates)
# and Phi-3-mini-4k-instruct.
WRITTEN = {
    "gemma": (
        "<start_of_turn>user\nBe brief.\n\n<image>\nWhich shape?<end_of_turn>\n"
        "<start_of_turn>model\n[A circle.<end_of_turn>]\n"
        "<start_of_turn>user\nRed?<end_of_turn>\n"
        "<start_of_turn>model\n[no<end_of_turn>]\n",
        "<start_of_turn>model\n",
    ),
    "llama-3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhich shape?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[A circle.<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\nRed?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[no<|eot_id|>]",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "phi-3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\n<image>\nWhich shape?<|end|>\n"
        "<|assistant|>\n[A circle.<|end|>]\n"
        "<|user|>\nRed?<|end|>\n<|assistant|>\n[no<|end|>]\n",
        "<|assistant|>\n",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_parts: Callable) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_parts("gemma").language_model)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_text_and_what_is_trained_on(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    template = (CHAT_TEMPLATES / f"{name}.jinja").read_text()
    marked, prompt = WRITTEN[name]
    assert tokenizer.apply_chat_template(
        CHAT, chat_template=template, tokenize=False
    ) == marked.replace("[", "").replace("]", "")
    made = tokenizer.apply_chat_template(
        CHAT,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    trained = [
        token
        for token, mask in zip(made["input_ids"], made["assistant_masks"], strict=True)
        if mask
    ]
    assert tokenizer.decode(trained) == "".join(
        piece.partition("]")[0] for piece in marked.split("[")[1:]
    )
    waiting = tokenizer.apply_chat_template(
        CHAT[:2], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert waiting == marked.partition("[")[0] and waiting.endswith(prompt)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_tokenizer_that_begins_with_a_bos_gets_it_once(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    from mipha.models.processing import load_template

    text = tokenizer.apply_chat_template(
        CHAT, chat_template=load_template(name, tokenizer), tokenize=False
    )
    assert text.startswith("<bos><") and text.count("<bos>") == 1
