"""Masks of published chat templates without marks, against ones that were written by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mipha.answer_spans import NoMask, answer_spans, has_marks, supervise

GOLDENS = json.loads(
    (Path(__file__).parent / "fixtures" / "chat_templates" / "goldens.json").read_text()
)


def template_of(golden: dict[str, Any]) -> str:
    """The text of a published template, which a package ships."""
    package, _, inside = golden["file"].partition("/")
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    content = (Path(found.submodule_search_locations[0]) / inside).read_bytes()
    if hashlib.sha256(content).hexdigest() != golden["sha256"]:
        pytest.skip(f"this version of {package} has another {inside}")
    return content.decode()


def renderer(template: str, golden: dict[str, Any]) -> Callable[[Sequence[Any], bool], str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages: Sequence[Any], prompt: bool) -> str:
        (text,), _ = render_jinja_template(
            [list(messages)],
            chat_template=template,
            add_generation_prompt=prompt,
            **golden["names"],
            **golden.get("arguments", {}),
        )
        return text

    return render


def byte_tokenizer(special: Sequence[str]) -> Any:
    """The tokenizer of the goldens: bytes, then the special tokens in order."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={sign: n for n, sign in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def runs(mask: np.ndarray) -> list[list[int]]:
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0))
    return edges.reshape(-1, 2).tolist()


def ends_of(golden: dict[str, Any]) -> set[str]:
    """The tokens that stop generation, as a checkpoint's generation config names them."""
    last = golden["texts"][-1]
    answer = last["conversation"][-1]["content"]
    answer = answer if isinstance(answer, str) else answer[0]["text"]
    return {golden["names"]["eos_token"], last["supervised"][-1].partition(answer)[2].strip()}


@pytest.mark.parametrize("golden", GOLDENS["goldens"], ids=lambda golden: golden["template"])
def test_a_mask_is_the_one_written_by_hand(golden: dict[str, Any]) -> None:
    template = template_of(golden)
    only_last = len(golden["texts"]) > 1

    for case in golden["texts"]:
        render = renderer(template, golden)
        text, spans = answer_spans(render, case["conversation"], ends_of(golden), only_last)
        assert text == case["text"]
        assert [text[begin:end] for begin, end in spans] == case["supervised"]

        ids, mask = supervise(byte_tokenizer(case["special_tokens"]), text, spans)
        assert ids.tolist() == case["input_ids"]
        assert runs(mask) == case["supervised_tokens"]


def test_templates_that_write_history_otherwise_are_refused_for_a_whole_conversation() -> None:
    (qwen,) = [golden for golden in GOLDENS["goldens"] if golden["template"] == "qwen3"]
    conversation = qwen["texts"][-1]["conversation"]
    with pytest.raises(NoMask, match="a prompt goes on '<think>"):
        answer_spans(renderer(template_of(qwen), qwen), conversation, ends_of(qwen))


@pytest.mark.parametrize("golden", GOLDENS["refused"], ids=lambda golden: golden["template"])
def test_a_template_whose_prompt_opens_a_thought_is_refused(golden: dict[str, Any]) -> None:
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    render = renderer(template_of(golden), golden)
    for only_last in (False, True):
        with pytest.raises(NoMask):
            answer_spans(render, conversation, {golden["names"]["eos_token"]}, only_last)


@pytest.mark.weights
def test_a_real_tokenizer_gives_the_published_mask() -> None:
    from transformers import AutoTokenizer

    from mipha.models.packaged import packaged_folder

    (golden,) = GOLDENS["real"]
    tokenizer = AutoTokenizer.from_pretrained(packaged_folder("smollm2-135m"))
    text = golden["text"]
    spans = [
        (begin, begin + len(written))
        for written in golden["supervised"]
        for begin in [text.index(written)]
    ]
    ids, mask = supervise(tokenizer, text, spans)
    assert ids.tolist() == golden["input_ids"]
    assert runs(mask) == golden["supervised_tokens"]


def plain(messages: Sequence[Any], prompt: bool, end: str = "</s>") -> str:
    """A template in Python, which trims nothing."""
    text = "".join(
        f"<{m['role']}>{m['content']}{end if m['role'] == 'assistant' else ''}" for m in messages
    )
    return text + ("<assistant>" if prompt else "")


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_equal_answers_and_answers_inside_questions_are_told_apart() -> None:
    text, spans = answer_spans(
        plain, talk("yes</s>", "yes", "say yes", "yes", "{{x}}", "{% no %}"), ["</s>"]
    )
    assert [text[a:b] for a, b in spans] == ["yes</s>", "yes</s>", "{% no %}</s>"]
    assert [text[:a].endswith("<assistant>") for a, _ in spans] == [True] * 3


@pytest.mark.parametrize(
    ("render", "reason"),
    [
        (lambda m, p: plain(m, p, end=""), "follows an answer, and generation stops at '</s>'"),
        (lambda m, p: plain(m, p).lower(), "changes an answer by what it says"),
        (lambda m, p: plain(m, p).replace("\u2063", ""), "does not write each answer once"),
        (lambda m, p: plain(m, p) + ("<think>" if p else ""), "a prompt goes on '<think>'"),
        (
            lambda m, p: plain(m, p).replace("<assistant>Two", "<assistant> Two"),
            "changes an answer by what it says",
        ),
    ],
)
def test_what_cannot_be_told_has_a_reason(render: Callable[..., str], reason: str) -> None:
    with pytest.raises(NoMask, match=reason):
        answer_spans(render, talk("Q", "One A", "Q2", "Two A"), ["</s>"])


def test_another_beginning_of_the_last_answer_is_refused() -> None:
    def render(messages: Sequence[Any], prompt: bool) -> str:
        *before, last = messages
        thought = "" if prompt else "<thought>"
        return plain(before, False) + plain([last], prompt).replace(
            "<assistant>", f"<assistant>{thought}"
        )

    with pytest.raises(NoMask, match="begins the last answer otherwise"):
        answer_spans(render, talk("Q", "A", "Q", "A"), ["</s>"])
    text, (span,) = answer_spans(render, talk("Q", "A", "Q", "A"), ["</s>"], only_last=True)
    assert text[slice(*span)] == "<thought>A</s>"


def test_a_token_across_a_border_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {sign: n for n, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet | {":H": 256}, merges=[(":", "H")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    with pytest.raises(NoMask, match="one token goes across 'A:Hi'"):
        supervise(tokenizer, "A:Hi", [(2, 4)])


def test_marks_are_seen_where_they_are_blocks() -> None:
    assert has_marks("{%- generation -%}x{% endgeneration %}")
    assert has_marks("{% generation %}")
    assert not has_marks("{% if add_generation_prompt %}generation{% endif %}")
