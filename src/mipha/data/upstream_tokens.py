"""LLaVA conversations to token ids and labels, by the rules of Mipha's own training code.

There are two ways to make the mask of the same text:

    upstream  tokenise the text; tokenise each round once more to count what to mask; where the
              counts disagree, mask everything
    ours      remember where the answers stand in the text; tokenise once; train on each token of
              an answer

Nothing in this package calls it: it is for programs that compare with upstream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from mipha.data.sample import IMAGE
from mipha.labels import IGNORE

IMAGE_ID = -200
"""Stands for an image among token ids. Source: LLaVA and Mipha, constants.py."""

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
_ANSWER = " ASSISTANT: "
_MAX_TOKENS = 2048  # Source: finetune.sh of Mipha


class _Turn(NamedTuple):
    speaker: str
    text: str


def encode_conversation(
    conversation: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    template: Literal["v0", "plain"] = "v0",
    compat: Literal["upstream"] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise `[{"from": "human" or "gpt", "value": text}, ...]` with its loss mask.

    The image marker moves to the front of its turn, and several in a turn become one; a first turn
    that is not the human's is left out.

    Args:
        conversation: Turns of one record, as LLaVA publishes them.
        tokenizer: Tokenizer of the language model; where it begins texts with a BOS, Gemma's rules
            for the mask are taken.
        template: `v0` is the chat of Mipha and LLaVA-1.5; `plain` is an image, then the caption and
            a newline.
        compat: `upstream` gives upstream's ids and labels bit for bit, mistakes included: a sample
            is masked altogether when its rounds do not add up (an empty answer, " ASSISTANT: " or
            the end-of-turn token in a text), and one without an image is cut to the tokenizer's
            `model_max_length`, or 2,048 tokens. With None every answer is trained on through the
            token that ends it, nothing is cut, and a last question that nobody answers is left out.

    Returns:
        `input_ids` and `labels`, `(tokens,)` each; an image is one id -200, and -100 is the label
        of what is not trained on.

    Raises:
        ValueError: The record is not such a conversation, or a value of `template` or `compat` is
            unknown.

    Source: `preprocess_multimodal`, `preprocess_v0`, `preprocess_gemma_1`, `preprocess_plain` and
    `tokenizer_image_token` of Mipha 21dafbf.
    """
    if template not in ("v0", "plain") or compat not in ("upstream", None):
        raise ValueError(
            f"template={template!r} with compat={compat!r} is unknown: "
            "use v0 or plain, and upstream or None"
        )
    turns = [_turn(turn, number) for number, turn in enumerate(conversation)]
    if template == "plain":
        ids, labels = _plain(turns, tokenizer, keep_image_labels=compat == "upstream")
    else:
        turns = _alternating(turns)
        ids, labels = (
            _upstream(turns, tokenizer) if compat == "upstream" else _answers(turns, tokenizer)
        )
    return np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)


def _turn(turn: Mapping[str, str], number: int) -> _Turn:
    if turn.get("from") not in ("human", "gpt") or not isinstance(turn.get("value"), str):
        raise ValueError(
            f'turn {number}: wanted {{"from": "human" or "gpt", "value": text}}, '
            f"got {str(turn)[:80]}"
        )
    text = turn["value"]
    if IMAGE in text:
        text = f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()
    return _Turn(turn["from"], text)


def _alternating(turns: list[_Turn]) -> list[_Turn]:
    turns = turns[1:] if turns and turns[0].speaker != "human" else turns
    speakers = [turn.speaker for turn in turns]
    if not speakers or speakers != [
        ("human", "gpt")[number % 2] for number in range(len(speakers))
    ]:
        raise ValueError(
            f"the turns are by {', '.join(speakers) or 'nobody'}: wanted human and gpt in turn"
        )
    return turns


def _upstream(
    turns: list[_Turn], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Make upstream's text and its mask by counting: all -100 where the counts disagree."""
    eos, num_bos = tokenizer.eos_token, _num_bos(tokenizer)
    text = _SYSTEM
    for turn in turns:
        role, end = ("USER", " ") if turn.speaker == "human" else ("ASSISTANT", eos)
        text += (
            f"{role}: {turn.text}{end}" if turn.text else f"{role}:"
        )  # nothing said, nothing ended

    limit = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else _MAX_TOKENS
    ids = _split_tokens(text, tokenizer)
    ids = ids if IMAGE in text else ids[:limit]

    # Mask each question by its counted tokens.
    labels = list(ids)
    labels[:num_bos] = [IGNORE] * num_bos
    position = num_bos
    for round_text in text.split(eos):
        question, *answers = round_text.split(_ANSWER)
        if len(answers) != 1:
            break
        # Less the lone space at the end, which belongs to the answer's first token.
        num_question = len(_split_tokens(question + _ANSWER, tokenizer)) - 1 - num_bos
        labels[position : position + num_question] = [IGNORE] * len(
            labels[position : position + num_question]
        )
        position += len(_split_tokens(round_text, tokenizer)) + 1 - num_bos

    # Where the counts disagree, mask everything.
    labels[position:] = [IGNORE] * len(labels[position:])
    if position < limit and position != _num_tokens_as_upstream_counts(ids, text, tokenizer):
        labels = [IGNORE] * len(labels)
    return ids, labels


def _num_tokens_as_upstream_counts(
    ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Count the tokens that are not padding.

    Phi pads with the token that ends a turn, so upstream adds the ends back, counted in the text.
    """
    if _num_bos(tokenizer):
        return len(ids) - ids.count(tokenizer.pad_token_id)
    pad = tokenizer.eos_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    return len(ids) - ids.count(pad) + text.count(tokenizer.eos_token)


def _answers(turns: list[_Turn], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokenise the same text with every turn ended.

    What is trained on is known from where it was written, not by counting.
    """
    text, spans = _SYSTEM, []
    for question, answer in zip(turns[::2], turns[1::2], strict=False):
        text += f"USER: {question.text} ASSISTANT:"
        spans.append((len(text), len(text) + len(f" {answer.text}{tokenizer.eos_token}")))
        text += f" {answer.text}{tokenizer.eos_token}"
    if not spans:
        raise ValueError(
            "no question of the conversation is answered, so there is nothing to train on: "
            "remove the record"
        )

    ids: list[int] = []
    labels: list[int] = []
    start = 0
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            ids.append(IMAGE_ID)
            labels.append(IGNORE)
            start += len(IMAGE)
        encoded = tokenizer(piece, add_special_tokens=number == 0, return_offsets_mapping=True)
        for token, (first, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids.append(token)
            labels.append(
                token if any(begin <= start + first < end for begin, end in spans) else IGNORE
            )
        start += len(piece)
    return ids, labels


def _plain(
    turns: list[_Turn], tokenizer: PreTrainedTokenizerBase, keep_image_labels: bool
) -> tuple[list[int], list[int]]:
    if len(turns) != 2 or IMAGE not in turns[0].text:
        raise ValueError(
            f"{len(turns)} turns: the plain template wants two, "
            f"the first with {IMAGE}, and the caption"
        )
    ids = _split_tokens(f"{IMAGE}{turns[1].text}\n", tokenizer)
    num_head = len(_split_tokens(IMAGE, tokenizer))
    labels = [IGNORE] * num_head + ids[num_head:]
    return ids, labels if keep_image_labels else [
        IGNORE if label == IMAGE_ID else label for label in labels
    ]


def _split_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise the pieces around the image markers apart, and join them by -200.

    The first piece keeps its BOS, the others lose theirs.
    """
    pieces = [tokenizer(piece)["input_ids"] for piece in text.split(IMAGE)]
    num_bos = int(bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id)
    ids = pieces[0][:num_bos]
    for number, piece in enumerate(pieces):
        ids = [*ids, *([IMAGE_ID] if number else []), *piece[num_bos:]]
    return ids


def _num_bos(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(
        tokenizer.bos_token_id is not None
        and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    )
