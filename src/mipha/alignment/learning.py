"""One step of RLHF: responses are sampled and scored, advantages made of the scores, policy and critics moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mipha.alignment.advantages import combined_advantages, generalized_advantages, token_rewards
from mipha.alignment.critic import Critic
from mipha.alignment.policy import Policy
from mipha.alignment.ppo import chosen_log_probs, entropy, policy_loss, value_loss
from mipha.alignment.recipe import RlhfRecipe
from mipha.alignment.rollout import Rollout

ScoreFunction = Callable[[list[list[int]], list[list[int]]], Tensor]
"""Prompts' and responses' token ids, the ends of turns included -> `(samples,)`."""

_STREAMS = ("reward", "cost")


@dataclass
class Experience:
    """A rollout and all that is learned from it; tensors are `(samples, tokens)` unless said otherwise.

    Args:
        scores: `(samples,)` of the reward and, where it has a price, of the cost.
        old_values, returns: Of the critic of each of these.
        policy_inputs, critic_inputs: As of `Observation`.
    """

    rollout: Rollout
    scores: dict[str, Tensor]
    log_probs: Tensor
    log_ratio: Tensor
    entropy: Tensor
    policy_inputs: Tensor | None
    critic_inputs: Tensor
    old_values: dict[str, Tensor] = field(default_factory=dict)
    returns: dict[str, Tensor] = field(default_factory=dict)
    advantages: Tensor | None = None


class Learner:
    """Policy, critics and their optimizer.

    Args:
        policy: With nothing switched on to train yet.
        with_cost: Whether there is a cost critic.
    """

    def __init__(
        self, policy: Policy, recipe: RlhfRecipe, with_cost: bool, autocast: torch.dtype | None
    ) -> None:
        self.policy, self._recipe, self._autocast = policy, recipe, autocast
        self.device = policy.model.device
        self.critics = {
            name: Critic(policy.start, recipe.critic_layers) for name in _STREAMS[: 1 + with_cost]
        }
        groups = {"policy": policy.prepare_training()} | {
            name: critic.trained(name) for name, critic in self.critics.items()
        }
        self.trained: dict[str, nn.Parameter] = {
            name: weight for group in groups.values() for name, weight in group.items()
        }
        peaks = {name: recipe.critic_learning_rate for name in groups} | {
            "policy": recipe.learning_rate
        }
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(group.values()), "lr": peaks[name], "peak": peaks[name]}
                for name, group in groups.items()
            ],
            betas=(0.9, 0.95),  # of the reference program
            weight_decay=recipe.weight_decay,
        )

    def experience(self, rollout: Rollout, scores: dict[str, Tensor]) -> Experience:
        """Look at a rollout through policy, reference and critics, in micro-batches."""
        size, parts = self._recipe.micro_batch, []
        for start in range(0, len(rollout.ids), size):
            parts.append(self._look(rollout.rows(slice(start, start + size))))
        columns = [
            None if column[0] is None else torch.cat(column)
            for column in zip(*(part[:5] for part in parts), strict=True)
        ]
        experience = Experience(rollout, scores, *columns)
        experience.old_values = {
            name: torch.cat([part[5][name] for part in parts]) for name in self.critics
        }
        return experience

    @torch.no_grad()
    def _look(
        self, rollout: Rollout
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, dict[str, Tensor]]:
        with self._mixed():
            seen = self.policy.observe(rollout)
            logits = self.policy.logits(rollout.before(seen.policy)) / self._recipe.temperature
            log_probs, spread = chosen_log_probs(logits, rollout.responses), entropy(logits)
            logits = (
                self.policy.logits(rollout.before(seen.reference), of_reference=True)
                / self._recipe.temperature
            )
            log_ratio = (log_probs - chosen_log_probs(logits, rollout.responses)) * rollout.mask
            values = {
                name: self._values(critic, rollout, seen.critic_inputs)
                for name, critic in self.critics.items()
            }
        return log_probs, log_ratio, spread, seen.policy_inputs, seen.critic_inputs, values

    def assign(self, experience: Experience, multiplier: float) -> None:
        """Make advantages of the scores, at the multiplier's present value."""
        recipe, mask, advantages = self._recipe, experience.rollout.mask, {}
        for name, sign in zip(self.critics, (1, -1), strict=False):
            rewards = token_rewards(
                experience.scores[name],
                experience.log_ratio,
                mask,
                sign * recipe.kl_weight,
                recipe.score_clip,
            )
            advantages[name], experience.returns[name] = generalized_advantages(
                rewards, experience.old_values[name], mask, recipe.gae_gamma, recipe.gae_lambda
            )
        experience.advantages = combined_advantages(
            advantages["reward"], advantages.get("cost"), multiplier
        )

    def learn(
        self,
        experience: Experience,
        instructions: Sequence[list[tuple[list[int], list[int]]]],
        share: float,
    ) -> dict[str, float]:
        """Move policy and critics.

        Args:
            experience: With its advantages.
            instructions: For each optimizer step the prompt and response ids whose language-model loss is added; may be empty lists.
            share: Of the peak learning rates.

        Returns:
            Means over the tokens of the losses, and the share of tokens that the clip cut.

        Raises:
            FloatingPointError: A loss or gradient is not finite; nothing was moved by it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        recipe, sums = self._recipe, {}
        num = recipe.batch_size // recipe.minibatches
        starts = [
            start for _ in range(recipe.ppo_epochs) for start in range(0, recipe.batch_size, num)
        ]
        for start, texts in zip(starts, instructions, strict=True):
            losses = self._backward(experience, slice(start, start + num))
            if texts:
                losses["ptx_loss"] = self._backward_instructions(texts)
            norms = [
                nn.utils.clip_grad_norm_(group["params"], recipe.max_grad_norm or math.inf)
                for group in self.optimizer.param_groups
            ]
            bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
            if bad or not all(math.isfinite(norm) for norm in norms):
                self.optimizer.zero_grad(set_to_none=True)
                raise FloatingPointError(f"{bad or 'the norm of the gradient'} is not finite")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value / len(starts)
        return sums

    def _backward(self, experience: Experience, chosen: slice) -> dict[str, float]:
        recipe, sums = self._recipe, {}
        num_tokens = int(experience.rollout.mask[chosen].sum())
        for start in range(chosen.start, chosen.stop, recipe.micro_batch):
            rows = slice(start, start + recipe.micro_batch)
            rollout = experience.rollout.rows(rows)
            with self._mixed():
                inputs = (
                    None if experience.policy_inputs is None else experience.policy_inputs[rows]
                )
                hidden = rollout.before(self.policy.hidden(rollout, inputs))
                log_probs = chosen_log_probs(
                    self.policy.logits(hidden) / recipe.temperature, rollout.responses
                )
                loss, cut = policy_loss(
                    log_probs,
                    experience.log_probs[rows],
                    experience.advantages[rows],
                    rollout.mask,
                    recipe.clip,
                )
                losses = {"policy_loss": loss}
                for name, critic in self.critics.items():
                    values = self._values(critic, rollout, experience.critic_inputs[rows])
                    old, returns = experience.old_values[name][rows], experience.returns[name][rows]
                    losses[f"{name}_value_loss"] = value_loss(
                        values, old, returns, rollout.mask, recipe.value_clip
                    )
            (sum(losses.values()) / num_tokens).backward()
            for name, value in {**losses, "clip_fraction": cut}.items():
                sums[name] = sums.get(name, 0.0) + value.item() / num_tokens
        return sums

    def _backward_instructions(self, texts: list[tuple[list[int], list[int]]]) -> float:
        """The mean loss over all response tokens of some instructions, weighted, behind what is there of the gradient."""
        recipe, total = self._recipe, 0.0
        num_tokens = sum(len(response) for _, response in texts)
        for start in range(0, len(texts), recipe.micro_batch):
            rows = texts[start : start + recipe.micro_batch]
            lengths = torch.tensor(
                [len(prompt) + len(response) for prompt, response in rows], device=self.device
            )
            columns = torch.arange(int(lengths.max()), device=self.device)
            ids = torch.zeros(len(rows), len(columns), dtype=torch.long, device=self.device)
            for row, (prompt, response) in zip(ids, rows, strict=True):
                row[: len(prompt) + len(response)] = torch.tensor(
                    [*prompt, *response], device=self.device
                )
            starts = torch.tensor([len(prompt) for prompt, _ in rows], device=self.device)[:, None]
            spoken = ((columns >= starts) & (columns < lengths[:, None]))[:, 1:]
            with self._mixed():
                hidden = self.policy.run(
                    ids, (columns < lengths[:, None]).long(), columns.expand_as(ids)
                )
                logits = self.policy.logits(hidden[:, :-1][spoken])
                loss = -chosen_log_probs(logits[None], ids[:, 1:][spoken][None]).sum() / num_tokens
            (recipe.ptx_weight * loss).backward()
            total += loss.item()
        return total

    def _values(self, critic: Critic, rollout: Rollout, inputs: Tensor) -> Tensor:
        return rollout.before(critic(inputs, rollout.attention, rollout.positions)) * rollout.mask

    def _mixed(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self._autocast, enabled=self._autocast is not None
        )
