"""The chat template as llama.cpp renders it: pictures come to it as marks in the text, and `generation` means nothing to it.

Source: llama.cpp `common/chat.cpp` (`to_json_oaicompat`: a message with media becomes one text, the mark right before the next
part) and `tools/server/server-common.cpp` (`get_media_marker`: `<__media_`, random letters, `__>`).
"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from mipha.models.processing import IMAGE_TOKEN

_MARK = "<__media__>"

_PRELUDE = """\
{%- set marked = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set words = namespace(text='') -%}
  {%- if message.content is string -%}{%- set words.text = message.content -%}
  {%- else -%}
    {%- for part in message.content -%}{%- set words.text = words.text + part.text -%}{%- endfor -%}
  {%- endif -%}
  {%- if '<__media_' in words.text -%}
    {%- set words.text = words.text | replace('<__media_', BEFORE + '<__media_') | replace('__>', '__>' + AFTER) -%}
  {%- endif -%}
  {%- set marked.messages = marked.messages + [{'role': message.role, 'content': words.text}] -%}
{%- endfor -%}
{%- set messages = marked.messages -%}
"""
"""Puts around each mark what the own template writes around a picture, and gives the template texts alone."""


def gguf_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A template that writes under llama.cpp what the checkpoint's own writes here, a picture's mark in place of its token.

    What the own template writes around a picture is found by rendering it.

    Args:
        template: With `generation` blocks; a picture is a part of type `image`.

    Raises:
        ValueError: What it writes around a picture is not the same for all pictures.
    """
    plain = re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", r"{#\1 \3#}", template)
    before, after = _around(template, tokenizer)
    rendered = _PRELUDE.replace("BEFORE", _quoted(before)).replace("AFTER", _quoted(after)) + plain
    for conversation in _CONVERSATIONS:
        own = _render(template, tokenizer, conversation).replace(IMAGE_TOKEN, _MARK)
        if _render(rendered, tokenizer, _as_marked(conversation)) != own:
            raise ValueError(
                "the chat template writes pictures in a way that llama.cpp cannot be told: write them as the templates of mipha do, "
                "one placeholder and what follows it, wherever they stand"
            )
    return rendered


_PICTURE = {"type": "image"}
_CONVERSATIONS = (
    [{"role": "user", "content": [{"type": "text", "text": "A?"}]}],
    [{"role": "user", "content": [_PICTURE, {"type": "text", "text": "A?"}]}],
    [
        {"role": "user", "content": [_PICTURE, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b."}]},
        {"role": "user", "content": [{"type": "text", "text": "C?"}]},
    ],
)


def _around(template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What stands before and after a picture's token, inside a message."""
    texts = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
    rendered = _render(
        template, tokenizer, [{"role": "user", "content": [texts[0], _PICTURE, texts[1]]}]
    )
    found = re.search(f"first(.*){re.escape(IMAGE_TOKEN)}(.*)second", rendered, flags=re.DOTALL)
    if not found:
        raise ValueError(
            f"the chat template writes no {IMAGE_TOKEN} for a part of type image: give the checkpoint a template that does"
        )
    return found[1], found[2]


def _as_marked(conversation: list[dict]) -> list[dict]:
    """The conversation as llama.cpp hands it to a template."""
    return [
        {
            "role": message["role"],
            "content": "".join(
                _MARK if part is _PICTURE else part["text"] for part in message["content"]
            ),
        }
        for message in conversation
    ]


def _render(template: str, tokenizer: PreTrainedTokenizerBase, conversation: list[dict]) -> str:
    ends_with_answer = conversation[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        conversation,
        chat_template=template,
        add_generation_prompt=not ends_with_answer,
        tokenize=False,
    )


def _quoted(text: str) -> str:
    """A Jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
