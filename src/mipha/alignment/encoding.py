"""A prompt and its response as token ids: what is trained on, scored and continued is one and the same sequence.

    prompt ids    ... up to where the assistant begins to speak
    response ids  its words and the token that ends its turn

What a chat template writes behind the end of the turn is left out: no policy ever writes it, so no score may hang on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of a user's words, up to where the assistant begins to speak.

    Args:
        tokenizer: With a chat template.
    """
    messages = [{"role": "user", "content": prompt}]
    return list(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    )


def encode_exchange(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, where: str
) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the response with the end of its turn.

    Args:
        tokenizer: With a chat template that marks what is trained on.
        response: White space around it is dropped: a tokenizer would join it to the prompt's end.
        where: The row, for messages.

    Raises:
        ValueError: The template or the texts break the two apart otherwise than they are joined again: no policy would ever continue
            such a prompt.
    """
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response.strip()},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, spoken = np.asarray(encoded["input_ids"]), np.flatnonzero(encoded["assistant_masks"])
    start, end = (int(spoken[0]), int(spoken[-1]) + 1) if len(spoken) else (0, 0)
    if not len(spoken) or len(spoken) != end - start:
        raise ValueError(
            f"{where}: the chat template does not mark the response as one stretch of tokens: is its text part of a template?"
        )
    prompt_ids, response_ids = ids[:start].tolist(), ids[start:end].tolist()
    if prompt_ids != encode_prompt(tokenizer, prompt):
        raise ValueError(
            f"{where}: the tokenizer joins prompt and response, so they cannot be told apart: use another chat_template"
        )
    return prompt_ids, response_ids


def check_lengths(
    rows: Iterable[tuple[str, Sequence[int], Sequence[int]]], max_tokens: int
) -> None:
    """Refuse conversations that are too long, before the first step: cut off, a response would lose the end that is scored.

    Args:
        rows: Name, prompt ids and response ids of each.
        max_tokens: Of prompt and response together.

    Raises:
        ValueError: Names the longest row, its tokens and how many rows there are like it.
    """
    over = [
        (len(prompt) + len(response), where)
        for where, prompt, response in rows
        if len(prompt) + len(response) > max_tokens
    ]
    if over:
        longest, where = max(over)
        raise ValueError(
            f"{where} takes {longest} tokens, more than max_tokens={max_tokens}, so its response would be cut off "
            f"({len(over)} rows are too long, this one the longest): set max_tokens={longest}, or remove them"
        )
