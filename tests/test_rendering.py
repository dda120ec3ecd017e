"""A chat template may not take more time or memory than a conversation needs."""

from __future__ import annotations

import re
import resource
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mipha import rendering
from mipha.rendering import bounded, lost_words, write_chat

QUESTION = [{"role": "user", "content": "Is it red?"}]

LARGE = {
    "a product": "{{ 'a' * 600000000 }}",
    "sums": "{% set n = namespace(s='a') %}{% for i in range(30) %}{% set n.s = n.s + n.s %}"
    "{% endfor %}{{ n.s }}",
    "joined": "{% set s = 'a' * 100000 %}{{ range(9000) | list | join(s) }}",
    "padding": "{{ 'a' | center(600000000) }}",
    "a format": "{{ '%600000000d' % 1 }}",
    "a list": "{{ ([0] * 100000000) | length }}",
    "replaced": "{% set s = 'a' * 30000 %}{{ s.replace('a', s) }}",
}
"""Templates that take some 600 MB or more, each in another way."""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux bounds memory")
@pytest.mark.parametrize("template", LARGE.values(), ids=LARGE)
def test_a_template_that_fills_the_memory_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the process has its usual limit behind it, as after a template that is none of these."""
    monkeypatch.setattr(rendering, "TEMPLATE_GIB", 0.25)
    usual = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match=r"^t\.jinja takes more than 0\.25 GiB to write"):
        write_chat(tokenizer, QUESTION, template, "t.jinja")
    assert write_chat(tokenizer, QUESTION, "{{ messages[0].content }}", "t") == "Is it red?"
    assert resource.getrlimit(resource.RLIMIT_AS) == usual


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux bounds memory")
def test_the_limit_ends_with_the_last_thread_that_renders() -> None:
    usual = resource.getrlimit(resource.RLIMIT_AS)
    inside, leave = threading.Event(), threading.Event()

    def render() -> None:
        with bounded("a", "t"):
            inside.set()
            leave.wait(60)

    other = threading.Thread(target=render)
    other.start()
    assert inside.wait(60)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    assert limit[0] != usual[0] and limit[1] == usual[1]
    with bounded("b", "t"):
        assert resource.getrlimit(resource.RLIMIT_AS) == limit
    assert resource.getrlimit(resource.RLIMIT_AS) == limit
    leave.set()
    other.join()
    assert resource.getrlimit(resource.RLIMIT_AS) == usual


def test_a_long_text_is_given_to_no_tokenizer(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "MOST_CHARACTERS", 10)
    assert len(write_chat(tokenizer, QUESTION, "{{ messages[0].content }}", "t")) == 10
    with pytest.raises(ValueError, match=r"^t writes a conversation of 11 characters, and at most"):
        write_chat(tokenizer, QUESTION, "{{ messages[0].content }}a", "t")


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ range(1000000000) | list }}", "{{ [1].x.y }}", "{{ 1 + 'a' }}"]
)
def test_a_template_that_fails_is_one_sentence(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    with pytest.raises(ValueError, match=r"^t cannot write a conversation: give"):
        write_chat(tokenizer, QUESTION, template, "t")


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "'Be brief.'"),
        ("{% for m in messages[-3:] %}{{ m.content }}{% endfor %}", "'Be brief.'"),
        ("{{ messages[0].content }}{{ messages[-1].content }}", "'Is it red?' of the user"),
    ],
)
def test_words_that_a_template_leaves_out_are_named(
    tokenizer: PreTrainedTokenizerFast, template: str, lost: str
) -> None:
    answer = {"role": "assistant", "content": "<think>hm</think>No"}
    chat = [{"role": "system", "content": "Be brief."}, *QUESTION, answer]
    chat += [{"role": "user", "content": "Blue?"}]
    with pytest.raises(ValueError, match=rf"^t\.jinja does not write {re.escape(lost)}"):
        write_chat(tokenizer, chat, template, "t.jinja")


def test_a_list_of_parts_is_not_its_words(tokenizer: PreTrainedTokenizerFast) -> None:
    part = {"type": "text", "text": "Is it red?"}
    with pytest.raises(ValueError, match=r"^t writes the parts of a message as a list"):
        write_chat(
            tokenizer, [{"role": "user", "content": [part]}], "{{ messages[0].content }}", "t"
        )
    said = [{"role": "user", "content": [part | {"text": str([part])}]}]
    assert write_chat(tokenizer, said, "{{ messages[0].content[0].text }}", "t") == str([part])


def test_a_template_may_change_spaces_and_leave_earlier_thinking_out() -> None:
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " a\n b "}]},
        {"role": "assistant", "content": "<think>hm</think>No"},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": ""}]},
    ]
    assert lost_words(chat, "Be brief.<image>a b <think> hm\n</think>\n\nNo") is None
    assert (
        lost_words(chat, "Be brief. a b No")
        == "does not write '<think>hm</think>No' of the assistant"
    )
    assert lost_words([chat[0], chat[0]], "a b") == "does not write ' a\\n b ' of the user"
