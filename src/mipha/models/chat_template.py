"""Chat templates: which content one is made for, and whether it marks what the assistant says.

    template --fit_template--> a template that takes text and content parts alike
             --end_of_turn--> the token that ends an answer
    template of a checkpoint --trainable_template--> the same with fixed arguments, or a refusal

A template may want content as text or as a list of parts. Both are tried on a conversation, and one
that wants text gets a preamble that turns parts into text. A template that does not mark every word
of the assistant, and nothing of the user, is refused with the reason. A checkpoint's own template
needs no marks where `answer_spans` can tell exactly what the assistant writes.

A template is a stranger's program, which `mipha.rendering` keeps within bounds.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mipha.answer_spans import NoMask, answer_spans, has_marks, renderer, supervise
from mipha.rendering import FAILURES, bounded, check_length, lost_words

IMAGE_TOKEN = "<image>"

PARTS_TO_TEXT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message.content is string -%}
    {%- set flat.messages = flat.messages + [message] -%}
  {%- else -%}
    {%- set flat.text = '' -%}
    {%- for part in message.content -%}
      {%- set flat.text = flat.text + ('<image>\\n' if part.type == 'image' else part.text) -%}
    {%- endfor -%}
    {%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
"""Stands before a template that is made for text, and gives it the parts as text."""

_QUESTIONS = ("Which shape is that, please?", "Is it red?")
_ANSWERS = ("That is a green circle.", "No, as I said.")


_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}\n"
"""Stands before a template that writes today's date: the same conversation is the same text."""

_ARGUMENTS = (
    "",
    "{%- set enable_thinking = false -%}\n",
    "{%- set thinking = false -%}\n",
)
"""Arguments that are tried, in this order; the first that gives an exact mask stays."""


class _Written(NamedTuple):
    """What a template makes of the conversation.

    Args:
        text: All that it writes.
        stretches: Texts of the stretches of tokens that it marks, in order.
        prompt: Text of the conversation without its last answer, ready to be answered.
    """

    text: str
    stretches: tuple[str, ...]
    prompt: str


def fit_template(
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    image_token: str = IMAGE_TOKEN,
) -> str:
    """Return a template that takes messages with content parts, whatever it is made for.

    One that writes today's date writes a fixed one.

    Args:
        template: Chat template with `{% generation %}` blocks.
        tokenizer: Tokenizer of the language model.
        source: Name of the template, for messages.
        image_token: Placeholder that it writes for an image.

    Raises:
        ValueError: With neither content the assistant's words arrive between the marks, or it
            takes too long.
    """
    template, reasons = _with_fixed_date(template), []
    for candidate in template_forms(template, image_token):
        with bounded(template, f"chat template {source}"):
            reason = _fault_of(candidate, tokenizer, image_token)
        if reason is None:
            return candidate
        reasons.append(reason)
    raise ValueError(
        f"chat template {source} cannot be used: with content parts {reasons[0]}; with text "
        f"{reasons[1]}; choose another model.chat_template, for example vicuna"
        if reasons[0] != reasons[1]
        else f"chat template {source} cannot be used: {reasons[0]}; "
        "choose another model.chat_template, for example vicuna"
    )


def trainable_template(
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[str],
    source: str,
    image_token: str = IMAGE_TOKEN,
) -> str:
    """Return a checkpoint's template with the arguments for which its answers can be masked.

    They are set in front of the template, so that whatever serves the checkpoint writes alike.

    Args:
        template: Chat template, with or without marks.
        tokenizer: Tokenizer of the checkpoint.
        ends: Texts of the tokens that stop generation.
        source: Name of the template, for messages.
        image_token: Placeholder that the template writes for an image.

    Raises:
        ValueError: No argument gives an exact mask.
    """
    if has_marks(template):
        return fit_template(template, tokenizer, source, image_token)
    template = _with_fixed_date(template)

    # A template that writes earlier answers otherwise is exact for one answer at a time. There, no
    # thinking is tried first, so that a prompt and what is trained agree on it.
    forms = template_forms(template, image_token)
    wholes = [(form, arguments, False) for form in forms for arguments in _ARGUMENTS]
    lasts = [(form, arguments, True) for form in forms for arguments in _ARGUMENTS[::-1]]
    reasons = []
    for form, arguments, only_last in [*wholes, *lasts]:
        with bounded(template, f"chat template {source}"):
            reason = _fault_of_spans(arguments + form, tokenizer, ends, image_token, only_last)
        if reason is None:
            return arguments + form
        reasons.append(reason)
    raise ValueError(
        f"chat template {source} cannot be trained on, because {reasons[0]}: "
        "set model.chat_template, for example to vicuna"
    )


def _with_fixed_date(template: str) -> str:
    is_fixed = _FIXED_DATE in template or "strftime_now" not in template
    return template if is_fixed else _FIXED_DATE + template


def _fault_of_spans(
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[str],
    image_token: str,
    only_last: bool,
) -> str | None:
    """Return why the answers of a conversation cannot be masked; None if they can."""
    render, messages = renderer(tokenizer, template), _conversation()
    try:
        wanted = [messages[:end] for end in (2, 4)] if only_last else [messages]
        for part in wanted:
            text, spans = answer_spans(render, part, ends, only_last)
            supervise(tokenizer, text, spans)
    except NoMask as error:
        return str(error)
    except FAILURES as error:
        return f"it fails ({' '.join(str(error).split())[:120]})"

    for words in (*_QUESTIONS, *_ANSWERS, image_token):
        if text.count(words) != 1:
            return f"it writes {words!r} {text.count(words)} times, and not once"
    return None


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """Return the id of the token that ends the assistant's turn: the last special one it marks.

    White space after it is marked by some templates, and ends nothing.

    Raises:
        ValueError: The turn does not end in a special token, so no answer would ever end.
    """
    if not has_marks(template):
        return _end_behind(tokenizer, template)

    texts = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in texts]
    try:
        encoded = _encode(parts, template, tokenizer)
    except (TemplateError, TypeError):  # it is made for text
        encoded = _encode(texts, template, tokenizer)
    marked = [
        token
        for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if mask
    ]
    while marked and not _is_special(marked[-1], tokenizer):
        if tokenizer.decode(marked[-1:]).strip():
            break
        marked.pop()
    if not marked or not _is_special(marked[-1], tokenizer):
        last = tokenizer.decode(marked[-1:])
        raise ValueError(
            f"the chat template ends an answer in {last!r}, which is no special token of this "
            "language model, so no answer would end: use another model.chat_template, for example "
            "vicuna"
        )
    return marked[-1]


def _end_behind(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """Return the special token that a template without marks writes behind an answer.

    Raises:
        ValueError: There is none, or the template writes no conversation.
    """
    messages, reason = _conversation()[:2], None
    for form in (template, PARTS_TO_TEXT + template):
        try:
            text = renderer(tokenizer, form)(messages, False)
        except FAILURES as error:
            reason = reason or f"fails ({' '.join(str(error).split())[:120]})"
            continue
        lost = lost_words(messages, text)
        if lost is None:
            break
        reason = reason or lost
    else:
        raise ValueError(f"the chat template {reason}: use another model.chat_template")
    behind = text.partition(_ANSWERS[0])[2]
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"]
    closing = []
    for token in ids:
        if not _is_special(token, tokenizer):
            break
        closing.append(token)
    if not closing:
        raise ValueError(
            f"the chat template writes {behind[:24]!r} behind an answer, which is no special token "
            "of this language model, so no answer would end: use another model.chat_template, for "
            "example vicuna"
        )
    return tokenizer.eos_token_id if tokenizer.eos_token_id in closing else closing[0]


def template_forms(template: str, image_token: str) -> list[str]:
    """Return a template as it is, for content parts, and with the preamble, for text."""
    return [template, PARTS_TO_TEXT.replace(IMAGE_TOKEN, image_token) + template]


def _fault_of(
    template: str, tokenizer: PreTrainedTokenizerBase, image_token: str = IMAGE_TOKEN
) -> str | None:
    """Return what is wrong with what a template writes for messages with parts; None if nothing."""
    try:
        written = _write(template, tokenizer)
    except FAILURES as error:
        return f"it fails ({' '.join(str(error).split())[:120]})"

    # The words must be there, each once, and the image once.
    if "'type':" in written.text or '"type":' in written.text:
        return "it writes the parts of a message as a list, not their words"
    for words in (*_QUESTIONS, *_ANSWERS):
        if written.text.count(words) != 1:
            times = written.text.count(words)
            return f"it writes {words!r} {times} times, and not once"
    if written.text.count(image_token) != 1:
        times = written.text.count(image_token)
        return f"it writes {image_token} {times} times for an image, and not once"

    # Each answer must be one marked stretch, and no question in one.
    if len(written.stretches) != len(_ANSWERS):
        return f"it marks {len(written.stretches)} stretches of tokens for {len(_ANSWERS)} answers"
    for stretch, answer in zip(written.stretches, _ANSWERS, strict=True):
        if answer not in stretch:
            return f"it marks {stretch!r} where the answer is {answer!r}"
        if any(words in stretch for words in _QUESTIONS):
            return "it marks words of the user"

    # A prompt must go on as the conversation does, and all that follows it must be marked.
    if not written.text.startswith(written.prompt):
        there = written.text[: len(written.prompt)]
        return f"a prompt ends in {written.prompt[-24:]!r} where {there[-24:]!r} is trained on"
    behind, marked = written.text[len(written.prompt) :], written.stretches[-1].rstrip()
    before_words = range(marked.index(_ANSWERS[-1]) + 1)
    if not any(behind.startswith(marked[place:]) for place in before_words):
        return f"a prompt is followed by {behind[:24]!r}, of which it marks {marked[:24]!r}"
    return None


def _conversation() -> list[dict[str, Any]]:
    """Return two turns about an image, with content parts."""
    messages: list[dict[str, Any]] = []
    for question, answer in zip(_QUESTIONS, _ANSWERS, strict=True):
        image = [{"type": "image"}] if not messages else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _write(template: str, tokenizer: PreTrainedTokenizerBase) -> _Written:
    """Write the conversation, and decode the stretches that the template marks."""
    messages = _conversation()
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    check_length(text, "the template")
    encoded = _encode(messages, template, tokenizer)
    ids, marks = encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]

    starts = [place for place, mark in enumerate(marks) if mark and not any(marks[:place][-1:])]
    ends = [
        place + 1 for place, mark in enumerate(marks) if mark and not any(marks[place + 1 :][:1])
    ]
    prompt = tokenizer.apply_chat_template(
        messages[:-1], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    return _Written(
        text=text,
        stretches=tuple(
            tokenizer.decode(ids[start:end]) for start, end in zip(starts, ends, strict=True)
        ),
        prompt=prompt,
    )


def _encode(
    messages: list[dict[str, Any]], template: str, tokenizer: PreTrainedTokenizerBase
) -> Any:
    return tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )


def _is_special(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    added = tokenizer.added_tokens_decoder
    return token in tokenizer.all_special_ids or (token in added and added[token].special)
