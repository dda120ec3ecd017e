"""Reward and cost models: a language model's stack with one number on top, read on token ids at the end of the turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mipha.models.checkpoint_folder import load_weights, locate, reading
from mipha.models.language_model import end_of_turn

PAD = "<|score_pad|>"


@dataclass
class Scorer:
    """A trained reward or cost model; get one with `Scorer.load`.

    Args:
        model: With one output for a sequence, in evaluation mode.
        pad_id: The token behind shorter sequences of a batch.
        batch_size: Sequences in one forward pass.
    """

    model: PreTrainedModel
    pad_id: int
    batch_size: int = 16

    @classmethod
    def load(
        cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Scorer:
        """Read the `model/` folder of a reward or cost step.

        Raises:
            FileNotFoundError: It is not there, or not whole.
            ValueError: It gives no single score, or some of its weights are missing: it is a language model's folder, perhaps.
        """
        path = locate(str(folder), str(folder), "reward or cost model", [])
        with reading(path, "reward or cost model", str(folder)):
            config = AutoConfig.from_pretrained(path)
            if config.num_labels != 1 or "ForSequenceClassification" not in "".join(
                config.architectures or ()
            ):
                raise ValueError(
                    f"{folder} gives no single score: give the model/ folder of `mipha align reward` or `cost`"
                )
            model = load_weights(AutoModelForSequenceClassification, path, dtype)
        return cls(model.to(device).eval(), config.pad_token_id)

    @torch.no_grad()
    def score(self, prompt_ids: Sequence[list[int]], response_ids: Sequence[list[int]]) -> Tensor:
        """One number for each response, read at its last token: the end of the turn, where the policy reached it, as in training.

        Args:
            prompt_ids: Of each sample, without padding, as `encode_prompt` gives them.
            response_ids: Of each sample, without padding, with the token that ends the turn.

        Returns:
            `(samples,)` float32, on the model's device.

        Raises:
            FloatingPointError: A score is not finite; names the sample.
        """
        samples = [
            [*prompt, *response] for prompt, response in zip(prompt_ids, response_ids, strict=True)
        ]
        scores = [
            self._batch(samples[start : start + self.batch_size])
            for start in range(0, len(samples), self.batch_size)
        ]
        joined = torch.cat(scores) if scores else torch.zeros(0)
        check_finite(joined, "sample")
        return joined

    def _batch(self, samples: list[list[int]]) -> Tensor:
        lengths = torch.tensor([len(ids) for ids in samples])
        assert lengths.min() > 0, "a sample has no tokens"
        ids = torch.full((len(samples), int(lengths.max())), self.pad_id)
        for row, sample in zip(ids, samples, strict=True):
            row[: len(sample)] = torch.tensor(sample)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        device = self.model.device
        # By lengths, not by what the padding looks like: a policy may write any token, the padding too.
        hidden = self.model.base_model(
            ids.to(device), attention_mask=mask.long().to(device), use_cache=False
        ).last_hidden_state
        last = hidden[torch.arange(len(samples), device=device), (lengths - 1).to(device)]
        return self.model.score(last).squeeze(-1).float()


def check_finite(scores: Tensor, what: str) -> None:
    """Refuse scores that are no numbers.

    Args:
        scores: `(samples,)`.
        what: What is counted, for the message.

    Raises:
        FloatingPointError: Names the first.
    """
    bad = (~torch.isfinite(scores)).nonzero()
    if len(bad):
        number = int(bad[0])
        raise FloatingPointError(
            f"the score of {what} {number} of {len(scores)} is {scores[number].item()}, and {len(bad)} are not finite: "
            "lower the learning_rate, or look at the model's weights"
        )


def new_scorer(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> PreTrainedModel:
    """A sequence classifier of one score on a language model's stack, its new head drawn from the current random state.

    The stock class reads the score at the last token that is not padding. So where padding is the token that ends a text, as with
    Phi, it would read the token before: the padding becomes a token of its own.

    Args:
        language_model: Its stack is taken over, not copied.
        tokenizer: Is given the padding token.
        name: Of the language model, for messages.

    Raises:
        ValueError: The host has no such classifier for this kind of model.
    """
    config = language_model.config
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"language model {name!r} is a {config.model_type!r}, of which the host makes no classifier: use another"
        )
    ends = (None, tokenizer.eos_token_id, end_of_turn(tokenizer, tokenizer.chat_template))
    if tokenizer.pad_token_id in ends:
        tokenizer.add_special_tokens({"pad_token": PAD})
        if tokenizer.pad_token_id >= config.vocab_size:
            language_model.resize_token_embeddings(
                tokenizer.pad_token_id + 1, pad_to_multiple_of=64, mean_resizing=False
            )
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device(
        "meta"
    ):  # the stack is there already: no memory, no random start for what is thrown away
        scorer = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    setattr(scorer, scorer.base_model_prefix, language_model.base_model)
    scorer.score = nn.Linear(config.hidden_size, 1, bias=False)
    nn.init.normal_(scorer.score.weight, std=getattr(config, "initializer_range", 0.02))
    return scorer
