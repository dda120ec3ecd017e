"""Reward and cost models: a language model with one number on top, trained on pairs of responses.

reward  the more helpful response scores higher
        L = -E log s(R_better - R_worse)                       + m E[R^2]
cost    the more harmful response scores higher, and a score above zero says unsafe
        L = -E log s(C_worse - C_safer)  - E log s(+-C)        + m E[C^2]

    load_preferences -> ranked_pairs -> collate_pairs -> RewardTrainer on `pair_loss` -> model/
    Scorer.load(model/).score(prompt ids, response ids) -> one number for each response

Source: Safe RLHF, arXiv:2310.12773, equations of the reward and the cost model; the mean square is
the regularization of its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from mipha.alignment.recipe import PreferenceRecipe
from mipha.alignment.step import in_held_folder, load_base, load_rows, record_base
from mipha.alignment.trl_trainer import begin, export, lora_config, train, trainer_options
from mipha.data.alignment import Preference, check_lengths, encode_exchange, load_preferences
from mipha.models.checkpoint_folder import load_weights, locate, reading
from mipha.models.language_model import end_tokens

if TYPE_CHECKING:
    from trl import RewardTrainer

PAD = "<|score_pad|>"


# The steps ---------------------------------------------------------------------------------------


def train_reward(recipe: PreferenceRecipe, out: Path) -> Path:
    """Train a reward model on which response is better; run again, it continues.

    Args:
        recipe: Recipe of the step.
        out: Folder, new or of this same recipe.

    Returns:
        The folder of a sequence classifier with one score, which stock transformers and
        `Scorer.load` read.

    Raises:
        ValueError, FileNotFoundError: Something that the user can fix, before the first step.
        FloatingPointError: A score, loss or gradient is not finite.
        MissingPackage: TRL is not installed.
    """
    return _train(recipe, out, "reward")


def train_cost(recipe: PreferenceRecipe, out: Path) -> Path:
    """Train a cost model on which response is safer and which are safe; else as `train_reward`.

    A score above zero says unsafe.
    """
    return _train(recipe, out, "cost")


@in_held_folder
def _train(recipe: PreferenceRecipe, out: Path, kind: str) -> Path:
    if recipe.step != kind:
        raise ValueError(
            f"recipe {recipe.name!r} is for the {recipe.step} step: run that, or set step={kind}"
        )
    step = begin(recipe, out)
    if step.is_finished:
        return step.model

    from datasets import Dataset
    from trl import RewardConfig

    # Load the data and the starting model.
    rows, held_out = load_rows(step, load_preferences)
    language_model, tokenizer = load_base(recipe)
    record_base(step, language_model)
    pairs, held_out_pairs = (
        ranked_pairs(tokenizer, part, kind, recipe.max_tokens) for part in (rows, held_out)
    )

    # Set up the trainer; head and adapters start from random numbers.
    config = RewardConfig(
        **trainer_options(step, validates=bool(held_out)),
        max_length=None,
        remove_unused_columns=False,
    )
    set_seed(recipe.seed)
    model = new_scorer(language_model, tokenizer, recipe.language_model)
    trainer = _trainer_class()(
        model,
        config,
        data_collator=lambda batch: collate_pairs(batch, tokenizer.pad_token_id),
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(held_out_pairs) if held_out_pairs else None,
        processing_class=tokenizer,
        peft_config=lora_config(recipe, model, "SEQ_CLS"),
    )
    trainer.regularization, trainer.signed = recipe.regularization, kind == "cost"

    # Train and export.
    train(trainer, step)
    return export(trainer, tokenizer, step)


# Pairs and their loss ----------------------------------------------------------------------------


def ranked_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Preference], kind: str, max_tokens: int
) -> list[dict[str, Any]]:
    """Return both responses of each row as ids, with the one that should score higher first.

    Args:
        kind: `reward`: the better response first. `cost`: the more harmful one.

    Returns:
        `chosen_ids`, `rejected_ids`, and `signs`: the sign that a cost of each should have.

    Raises:
        ValueError: A row does not fit; names it.
    """
    pairs, lengths = [], []
    for row in rows:
        first = row.better if kind == "reward" else 1 - row.safer
        order = (first, 1 - first)
        exchanges = [
            encode_exchange(tokenizer, row.prompt, row.responses[number], row.id)
            for number in order
        ]
        lengths += [(row.id, *exchange) for exchange in exchanges]

        higher, lower = (prompt + response for prompt, response in exchanges)
        signs = [-1.0 if row.safe[number] else 1.0 for number in order]
        pairs.append({"chosen_ids": higher, "rejected_ids": lower, "signs": signs})
    check_lengths(lengths, max_tokens)
    return pairs


def collate_pairs(pairs: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Return pairs as one batch: first all that should score higher, then the others.

    Returns:
        `input_ids` and `attention_mask` `(2 * pairs, tokens)`, padded on the right; `signs`
        `(2 * pairs,)`.
    """
    sequences = [pair[key] for key in ("chosen_ids", "rejected_ids") for pair in pairs]
    longest = max(map(len, sequences))
    padding = [longest - len(ids) for ids in sequences]
    return {
        "input_ids": torch.tensor(
            [[*ids, *[pad_id] * pads] for ids, pads in zip(sequences, padding, strict=True)]
        ),
        "attention_mask": torch.tensor(
            [[1] * (longest - pads) + [0] * pads for pads in padding],
        ),
        "signs": torch.tensor([pair["signs"][side] for side in (0, 1) for pair in pairs]),
    }


def pair_loss(
    higher: Tensor,
    lower: Tensor,
    regularization: float,
    higher_sign: Tensor | None = None,
    lower_sign: Tensor | None = None,
) -> Tensor:
    """Return the loss of some pairs, a scalar.

    Args:
        higher: Scores `(pairs,)` of the responses that should score higher: the better ones, or
            the more harmful ones.
        lower: Scores `(pairs,)` of the others.
        regularization: Weight of the mean square of all scores.
        higher_sign: Sign `(pairs,)` that each score should have: +1 for an unsafe response, -1 for
            a safe one; None: signs do not matter, as for a reward.
        lower_sign: Signs `(pairs,)` of the others.
    """
    loss = -logsigmoid(higher - lower).mean()
    if higher_sign is not None:
        loss = loss - (logsigmoid(higher_sign * higher) + logsigmoid(lower_sign * lower)).mean()
    return loss + regularization * torch.cat([higher, lower]).square().mean()


def measure_pairs(scores: Tensor, signs: Tensor | None) -> dict[str, float]:
    """Return how well scores rank their pairs.

    Args:
        scores: Scores `(2 * pairs,)`: first those that should be higher.
        signs: Sign `(2 * pairs,)` that each score should have, or None.

    Returns:
        accuracy: share of the pairs that are ranked right, equal scores never are. margin: mean
        difference. With signs, sign_accuracy: share of the responses on the right side of zero.
    """
    higher, lower = scores.chunk(2)
    measured = {
        "accuracy": (higher > lower).float().mean().item(),
        "margin": (higher - lower).mean().item(),
    }
    if signs is not None:
        measured["sign_accuracy"] = (scores * signs > 0).float().mean().item()
    return measured


def _trainer_class() -> type[RewardTrainer]:
    """Return TRL's trainer with the losses above; TRL is optional, so it is imported here."""
    from trl import RewardTrainer

    class PairTrainer(RewardTrainer):
        regularization: float
        signed: bool

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Tensor],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            # Score all responses.
            outputs = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            )
            scores = outputs.logits.squeeze(-1).float()  # (2 * pairs,)
            check_finite(scores.detach(), f"step {self.state.global_step + 1}, response")

            # Compare them.
            higher, lower = scores.chunk(2)  # (pairs,) each
            signs = inputs["signs"].chunk(2) if self.signed else (None, None)
            loss = pair_loss(higher, lower, self.regularization, *signs)

            # Report.
            measured = measure_pairs(scores.detach(), inputs["signs"] if self.signed else None)
            for name, value in measured.items():
                self._metrics["train"][name].append(value)
            return (loss, {"scores": scores.detach()}) if return_outputs else loss

        @torch.no_grad()
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            """Measure all held-out pairs at once.

            A mean of means over batches would give the last, shorter batch too much weight.
            """
            # Score the held-out pairs.
            self.model.eval()
            batches = []
            for inputs in self.get_eval_dataloader():
                _, outputs = self.compute_loss(self.model, inputs, return_outputs=True)
                batches.append((*outputs["scores"].chunk(2), *inputs["signs"].chunk(2)))
            self._metrics["train"].clear()

            # Measure them.
            higher, lower, *signs = (torch.cat(parts) for parts in zip(*batches, strict=True))
            signs = signs if self.signed else (None, None)
            metrics = {"loss": pair_loss(higher, lower, self.regularization, *signs).item()}
            metrics |= measure_pairs(
                torch.cat([higher, lower]), torch.cat(signs) if self.signed else None
            )

            # Report.
            logged = {f"eval_{name}": value for name, value in metrics.items()}
            self.log(logged)
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, logged
            )
            return logged

    return PairTrainer


# The model ---------------------------------------------------------------------------------------


def new_scorer(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> PreTrainedModel:
    """Return a sequence classifier with one score on a language model's decoder.

    The stock class reads the score at the last token that is not padding. Where padding is the
    token that ends a text, as with Phi, it would read the token before; so padding becomes a token
    of its own.

    Args:
        language_model: Model whose decoder is taken over, not copied.
        tokenizer: Tokenizer, which gets the padding token.
        name: Name of the language model, for messages.

    Returns:
        The classifier; its head is drawn from torch's current random state.

    Raises:
        ValueError: transformers has no such classifier for this kind of model.
    """
    config = language_model.config
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"language model {name!r} is a {config.model_type!r}, for which transformers has no "
            "sequence classifier: use another language model"
        )

    # Give padding a token of its own.
    ends = end_tokens(tokenizer, tokenizer.chat_template)
    if tokenizer.pad_token_id in (None, *ends):
        tokenizer.add_special_tokens({"pad_token": PAD})
        if tokenizer.pad_token_id >= config.vocab_size:
            language_model.resize_token_embeddings(
                tokenizer.pad_token_id + 1, pad_to_multiple_of=64, mean_resizing=False
            )
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id

    # Put the decoder into an empty classifier. On the meta device it needs no memory of its own.
    with torch.device("meta"):
        scorer = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    setattr(scorer, scorer.base_model_prefix, language_model.base_model)
    scorer.score = nn.Linear(config.hidden_size, 1, bias=False)
    nn.init.normal_(scorer.score.weight, std=getattr(config, "initializer_range", 0.02))
    return scorer


@dataclass
class Scorer:
    """A trained reward or cost model; get one with `Scorer.load`.

    Args:
        model: Classifier with one output for a sequence, in evaluation mode.
        pad_id: Id of the token after the shorter sequences of a batch.
        batch_size: Sequences in one forward pass.
    """

    model: PreTrainedModel
    pad_id: int
    batch_size: int = 16

    @classmethod
    def load(
        cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Scorer:
        """Load the `model/` folder of a reward or cost step.

        Raises:
            FileNotFoundError: The folder does not exist, or is not whole.
            ValueError: The model gives no single score, or some of its weights are missing: the
                folder may be a language model's.
        """
        path = locate(str(folder), str(folder), "reward or cost model", [])
        with reading(path, "reward or cost model", str(folder)):
            config = AutoConfig.from_pretrained(path)
            classes = "".join(config.architectures or ())
            if config.num_labels != 1 or "ForSequenceClassification" not in classes:
                raise ValueError(
                    f"{folder} gives no single score: "
                    "give the model/ folder of `mipha align reward` or `cost`"
                )
            model = load_weights(AutoModelForSequenceClassification, path, dtype)
        return cls(model.to(device).eval(), config.pad_token_id)

    @torch.no_grad()
    def score(self, prompt_ids: Sequence[list[int]], response_ids: Sequence[list[int]]) -> Tensor:
        """Return one number for each response.

        As in training, it is read at the response's last token: the end of the turn, where the
        policy reached it.

        Args:
            prompt_ids: Ids of each prompt without padding, as `encode_prompt` gives them.
            response_ids: Ids of each response without padding, with the token that ends the turn.

        Returns:
            Scores `(samples,)` float32, on the model's device.

        Raises:
            FloatingPointError: A score is not finite; names the sample.
        """
        samples = [
            [*prompt, *response] for prompt, response in zip(prompt_ids, response_ids, strict=True)
        ]
        scores = [
            self._score_batch(samples[start : start + self.batch_size])
            for start in range(0, len(samples), self.batch_size)
        ]
        joined = torch.cat(scores) if scores else torch.zeros(0)
        check_finite(joined, "sample")
        return joined

    def _score_batch(self, samples: list[list[int]]) -> Tensor:
        # Pad the samples on the right.
        lengths = torch.tensor([len(ids) for ids in samples])
        assert lengths.min() > 0, "a sample has no tokens"
        ids = torch.full((len(samples), int(lengths.max())), self.pad_id)  # (samples, tokens)
        for row, sample in zip(ids, samples, strict=True):
            row[: len(sample)] = torch.tensor(sample)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]  # (samples, tokens)

        # Read the score at each last token. A policy may write any token, padding too, so the
        # lengths say which is last, never the token's id.
        device = self.model.device
        hidden = self.model.base_model(
            ids.to(device), attention_mask=mask.long().to(device), use_cache=False
        ).last_hidden_state  # (samples, tokens, width)
        last = hidden[torch.arange(len(samples), device=device), (lengths - 1).to(device)]
        return self.model.score(last).squeeze(-1).float()  # (samples,)


def check_finite(scores: Tensor, what: str) -> None:
    """Reject scores that are not finite.

    Args:
        scores: Scores `(samples,)`.
        what: Name of a sample, for the message.

    Raises:
        FloatingPointError: A score is not finite; names the first.
    """
    bad = (~torch.isfinite(scores)).nonzero()
    if len(bad):
        number = int(bad[0])
        raise FloatingPointError(
            f"the score of {what} {number} of {len(scores)} is {scores[number].item()}, "
            f"and {len(bad)} are not finite: "
            "lower the learning_rate, or look at the model's weights"
        )
