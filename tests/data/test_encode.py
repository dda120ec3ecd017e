"""Token ids and labels: trained on is exactly what the assistant says and the end of its turn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaProcessor

from mipha.assistant import Assistant
from mipha.data.encode import IGNORE, blank, encode
from mipha.data.faults import RecordError
from mipha.data.sample import IMAGE, Message, Sample
from mipha.geometry import geometry_of

PICTURE = Path("a.png")
TEMPLATES = pytest.mark.parametrize("template", ["chatml", "vicuna"])
KINDS = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
"""A plain tokenizer, one of the host's own classes, and one that puts a BOS before every text."""

# Words, and what tokenizers stumble over: white space at the ends, other scripts; not the markers
# of image and turn, which are no text.
pieces = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "red",
        " circle",
        "yes",
        "?",
        ".",
        ":",
        "USER: ",
        "é",
        "猫",
        "🙂",
    ]
)
words = st.lists(
    pieces
    | st.text(
        st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="<"),
        max_size=4,
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def assistants(tiny_model: Callable) -> Callable[[str, str], Assistant]:
    made: dict[tuple[str, str], Assistant] = {}

    def assistant(family: str, template: str) -> Assistant:
        if (family, template) not in made:
            made[family, template] = Assistant(*tiny_model(family, chat_template=template))
        return made[family, template]

    return assistant


@pytest.fixture
def processor(assistants: Callable) -> LlavaProcessor:
    return assistants("llama", "chatml").processor


def conversation(*turns: str, images: int = 0, system: str | None = None) -> Sample:
    """User and assistant in turn; images before the first question."""
    first, *rest = turns
    texts = [f"{IMAGE}\n" * images + first, *rest]
    messages = [
        Message("user" if number % 2 == 0 else "assistant", text)
        for number, text in enumerate(texts)
    ]
    return Sample(
        "s", (*([Message("system", system)] if system else []), *messages), (PICTURE,) * images
    )


def spans(labels: np.ndarray) -> list[list[int]]:
    """Runs of supervised tokens."""
    found: list[list[int]] = []
    for before, label in zip([IGNORE, *labels], labels, strict=False):
        if label != IGNORE:
            found = (
                [*found, [int(label)]]
                if before == IGNORE
                else [*found[:-1], [*found[-1], int(label)]]
            )
    return found


@TEMPLATES
@KINDS
@settings(max_examples=40)
@given(
    turns=st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0),
    images=st.integers(0, 2),
)
def test_labels_are_the_assistants_words_and_the_end_of_the_turn(
    assistants: Callable, family: str, template: str, turns: list[str], images: int
) -> None:
    processor = assistants(family, template).processor
    encoded = encode(conversation(*turns, images=images), processor, 4000)
    said = [processor.tokenizer.decode(span) for span in spans(encoded.labels)]
    space = " " if template == "vicuna" else ""
    assert said == [space + answer.strip() + "<|im_end|>" for answer in turns[1::2]]
    supervised = encoded.labels != IGNORE
    assert np.array_equal(encoded.labels[supervised], encoded.input_ids[supervised])


@TEMPLATES
@KINDS
@settings(max_examples=40)
@given(
    turns=st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0),
    images=st.integers(0, 2),
)
def test_the_prompt_is_what_training_began_with(
    assistants: Callable, family: str, template: str, turns: list[str], images: int
) -> None:
    """Token for token: a model asked as it was trained."""
    assistant = assistants(family, template)
    sample = conversation(*turns, images=images)
    encoded = encode(sample, assistant.processor, 4000)
    prompt = assistant.prompt_ids(sample.messages[:-1])
    assert prompt == encoded.input_ids[: len(prompt)].tolist()
    assert len(prompt) == int(np.flatnonzero(encoded.labels != IGNORE)[-1]) + 1 - len(
        spans(encoded.labels)[-1]
    )


@TEMPLATES
@KINDS
def test_the_template_is_written_as_its_source_writes_it(
    assistants: Callable, family: str, template: str
) -> None:
    processor = assistants(family, template).processor
    sample = conversation("What is it?", "A cat.", "Sure?", "yes", images=1)
    text = processor.tokenizer.decode(encode(sample, processor, 4000).input_ids).replace(
        IMAGE * 4, IMAGE
    )
    bos = "<bos>" if family == "gemma" else ""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    wanted = {
        "chatml": "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n",
        "vicuna": system
        + "USER: <image>\nWhat is it? ASSISTANT: A cat.<|im_end|>"
        + "USER: Sure? ASSISTANT: yes<|im_end|>",
    }
    assert text == bos + wanted[template]


@TEMPLATES
def test_a_system_turn_is_not_trained_on(assistants: Callable, template: str) -> None:
    processor = assistants("llama", template).processor
    encoded = encode(conversation("a?", "b", system="Be brief."), processor, 400)
    text = processor.tokenizer.decode(encoded.input_ids)
    assert "Be brief." in text and "A chat between" not in text
    assert "brief" not in processor.tokenizer.decode(
        [token for span in spans(encoded.labels) for token in span]
    )


@pytest.mark.parametrize("images", [0, 1, 3])
def test_each_image_takes_its_tokens(
    processor: LlavaProcessor, tower: str, tiny_model: Callable, images: int
) -> None:
    _, own = tiny_model("llama", tower)
    encoded = encode(conversation("What is it?", "A cat.", images=images), own, 400)
    per_image = {"vit": 16}.get(tower, 4)
    assert geometry_of(own).longest == per_image
    assert (encoded.input_ids == own.image_token_id).sum() == images * per_image
    assert encoded.images == (PICTURE,) * images
    assert (encoded.labels[encoded.input_ids == own.image_token_id] == IGNORE).all()


def test_text_around_an_image_stays_in_order(processor: LlavaProcessor) -> None:
    sample = Sample(
        "s",
        (Message("user", f"First {IMAGE} then {IMAGE}\nlast"), Message("assistant", "ok")),
        (PICTURE, PICTURE),
    )
    text = processor.tokenizer.decode(encode(sample, processor, 400).input_ids)
    assert text.startswith(
        "<|im_start|>user\nFirst " + IMAGE * 4 + "\n then " + IMAGE * 4 + "\nlast<|im_end|>"
    )


def test_an_image_that_the_assistant_shows_is_not_trained_on(processor: LlavaProcessor) -> None:
    sample = Sample(
        "s", (Message("user", "draw"), Message("assistant", f"here {IMAGE}\nit is")), (PICTURE,)
    )
    encoded = encode(sample, processor, 400)
    assert processor.image_token_id not in encoded.labels
    assert (encoded.labels != IGNORE).sum() >= 4


def test_nothing_to_learn_is_an_error(processor: LlavaProcessor) -> None:
    sample = conversation("a?", "")
    assert (
        processor.tokenizer.decode(
            [label for label in encode(sample, processor, 99).labels if label != IGNORE]
        )
        == "<|im_end|>"
    )
    with pytest.raises(
        ValueError,
        match="sample s: no token is trained on, because row_tokens=6 cuts its answer off; fix",
    ):
        encode(conversation("a long question, is it not?", "b"), processor, 6)


def test_an_image_that_does_not_fit_is_an_error(processor: LlavaProcessor) -> None:
    with pytest.raises(
        ValueError,
        match=r"sample s: through its 2 image\(s\) it takes 12 tokens of row_tokens=12; "
        "raise row_tokens",
    ):
        encode(conversation("a?", "b", images=2), processor, 12)


def test_a_marker_that_is_no_image_is_an_error(processor: LlavaProcessor) -> None:
    with pytest.raises(ValueError, match="sample s: 2 <image> markers for 1 images"):
        Sample("s", (Message("user", f"{IMAGE}\n{IMAGE}"), Message("assistant", "b")), (PICTURE,))
    with pytest.raises(ValueError, match="sample s: 0 <image> markers for 1 images"):
        Sample("s", (Message("user", "?"), Message("assistant", "b")), (PICTURE,))


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("for message in messages", "for message in messages if message.role != 'system'", "Hush."),
        ("for message in messages", "for message in messages[-4:]", "Hush."),
        ("part.text", "part.text.split('</think>')[-1]", "<think>hm</think>b"),
        ("'<image>\\n'", "'<image>\\n' if loop.first", "leaves images out"),
    ],
)
@pytest.mark.parametrize("has_marks", [True, False])
def test_what_a_template_leaves_out_is_an_error(
    processor: LlavaProcessor, old: str, new: str, wanted: str, has_marks: bool
) -> None:
    sample = conversation("a", "<think>hm</think>b", "c", "d", images=2, system="Hush.")
    changed = copy.copy(processor)
    changed.chat_template = processor.chat_template.replace(old, new)
    if not has_marks:
        for mark in ("generation", "endgeneration"):
            changed.chat_template = changed.chat_template.replace(f"{{%- {mark} -%}}", "")
        changed.turn_ends = ("<|im_end|>",)
    assert changed.chat_template != processor.chat_template
    if "think" in wanted and not has_marks:
        wanted = "changes an answer"
    with pytest.raises(RecordError, match=wanted):
        encode(sample, changed, 10_000)


@settings(max_examples=60)
@given(limit=st.integers(1, 60), images=st.integers(0, 3))
def test_truncation_cuts_text_and_never_an_image(
    assistants: Callable, limit: int, images: int
) -> None:
    processor = assistants("llama", "chatml").processor
    sample = conversation(
        "What is in it?", "A red circle is in the picture.", "Sure?", "yes", images=images
    )
    whole = encode(sample, processor, 1000)
    try:
        cut = encode(sample, processor, limit)
    except ValueError as error:
        assert "raise row_tokens" in str(error) or "cuts its answer off" in str(error)
        assert limit < len(whole)
        return
    assert len(cut) == min(limit, len(whole))
    assert cut.truncated == len(whole) - len(cut)
    assert np.array_equal(cut.input_ids, whole.input_ids[: len(cut)])
    assert np.array_equal(cut.labels, whole.labels[: len(cut)])
    assert (cut.input_ids == processor.image_token_id).sum() == 4 * images


@KINDS
def test_the_plain_prompt_is_images_then_the_caption(assistants: Callable, family: str) -> None:
    """Source: LLaVA's `preprocess_plain`: the caption and a newline are trained on, the user's
    words are dropped.
    """
    processor = assistants(family, "vicuna").processor
    encoded = encode(
        conversation("Describe it.", "A red circle.", images=1), processor, 100, prompt="plain"
    )
    bos = [processor.tokenizer.bos_token_id] if family == "gemma" else []
    caption = processor.tokenizer("A red circle.\n", add_special_tokens=False).input_ids
    assert encoded.input_ids.tolist() == bos + [processor.image_token_id] * 4 + caption
    assert encoded.labels.tolist() == [IGNORE] * (len(bos) + 4) + caption
    assert encoded.prefix == 0, (
        "its first word is predicted at the image's last token, which cannot be shared"
    )


def test_what_may_be_shared_ends_with_the_only_image(processor: LlavaProcessor) -> None:
    one = encode(conversation("a?", "b", images=1), processor, 100)
    assert one.input_ids[one.prefix - 1] == processor.image_token_id != one.input_ids[one.prefix]
    assert (one.labels[: one.prefix + 1] == IGNORE).all()
    assert encode(conversation("a?", "b", images=2), processor, 100).prefix == 0
    assert encode(conversation("a?", "b"), processor, 100).prefix == 0


def test_a_blank_has_an_image_and_nothing_to_learn(processor: LlavaProcessor) -> None:
    made = blank(processor, b"png")
    assert (made.labels == IGNORE).all() and made.images == (b"png",)
    assert (made.input_ids == processor.image_token_id).sum() == geometry_of(processor).longest


def test_half_a_character_is_named(processor: LlavaProcessor) -> None:
    sample = Sample("row 3", (Message("user", "which \ud83d?"), Message("assistant", "red")), ())
    with pytest.raises(
        ValueError,
        match=r"sample row 3: a text holds half of a character \(a lone surrogate\); remove it",
    ):
        encode(sample, processor, 200)


def _document(*places: str) -> Sample:
    text = "\n\n".join(places)
    return Sample("d", (Message("document", text),), (PICTURE,) * text.count(IMAGE))


@KINDS
@pytest.mark.parametrize(
    "places",
    [
        (IMAGE, "A.", "B."),
        ("Start.", IMAGE, IMAGE, "End."),
        ("One.\n\nTwo.", IMAGE),
        (IMAGE, "A.", IMAGE, "B.", IMAGE),
    ],
)
def test_labels_of_a_document_are_exactly_its_texts(
    assistants: Callable, family: str, places: tuple[str, ...]
) -> None:
    processor = assistants(family, "chatml").processor
    encoded = encode(_document(*places), processor, 4000)
    labels = encoded.labels[encoded.labels != IGNORE]
    assert labels[-1] == processor.tokenizer.eos_token_id
    said = processor.tokenizer.decode(labels[:-1])
    assert said == "\n\n".join(place for place in places if place != IMAGE)
    num_image_tokens = int((encoded.input_ids == processor.image_token_id).sum())
    assert num_image_tokens == len(encoded.images) * geometry_of(processor).longest
    plain = encode(_document(*places), processor, 4000, "plain")
    assert (plain.input_ids == encoded.input_ids).all()


def test_a_long_document_is_cut_between_places(processor: LlavaProcessor) -> None:
    sample = _document("One.", IMAGE, "Two.", IMAGE, "Three.")
    whole = encode(sample, processor, 4000)
    ends = np.flatnonzero(np.diff((whole.input_ids == processor.image_token_id).astype(int)) == -1)

    # A row that ends within the second image shows the first one only, and no end of text.
    cut = encode(sample, processor, int(ends[1]))
    assert len(cut.images) == 1 and processor.tokenizer.eos_token_id not in cut.labels
    said = processor.tokenizer.decode(cut.labels[cut.labels != IGNORE])
    assert said == "One.\n\nTwo.\n\n"
    assert cut.truncated == len(whole) - len(cut) > 0

    assert len(encode(_document("word " * 50), processor, 10)) == 10
    with pytest.raises(RecordError, match="its first image takes") as raised:
        encode(_document(IMAGE, "Two."), processor, 3)
    assert raised.value.kind == "too-many-images"
    with pytest.raises(RecordError, match="cuts its text off"):
        encode(_document(IMAGE, "Two."), processor, geometry_of(processor).longest + 3)


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_upstreams_limit_counts_an_image_as_one_token(
    num_images: int, assistants: Callable[[str, str], Assistant]
) -> None:
    """Source: Mipha `train.py`, DataCollator: `input_ids[:, :model_max_length]`, then splicing."""
    processor = assistants("llama", "vicuna").processor
    turns = (Message("user", IMAGE * num_images + "why?"), Message("assistant", "so " * 300))
    sample = Sample("s", turns, (PICTURE,) * num_images)
    cut = encode(sample, processor, 100, text_limit=True)
    assert len(cut) == 100 + num_images * (geometry_of(processor).longest - 1)
    whole = encode(sample, processor, 10_000)
    assert np.array_equal(cut.input_ids, whole.input_ids[: len(cut)])
    assert np.array_equal(cut.labels, whole.labels[: len(cut)])
    assert cut.truncated == len(whole) - len(cut)
