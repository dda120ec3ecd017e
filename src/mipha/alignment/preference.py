"""Reward and cost models from pairs of responses, trained with TRL's RewardTrainer on the losses of Safe RLHF.

reward: the more helpful response scores higher                      L = -E log s(R_better - R_worse)                  + m E[R^2]
cost:   the more harmful one scores higher, and zero is the border   L = -E log s(C_worse - C_safer) - E log s(+-C)    + m E[C^2]

Source: Safe RLHF, arXiv:2310.12773, equations of the reward and the cost model; the mean square is the regularization of its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase, set_seed

from mipha.alignment.datasets import Preference, load_preferences
from mipha.alignment.encoding import check_lengths, encode_exchange
from mipha.alignment.host import (
    arguments,
    begin,
    export,
    load_part,
    load_rows,
    lora_config,
    record_base,
    train,
)
from mipha.alignment.recipe import PreferenceRecipe
from mipha.alignment.scoring import check_finite, new_scorer

if TYPE_CHECKING:
    from trl import RewardTrainer


def train_reward(recipe: PreferenceRecipe, out: Path) -> Path:
    """Train a reward model on which response is better; run again, it goes on where it stopped.

    Args:
        out: New, or the folder of this same recipe.

    Returns:
        The folder of a sequence classifier with one score, which stock transformers and `Scorer.load` read.

    Raises:
        ValueError, FileNotFoundError: Something the user can mend, said before the first step.
        FloatingPointError: A score, loss or gradient is not finite.
        ModuleNotFoundError: TRL is not installed.
    """
    return _train(recipe, out, "reward")


def train_cost(recipe: PreferenceRecipe, out: Path) -> Path:
    """Train a cost model on which response is safer and which are safe: a score above zero says unsafe. As `train_reward` otherwise."""
    return _train(recipe, out, "cost")


def pair_loss(
    higher: Tensor,
    lower: Tensor,
    regularization: float,
    higher_sign: Tensor | None = None,
    lower_sign: Tensor | None = None,
) -> Tensor:
    """The loss of some pairs.

    Args:
        higher: `(pairs,)` scores of the responses that should score higher: the better ones, or the more harmful ones.
        lower: `(pairs,)` scores of the others.
        regularization: Weight of the mean square of all scores.
        higher_sign: `(pairs,)` +1 where that response is unsafe, -1 where it is safe; null: signs do not matter, as for a reward.
        lower_sign: The same of the others.

    Returns:
        A scalar.
    """
    loss = -logsigmoid(higher - lower).mean()
    if higher_sign is not None:
        loss = loss - (logsigmoid(higher_sign * higher) + logsigmoid(lower_sign * lower)).mean()
    return loss + regularization * torch.cat([higher, lower]).square().mean()


def ranked_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Preference], step: str, max_tokens: int
) -> list[dict[str, Any]]:
    """Both responses of each row as ids, the one that should score higher first.

    Args:
        step: `reward`: the better response first. `cost`: the more harmful one, with the sign that each score should have.

    Raises:
        ValueError: A row does not fit; names it.
    """
    pairs, lengths = [], []
    for row in rows:
        first = row.better if step == "reward" else 1 - row.safer
        order = (first, 1 - first)
        exchanges = [
            encode_exchange(tokenizer, row.prompt, row.responses[number], row.id)
            for number in order
        ]
        lengths += [(row.id, *exchange) for exchange in exchanges]
        higher, lower = (prompt + response for prompt, response in exchanges)
        pairs.append(
            {
                "chosen_ids": higher,
                "rejected_ids": lower,
                "signs": [-1.0 if row.safe[number] else 1.0 for number in order],
            }
        )
    check_lengths(lengths, max_tokens)
    return pairs


def _train(recipe: PreferenceRecipe, out: Path, step: str) -> Path:
    if recipe.step != step:
        raise ValueError(
            f"recipe {recipe.name!r} is for the {recipe.step} step: run that, or set step={step}"
        )
    if begin(recipe, out):
        return out / "model"
    from datasets import Dataset
    from trl import RewardConfig

    rows, held_out = load_rows(recipe, out, load_preferences)
    language_model, tokenizer = load_part(recipe)
    record_base(recipe, out, language_model)
    train_pairs, held_out_pairs = (
        ranked_pairs(tokenizer, part, step, recipe.max_tokens) for part in (rows, held_out)
    )
    config = RewardConfig(
        **arguments(recipe, out, validates=bool(held_out)),
        max_length=None,
        remove_unused_columns=False,
    )
    set_seed(recipe.seed)  # the head's start, and the adapters'
    model = new_scorer(language_model, tokenizer, recipe.language_model)
    trainer = _trainer_class()(
        model,
        config,
        data_collator=lambda pairs: collate_pairs(pairs, tokenizer.pad_token_id),
        train_dataset=Dataset.from_list(train_pairs),
        eval_dataset=Dataset.from_list(held_out_pairs) if held_out_pairs else None,
        processing_class=tokenizer,
        peft_config=lora_config(recipe, model, "SEQ_CLS"),
    )
    trainer.regularization, trainer.signed = recipe.regularization, step == "cost"
    train(trainer, recipe, out)
    return export(trainer, tokenizer, out)


def collate_pairs(pairs: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Pairs as one batch: first all that should score higher, then the others.

    Returns:
        input_ids and attention_mask `(2 * pairs, tokens)`, padded on the right; signs `(2 * pairs,)`.
    """
    sequences = [pair[key] for key in ("chosen_ids", "rejected_ids") for pair in pairs]
    longest = max(map(len, sequences))
    return {
        "input_ids": torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in sequences]),
        "attention_mask": torch.tensor(
            [[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences]
        ),
        "signs": torch.tensor([pair["signs"][side] for side in (0, 1) for pair in pairs]),
    }


def _trainer_class() -> type[RewardTrainer]:
    """TRL's trainer with the losses above; made when used, for TRL is an extra."""
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
            scores = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            ).logits.squeeze(-1)
            scores = scores.float()
            check_finite(scores.detach(), f"step {self.state.global_step + 1}, response")
            higher, lower = scores.chunk(2)
            signs = inputs["signs"].chunk(2) if self.signed else (None, None)
            loss = pair_loss(higher, lower, self.regularization, *signs)
            for name, value in measure_pairs(
                scores.detach(), inputs["signs"] if self.signed else None
            ).items():
                self._metrics["train"][name].append(value)
            return (loss, {"scores": scores.detach()}) if return_outputs else loss

        @torch.no_grad()
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            """Over all held-out pairs at once: a mean of means over batches would weigh the last, shorter one too much."""
            self.model.eval()
            batches = []
            for inputs in self.get_eval_dataloader():
                _, outputs = self.compute_loss(self.model, inputs, return_outputs=True)
                batches.append((*outputs["scores"].chunk(2), *inputs["signs"].chunk(2)))
            self._metrics["train"].clear()
            higher, lower, *signs = (torch.cat(parts) for parts in zip(*batches, strict=True))
            signs = signs if self.signed else (None, None)
            metrics = {"loss": pair_loss(higher, lower, self.regularization, *signs).item()}
            metrics |= measure_pairs(
                torch.cat([higher, lower]), torch.cat(signs) if self.signed else None
            )
            logged = {f"eval_{name}": value for name, value in metrics.items()}
            self.log(logged)
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, logged
            )
            return logged

    return PairTrainer


def measure_pairs(scores: Tensor, signs: Tensor | None) -> dict[str, float]:
    """What the scores of some pairs get right.

    Args:
        scores: `(2 * pairs,)`: first those that should be higher.
        signs: `(2 * pairs,)` the sign that each should have, or null.

    Returns:
        accuracy: share of the pairs ranked right; equal scores rank nothing. margin: mean difference. sign_accuracy: share of the
        responses on the right side of zero, with signs.
    """
    higher, lower = scores.chunk(2)
    measured = {
        "accuracy": (higher > lower).float().mean().item(),
        "margin": (higher - lower).mean().item(),
    }
    if signs is not None:
        measured["sign_accuracy"] = (scores * signs > 0).float().mean().item()
    return measured
