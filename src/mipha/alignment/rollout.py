"""Responses that a policy writes, and what in them counts.

    columns   0 ... width-1 | width ...
              pad pad P P P | R R E pad      P prompt, R response, E the token that ends its turn, pad whatever

What counts is told by lengths, never by what a token is: with many language models the padding is the token that ends a text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True)
class Rollout:
    """Prompts and their sampled responses.

    Args:
        ids: `(samples, width + tokens)` prompts padded on the left, responses on the right.
        attention: The same shape, 1 where a token is seen.
        mask: `(samples, tokens)` true for a response's tokens, the one that ends its turn included.
        ended: `(samples,)` whether the response ended its turn; else it was cut off at the most tokens.
        width: Columns of the prompts.
    """

    ids: Tensor
    attention: Tensor
    mask: Tensor
    ended: Tensor
    width: int

    @property
    def positions(self) -> Tensor:
        """`(samples, width + tokens)` each token's place in its own text."""
        return (self.attention.cumsum(1) - 1).clamp(min=0)

    @property
    def responses(self) -> Tensor:
        """`(samples, tokens)` ids of the responses, padded."""
        return self.ids[:, self.width :]

    def before(self, hidden: Tensor) -> Tensor:
        """What is known before each response token is written: `(samples, columns, ...)` -> `(samples, tokens, ...)`."""
        return hidden[:, self.width - 1 : -1]

    def prompt_ids(self) -> list[list[int]]:
        """Each prompt without padding."""
        sides = zip(
            self.ids[:, : self.width].tolist(),
            self.attention[:, : self.width].sum(1).tolist(),
            strict=True,
        )
        return [ids[len(ids) - length :] for ids, length in sides]

    def response_ids(self) -> list[list[int]]:
        """Each response without padding, with the token that ends its turn where it was written."""
        return [
            ids[:length]
            for ids, length in zip(self.responses.tolist(), self.mask.sum(1).tolist(), strict=True)
        ]

    def rows(self, chosen: slice) -> Rollout:
        """Some of the samples."""
        return Rollout(
            self.ids[chosen],
            self.attention[chosen],
            self.mask[chosen],
            self.ended[chosen],
            self.width,
        )


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    ends: Collection[int],
    pad_id: int,
    temperature: float | None = 1.0,
) -> Rollout:
    """Continue prompts; randomness is torch's own, so a seed set before decides it.

    Args:
        prompts: Ids of each, not empty.
        ends: Ids that end a turn.
        pad_id: What pads; may be one of `ends`.
        temperature: Null: always the most probable token.
    """
    device = model.device
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, device=device)
    attention = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        ids[number, width - len(prompt) :] = torch.tensor(prompt, device=device)
        attention[number, width - len(prompt) :] = 1
    # Everything that a checkpoint's own settings might bend is said: probabilities are to be those that are learned from.
    settings = (
        {"do_sample": False}
        if temperature is None
        else {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    )
    config = GenerationConfig(
        **settings,
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        eos_token_id=sorted(ends),
        pad_token_id=pad_id,
        use_cache=True,
    )
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        written = model.generate(ids, attention_mask=attention, generation_config=config)
    finally:
        model.generation_config = own
    return mark_responses(written, attention, ends)


def mark_responses(ids: Tensor, prompt_attention: Tensor, ends: Collection[int]) -> Rollout:
    """Find where each response ends: at its first token that ends a turn, or at the last column.

    Args:
        ids: `(samples, width + tokens)`.
        prompt_attention: `(samples, width)` 1 for a prompt's tokens.
        ends: Ids that end a turn.
    """
    width = prompt_attention.shape[1]
    is_end = torch.isin(ids[:, width:], torch.tensor(sorted(ends), device=ids.device))
    ended_before = is_end.cumsum(1) - is_end.long()
    mask = ended_before == 0
    return Rollout(ids, torch.cat([prompt_attention, mask.long()], 1), mask, is_end.any(1), width)
