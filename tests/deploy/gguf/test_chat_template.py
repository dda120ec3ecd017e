"""Our templates under llama.cpp's rules, and what Ollama is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mipha.deploy.gguf.chat_template import gguf_template
from mipha.deploy.gguf.modelfile import modelfile
from mipha.deploy.parts import Part
from mipha.models.processing import load_template

MARK = "<__media_Xy12__>"
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.fixture(scope="module")
def tokenizer(tiny_parts: Callable):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_parts("gemma").language_model)


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama-3", "phi-3", "vicuna"])
def test_the_mark_stands_where_the_picture_stood(tokenizer, name: str) -> None:
    template = load_template(name, tokenizer)
    theirs = gguf_template(template, tokenizer)
    assert "generation -%}" not in theirs.replace("add_generation_prompt -%}", "")

    def render(template: str, *messages: dict) -> str:
        return tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=True, tokenize=False
        )

    words, picture = {"type": "text", "text": 'What\'s "it"?'}, {"type": "image"}
    later = ({"role": "assistant", "content": "a cat"}, {"role": "user", "content": "Sure?"})
    for before in ((), (SYSTEM,)):
        own = render(template, *before, {"role": "user", "content": [picture, words]}, *later)
        assert own.count("<image>\n") == 1 and own.startswith("<bos>")
        # llama.cpp makes one text of a message with a picture; builds before 2026 hand over its parts
        for content in (MARK + words["text"], [{"type": "media_marker", "text": MARK}, words]):
            assert render(
                theirs, *before, {"role": "user", "content": content}, *later
            ) == own.replace("<image>", MARK)
        plain = ({"role": "user", "content": "Is a __> b?"}, *later)
        assert render(theirs, *before, *plain) == render(template, *before, *plain)


def test_a_template_without_pictures_is_refused(tokenizer) -> None:
    template = "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="writes no <image> for a part of type image"):
        gguf_template(template, tokenizer)


def test_a_template_that_counts_pictures_is_refused(tokenizer) -> None:
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}{{ loop.index }}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"in a way that llama\.cpp cannot be told"):
        gguf_template(template, tokenizer)


def test_ollama_is_told_the_same(tokenizer) -> None:
    parts = [
        Part("vision tower", "siglip-base-224", "x/y", "Apache-2.0", ""),
        Part("language model", "mine", None, None, ""),
    ]
    told = modelfile(
        "model-q8_0.gguf",
        "mmproj-f16.gguf",
        tokenizer,
        load_template("vicuna", tokenizer),
        [2, 0],
        parts,
    )
    assert told.startswith('FROM ./model-q8_0.gguf\nFROM ./mmproj-f16.gguf\nTEMPLATE """')
    assert (
        '{{ if eq $last "" }}A chat between a curious user' in told and "<bos>" not in told
    )  # Ollama puts it in front
    assert (
        "{{ else }}<|im_end|>USER: {{ end }}" in told
        and "{{ .Content }}{{ end }} ASSISTANT:{{ else }} {{ .Content }}" in told
    )
    assert (
        "{{ slice .Content 0 7 }}\n{{ slice .Content 7 }}" in told
    )  # a new line behind the picture
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n' in told
    assert told.endswith(
        'LICENSE """vision tower (siglip-base-224): Apache-2.0; language model (mine): not known"""\n'
    )


def test_a_system_turn_that_the_template_refuses_is_left_out(tokenizer) -> None:
    template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        + (
            "{% if message.content is string %}[{{ message.content }}]{% else %}"
            "{% for part in message.content %}{{ part.text or '<image>' }}{% endfor %}{% endif %}{% endfor %}"
        )
    )
    told = modelfile("a", "b", tokenizer, template, [], [])
    assert (
        '{{ if eq .Role "system" }}{{ else if eq .Role "user" }}{{ if eq $last "" }}[{{ else if eq $last "system" }}[{{ else }}]['
        in told
    )
