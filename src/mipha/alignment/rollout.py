"""Responses that a policy writes to prompts, which of their tokens count, and their scores.

    columns   0 ... width-1 | width ...
              pad pad P P P | R R E pad      P prompt, R response, E the token that ends its turn

Lengths say what counts, never a token's id: for many language models the padding is the token that
ends a text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

ScoreFunction = Callable[[list[list[int]], list[list[int]]], Tensor]
"""Token ids of prompts and of responses, with the ends of turns -> scores `(samples,)`."""

UnsafeRule = Callable[[str, str], bool]
"""Prompt and response -> whether the response is unsafe, judged by a rule."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that a policy is asked with.

    Args:
        id: File and row, for messages.
        text: Text of the user.
        ids: Token ids, up to where the assistant begins to speak.
    """

    id: str
    text: str
    ids: list[int]


@dataclass(frozen=True)
class Rollout:
    """Prompts and their sampled responses.

    Args:
        ids: Token ids `(samples, width + tokens)`, prompts padded on the left, responses on the
            right.
        attention: 1 where a token is seen, `(samples, width + tokens)`.
        mask: True for a response's tokens, with the one that ends its turn, `(samples, tokens)`.
        ended: Whether each response ended its turn, `(samples,)`; else it was cut off at the
            largest number of tokens.
        width: Number of columns of the prompts.
    """

    ids: Tensor
    attention: Tensor
    mask: Tensor
    ended: Tensor
    width: int

    @property
    def positions(self) -> Tensor:
        """Place of each token in its own text, `(samples, width + tokens)`."""
        return (self.attention.cumsum(1) - 1).clamp(min=0)

    @property
    def responses(self) -> Tensor:
        """Ids of the responses, padded, `(samples, tokens)`."""
        return self.ids[:, self.width :]

    def before(self, hidden: Tensor) -> Tensor:
        """Select the column before each response token: what is known when it is written.

        Args:
            hidden: Values `(samples, width + tokens, ...)`.

        Returns:
            Values `(samples, tokens, ...)`.
        """
        return hidden[:, self.width - 1 : -1]

    def prompt_ids(self) -> list[list[int]]:
        """Return each prompt without padding."""
        ids = self.ids[:, : self.width].tolist()
        lengths = self.attention[:, : self.width].sum(1).tolist()
        return [row[len(row) - length :] for row, length in zip(ids, lengths, strict=True)]

    def response_ids(self) -> list[list[int]]:
        """Return each response without padding, with the token that ends its turn."""
        ids, lengths = self.responses.tolist(), self.mask.sum(1).tolist()
        return [row[:length] for row, length in zip(ids, lengths, strict=True)]

    def rows(self, chosen: slice) -> Rollout:
        """Return some of the samples."""
        return Rollout(
            self.ids[chosen],
            self.attention[chosen],
            self.mask[chosen],
            self.ended[chosen],
            self.width,
        )


@dataclass(frozen=True)
class Sampler:
    """A language model and how it continues prompts.

    Args:
        model: Causal language model.
        max_new_tokens: Largest number of tokens of a response.
        ends: Ids that end a turn.
        pad_id: Id of the padding; may be one of `ends`.
        temperature: Temperature; None: always the most probable token.
    """

    model: PreTrainedModel
    max_new_tokens: int
    ends: Collection[int]
    pad_id: int
    temperature: float | None = 1.0

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]]) -> Rollout:
        """Continue prompts; the randomness is torch's own, so a seed that was set decides it.

        Args:
            prompts: Ids of each prompt, not empty.
        """
        # Pad the prompts on the left.
        device = self.model.device
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id, device=device)  # (samples, width)
        attention = torch.zeros_like(ids)
        for number, prompt in enumerate(prompts):
            ids[number, width - len(prompt) :] = torch.tensor(prompt, device=device)
            attention[number, width - len(prompt) :] = 1

        # Sample from the probabilities that are learned from: a checkpoint's own settings, which
        # could change them, are put aside.
        settings = {"do_sample": False}
        if self.temperature is not None:
            settings = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_k": 0,
                "top_p": 1.0,
            }
        config = GenerationConfig(
            **settings,
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=1.0,
            eos_token_id=sorted(self.ends),
            pad_token_id=self.pad_id,
            use_cache=True,
        )
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            written = self.model.generate(
                ids, attention_mask=attention, generation_config=config
            )  # (samples, width + tokens)
        finally:
            self.model.generation_config = own
        return mark_responses(written, attention, self.ends)


def mark_responses(ids: Tensor, prompt_attention: Tensor, ends: Collection[int]) -> Rollout:
    """Find where each response ends: at its first token that ends a turn, or at the last column.

    Args:
        ids: Token ids `(samples, width + tokens)`.
        prompt_attention: 1 for a prompt's tokens, `(samples, width)`.
        ends: Ids that end a turn.
    """
    width = prompt_attention.shape[1]
    is_end = torch.isin(ids[:, width:], torch.tensor(sorted(ends), device=ids.device))
    ended_before = is_end.cumsum(1) - is_end.long()  # (samples, tokens)
    mask = ended_before == 0
    attention = torch.cat([prompt_attention, mask.long()], 1)  # (samples, width + tokens)
    return Rollout(ids, attention, mask, is_end.any(1), width)


@dataclass(frozen=True)
class Judge:
    """Scores responses and measures them.

    Args:
        tokenizer: Tokenizer of the policy.
        functions: Function of each score, by name: `reward`, and perhaps `cost`.
        unsafe: Rule that judges independently of the cost; None: none.
    """

    tokenizer: PreTrainedTokenizerBase
    functions: dict[str, ScoreFunction]
    unsafe: UnsafeRule | None

    def score(
        self, prompts: Sequence[Prompt], rollout: Rollout, step: int
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Score a rollout.

        Args:
            prompts: Prompts of the rollout.
            rollout: Responses to them.
            step: Number of the step, for messages.

        Returns:
            Scores `(samples,)` by name, and means over the samples by name of the metric.

        Raises:
            FloatingPointError: A score is not finite; names the response and the prompt.
        """
        responses = rollout.response_ids()
        scores, means = {}, {}

        # Ask each score function.
        for name, function in self.functions.items():
            values = function([prompt.ids for prompt in prompts], responses)
            values = values.to(rollout.ids.device).float()  # (samples,)
            assert values.shape == (len(prompts),), (
                f"{name}: one score a sample, got {tuple(values.shape)}"
            )
            bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
            if bad:
                text = self.tokenizer.decode(responses[bad[0]])
                raise FloatingPointError(
                    f"step {step}: the {name} of the response {text[:100]!r} to "
                    f"{prompts[bad[0]].id} is {values[bad[0]].item()}; the states before it are "
                    f"intact: look at the {name} model"
                )
            scores[name], means[name] = values, values.mean().item()

        # Ask the rule.
        if self.unsafe is not None:
            texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
            flags = [
                self.unsafe(prompt.text, text) for prompt, text in zip(prompts, texts, strict=True)
            ]
            means["unsafe"] = sum(flags) / len(flags)

        # Measure the responses themselves.
        means["response_tokens"] = rollout.mask.sum(1).float().mean().item()
        means["ended"] = rollout.ended.float().mean().item()
        return scores, means
