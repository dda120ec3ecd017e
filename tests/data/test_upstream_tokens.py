"""Upstream's token ids and labels bit for bit, and our own labels, which never lose a sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mipha.data.encode import IGNORE, encode, encode_conversation
from mipha.data.sample import IMAGE, Message, Sample

UPSTREAM = Path(__file__).parents[1] / "fixtures" / "upstream"
GOLDEN: dict[str, dict[str, Any]] = json.loads(
    (UPSTREAM / "golden_tokens.json").read_text(encoding="utf-8")
)
END = "<|endoftext|>"
Conversation = list[dict[str, str]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(UPSTREAM / "toy_codegen_tokenizer")


def talk(*texts: str) -> Conversation:
    return [
        {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
    ]


def said(tokenizer: PreTrainedTokenizerBase, labels: np.ndarray) -> str:
    return tokenizer.decode(labels[labels != IGNORE])


@pytest.mark.parametrize("name", GOLDEN)
def test_upstream_bit_for_bit(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    golden = GOLDEN[name]
    ids, labels = encode_conversation(
        golden["conversations"], tokenizer, template=name.split("/")[0], compat="upstream"
    )
    assert ids.tolist() == golden["input_ids"]
    assert labels.tolist() == golden["labels"]


@pytest.mark.parametrize("name", GOLDEN)
def test_ours_is_the_same_or_better(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    golden = GOLDEN[name]
    ids, labels = encode_conversation(
        golden["conversations"], tokenizer, template=name.split("/")[0]
    )
    if any(label != IGNORE for label in golden["labels"]):
        assert (ids.tolist(), labels.tolist()) == (golden["input_ids"], golden["labels"])
    else:  # upstream lost the sample
        answer = golden["conversations"][1]["value"]
        assert said(tokenizer, labels) == f" {answer}{END}"


WORDS = st.lists(
    st.sampled_from(
        [
            " ",
            "  ",
            "\n",
            "\t",
            "a cat",
            "yes",
            ".",
            ":",
            "USER",
            "ASSISTANT:",
            "é",
            "猫",
            "🙂",
            "7",
        ]
    ),
    min_size=1,
    max_size=6,
).map("".join)


@settings(max_examples=80)
@given(texts=st.lists(WORDS, min_size=2, max_size=6), image=st.booleans())
def test_ours_is_upstreams_wherever_upstream_counts_right(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], image: bool
) -> None:
    conversation = talk(*texts[: len(texts) // 2 * 2])
    if image:
        conversation[0]["value"] = f"{IMAGE}\n{conversation[0]['value']}"
    ids, labels = encode_conversation(conversation, tokenizer, compat="upstream")
    ours = encode_conversation(conversation, tokenizer)
    assert np.array_equal(ids, ours[0])
    if (labels != IGNORE).any() and "ASSISTANT:" not in "".join(
        texts
    ):  # else it may count right and mask the wrong words
        assert np.array_equal(labels, ours[1])
    assert said(tokenizer, ours[1]) == "".join(
        f" {turn['value']}{END}" for turn in conversation[1::2]
    )


def test_what_upstream_loses_and_ours_does_not(tokenizer: PreTrainedTokenizerBase) -> None:
    """Source: what upstream was seen to do with such samples."""
    for conversation, answers in (
        (talk("Is it?", ""), f" {END}"),
        (talk("What is an ASSISTANT: here?", "ok"), f" ok{END}"),
        (talk(f"Say {END} now", "ok"), f" ok{END}"),
        (talk("Hi", "Hello", "more"), f" Hello{END}"),
    ):
        _, labels = encode_conversation(conversation, tokenizer, compat="upstream")
        assert (labels == IGNORE).all()
        assert said(tokenizer, encode_conversation(conversation, tokenizer)[1]) == answers


def test_an_empty_answer_in_the_middle(tokenizer: PreTrainedTokenizerBase) -> None:
    """Upstream writes no end behind it, so two turns run into one; the others are trained on."""
    conversation = talk("a", "b", "c", "", "d", "e")
    ids, labels = encode_conversation(conversation, tokenizer, compat="upstream")
    assert tokenizer.decode(ids).endswith(
        f"USER: a ASSISTANT: b{END}USER: c ASSISTANT:USER: d ASSISTANT: e{END}"
    )
    assert said(tokenizer, labels) == f" b{END} e{END}"
    ids, labels = encode_conversation(conversation, tokenizer)
    assert tokenizer.decode(ids).endswith(f"USER: c ASSISTANT: {END}USER: d ASSISTANT: e{END}")
    assert said(tokenizer, labels) == f" b{END} {END} e{END}"


def test_only_text_is_cut_and_only_by_upstream(tokenizer: PreTrainedTokenizerBase) -> None:
    long = "cat " * 3000
    for conversation, trained in ((talk("a", long), True), (talk(long, "a"), False)):
        ids, labels = encode_conversation(conversation, tokenizer, compat="upstream")
        assert len(ids) == 2048 and END not in tokenizer.decode(ids)
        assert (labels != IGNORE).any() == trained
        assert said(tokenizer, encode_conversation(conversation, tokenizer)[1]).endswith(END)
    ids, labels = encode_conversation(talk(f"{IMAGE}\na", long), tokenizer, compat="upstream")
    assert len(ids) > 2048 and labels[-1] == tokenizer.eos_token_id
    short = AutoTokenizer.from_pretrained(UPSTREAM / "toy_codegen_tokenizer", model_max_length=60)
    assert len(encode_conversation(talk("a", long), short, compat="upstream")[0]) == 60


def test_an_image_in_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    conversation = talk("draw", f"here {IMAGE}")
    ids, labels = encode_conversation(conversation, tokenizer, compat="upstream")
    assert labels[ids == -200].tolist() == [-200], (
        "its label is overwritten when the image is put in"
    )
    ids, labels = encode_conversation(conversation, tokenizer)
    assert labels[ids == -200].tolist() == [IGNORE]


def test_a_tokenizer_that_begins_with_bos(tiny_model: Callable) -> None:
    """Gemma: one BOS at the front, also where an image splits the text; answers are trained on."""
    tokenizer = tiny_model("gemma", chat_template="vicuna")[1].tokenizer
    conversation = talk(f"{IMAGE}\nWhat is it?", "A red circle.", "Sure?", "yes")
    for compat in ("upstream", None):
        ids, labels = encode_conversation(conversation, tokenizer, compat=compat)
        assert ids[0] == tokenizer.bos_token_id and labels[0] == IGNORE
        assert (ids == tokenizer.bos_token_id).sum() == (ids == -200).sum() == 1
        assert said(tokenizer, labels) == " A red circle.<|im_end|> yes<|im_end|>"
        ids, labels = encode_conversation(
            talk(IMAGE, "a cat"), tokenizer, template="plain", compat=compat
        )
        assert ids[:2].tolist() == [tokenizer.bos_token_id, -200]
        assert labels.tolist() == [
            IGNORE,
            IGNORE,
            *tokenizer("a cat\n", add_special_tokens=False)["input_ids"],
        ]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_ours_is_what_training_sees(tiny_model: Callable, family: str) -> None:
    """The same text as the `vicuna` chat template writes, with the image not yet expanded."""
    processor = tiny_model(family, chat_template="vicuna")[1]
    texts = (f"{IMAGE}\nWhat is it?", "A red circle.", "Sure?", "yes")
    messages = [
        Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)
    ]
    wanted = encode(Sample("s", tuple(messages), (Path("a.png"),)), processor, 1000)
    ids, labels = encode_conversation(talk(*texts), processor.tokenizer)
    repeats = np.where(ids == -200, 4, 1)
    assert np.array_equal(
        np.repeat(np.where(ids == -200, processor.image_token_id, ids), repeats), wanted.input_ids
    )
    assert np.array_equal(np.repeat(labels, repeats), wanted.labels)


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        ([], {}, "the turns are by nobody"),
        ([{"from": "system", "value": "a"}], {}, "turn 0: wanted"),
        ([{"from": "human", "value": None}], {}, "turn 0: wanted"),
        (
            [*talk("a"), *talk("b")],
            {},
            "the turns are by human, human: wanted human and gpt in turn",
        ),
        (talk("a"), {}, "no question of the conversation is answered"),
        (
            talk("a", "b"),
            {"template": "plain"},
            "2 turns: the plain template wants two, the first with <image>",
        ),
        (talk("a", "b"), {"template": "chatml"}, "template='chatml'"),
        (talk("a", "b"), {"compat": "llava"}, "compat='llava'"),
    ],
)
def test_what_is_no_conversation_is_named(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode_conversation(conversation, tokenizer, **options)
