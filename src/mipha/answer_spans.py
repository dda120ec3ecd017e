"""Which tokens of a conversation the assistant writes, for a chat template without marks.

    template, messages --answer_spans--> text and a span of characters for each answer
    text, spans --supervise--> token ids and a mask of those in a span

A template with `{% generation %}` marks says itself what is trained on. For any other, the places
of the answers are found by writing the conversation again with another text in place of each
answer. What comes out is exactly what `generate` would write: from the end of the prompt through
the token that ends the turn. Where this cannot be told, there is a reason instead of a mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

Render = Callable[[Sequence[dict[str, Any]], bool], str]
"""Writes messages as text; the second argument says whether an answer is to follow."""

Span = tuple[int, int]


class NoMask(ValueError):
    """The answers in a text cannot be told from the rest; the message is the reason."""


def renderer(tokenizer: Any, template: str) -> Render:
    """Return the function that writes messages with a chat template of a tokenizer."""

    def render(messages: Sequence[dict[str, Any]], prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=prompt, tokenize=False
        )

    return render


def has_marks(template: str) -> bool:
    """Return whether a chat template marks what the assistant says."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def answer_spans(
    render: Render,
    messages: Sequence[dict[str, Any]],
    ends: Collection[str],
    only_last: bool = False,
) -> tuple[str, list[Span]]:
    """Write a conversation, and find what the assistant writes of it.

    Args:
        render: The chat template.
        messages: Conversation of roles and contents, an answer being a text or one part of text.
        ends: Texts of the tokens that stop generation.
        only_last: Look at the last answer alone: some templates write earlier ones otherwise.

    Returns:
        The text, and begin and end of each answer in characters.

    Raises:
        NoMask: Training on the answers would not teach what generation has to write.
    """
    # Write the conversation, and once more with a mark in place of each answer.
    places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    places = places[-1:] if only_last else places
    marks = {place: f"\u2063{number}\u2064" for number, place in enumerate(places)}
    text = render(messages, False)
    marked = render(
        [
            message | {"content": _like(message["content"], marks[n])} if n in marks else message
            for n, message in enumerate(messages)
        ],
        False,
    )

    # Putting the answers back must give the same text, so their places are known.
    if any(marked.count(mark) != 1 for mark in marks.values()):
        raise NoMask("it does not write each answer once")
    answers = {place: _text_of(messages[place]["content"]) for place in places}
    pieces, starts = re.split("|".join(map(re.escape, marks.values())), marked), {}
    rebuilt = pieces[0]
    for place, piece in zip(places, pieces[1:], strict=True):
        starts[place] = len(rebuilt)
        rebuilt += answers[place] + piece
    if rebuilt != text:
        raise NoMask("it changes an answer by what it says")

    spans, additions = [], set()
    for place in places:
        # The model writes from the end of the prompt ...
        prompt = render(messages[:place], True)
        if not text[: starts[place]].startswith(prompt):
            pairs = enumerate(zip(prompt, text, strict=False))
            same = next((n for n, (a, b) in pairs if a != b), min(len(prompt), len(text)))
            raise NoMask(
                f"a prompt goes on {prompt[same : same + 24]!r} where a conversation has "
                f"{text[same : same + 24]!r}"
            )
        additions.add(text[len(prompt) : starts[place]])

        # ... through the token that ends its turn.
        behind = starts[place] + len(answers[place])
        behind += len(text[behind:]) - len(text[behind:].lstrip())
        found = [end for end in ends if end and text.startswith(end, behind)]
        if not found:
            raise NoMask(
                f"{text[behind : behind + 24]!r} follows an answer, "
                f"and generation stops at {', '.join(map(repr, sorted(ends)))}"
            )
        spans.append((len(prompt), behind + len(max(found, key=len))))
    if len(additions) > 1:
        raise NoMask("it begins the last answer otherwise than those before")
    return text, spans


def supervise(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise a text, and mark the tokens that lie in its spans.

    Args:
        tokenizer: Tokenizer that knows the place of its tokens in a text.
        text: Whole conversation.
        spans: Begin and end of each answer, in characters.

    Returns:
        Token ids and mask, both `(tokens,)`.

    Raises:
        NoMask: A token belongs to a prompt and to its answer.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)  # (tokens,)
    offsets = np.asarray(encoded["offset_mapping"]).reshape(-1, 2)  # (tokens, begin and end)
    mask = np.zeros(len(ids), dtype=bool)

    for begin, end in spans:
        for border in (begin, end):
            if ((offsets[:, 0] < border) & (border < offsets[:, 1])).any():
                raise NoMask(f"one token goes across {text[border - 8 : border + 8]!r}")
        prompt = tokenizer(text[:begin], add_special_tokens=False)["input_ids"]
        if not np.array_equal(ids[: len(prompt)], prompt):
            raise NoMask(f"the tokens of a prompt change with what follows {text[:begin][-16:]!r}")
        inside = (offsets[:, 0] >= begin) & (offsets[:, 1] <= end)
        inside[: len(prompt)] = False
        mask |= inside
    return ids, mask


def _like(content: Any, text: str) -> Any:
    """Return a text as a content of the same form."""
    return text if isinstance(content, str) else [{"type": "text", "text": text}]


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if len(content) > 1 or any(part["type"] != "text" for part in content):
        raise NoMask("an answer holds more than words")
    return "".join(part["text"] for part in content)
