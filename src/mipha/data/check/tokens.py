"""What a sample becomes in tokens: how many, how many of them are trained on, and what row_tokens cuts off."""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple

import numpy as np
from transformers import LlavaProcessor

from mipha.data.encode import IGNORE, encode
from mipha.data.sample import IMAGE, Sample
from mipha.recipe import StageRecipe

_UNCUT = 10**9
"""Tokens: more than any sample has."""


class TokenFacts(NamedTuple):
    """One encoded sample, without its tokens.

    Args:
        num_tokens: After image expansion, cut to row_tokens.
        num_trained: Of them, those that are trained on.
        num_uncut: Before cutting.
        prefix: Leading tokens that another sample about the image may share.
        prefix_key: Checksum of those tokens.
    """

    num_tokens: int
    num_trained: int
    num_uncut: int
    prefix: int
    prefix_key: int


def token_facts(
    sample: Sample, processor: LlavaProcessor, stage: StageRecipe
) -> tuple[TokenFacts | None, tuple[tuple[str, str], ...]]:
    """Encode a sample as training will.

    Returns:
        The facts, None where training could not encode it; and kind and description of all that is wrong.
    """
    try:
        whole = encode(sample, processor, _UNCUT, stage.prompt)
    except ValueError as error:
        kind = (
            "image-count" if "are given" in str(error) else "nothing-trained"
        )  # a template may leave images out
        return None, ((kind, _reason(error)),)
    if len(whole) <= stage.row_tokens:
        return _facts(whole.input_ids, whole.labels, len(whole), whole.prefix), ()
    image_positions = np.flatnonzero(whole.input_ids == processor.image_token_id)
    try:
        cut = encode(sample, processor, stage.row_tokens, stage.prompt)
    except ValueError as error:
        full = len(image_positions) and image_positions[-1] + 1 >= stage.row_tokens
        return None, (("too-many-images" if full else "nothing-trained", _reason(error)),)
    lost = _num_trained(whole.labels) - _num_trained(cut.labels)
    what = f"the sample has {len(whole):,} tokens of row_tokens={stage.row_tokens:,}, which cuts off {lost:,} trained ones"
    return _facts(cut.input_ids, cut.labels, len(whole), cut.prefix), (
        (("truncated-answer", what),) if lost else ()
    )


def special_tokens_of(processor: LlavaProcessor) -> re.Pattern[str]:
    """What the tokenizer takes for a control token when it stands in a text; the image marker is meant to be one."""
    tokens = {
        str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special
    } - {IMAGE}
    return re.compile(
        "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)"
    )


def _facts(ids: np.ndarray, labels: np.ndarray, num_uncut: int, prefix: int) -> TokenFacts:
    return TokenFacts(
        len(ids),
        _num_trained(labels),
        num_uncut,
        prefix,
        zlib.crc32(ids[:prefix].tobytes()) & 0x7FFFFFFF,
    )


def _num_trained(labels: np.ndarray) -> int:
    """The first token of a row is predicted by nothing."""
    return int((labels[1:] != IGNORE).sum())


def _reason(error: ValueError) -> str:
    """What `encode` says, without the sample before it and the advice behind it: a finding has its own."""
    return str(error).partition(": ")[2].partition("; ")[0].removesuffix(": raise row_tokens")
