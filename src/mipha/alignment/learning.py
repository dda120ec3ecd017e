"""One step of RLHF: the learning from a rollout.

rollout, scores --Learner.observe--> Experience --assign--> advantages, returns
Experience --learn--> one optimizer step per minibatch, for policy and critics together
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mipha.alignment.policy import Critic, Policy
from mipha.alignment.ppo import (
    chosen_log_probs,
    combined_advantages,
    entropy,
    generalized_advantages,
    policy_loss,
    token_rewards,
    value_loss,
)
from mipha.alignment.recipe import RlhfRecipe
from mipha.alignment.rollout import Rollout
from mipha.data.alignment import Exchange
from mipha.engine.optimizer import Group, make_adamw, set_learning_rates
from mipha.engine.precision import autocast


@dataclass(frozen=True)
class Experience:
    """A rollout and everything that is learned from it.

    Tensors are `(samples, tokens)` unless said otherwise.

    Args:
        rollout: Prompts and responses.
        scores: Scores `(samples,)` of the reward and, where it has a price, of the cost.
        log_probs: Log-probabilities of the response tokens under the policy.
        log_ratio: `log_probs` minus those under the reference; zero outside the mask.
        entropy: Entropy of the policy at each token, in nats.
        policy_inputs: Inputs of the policy's trained layers, `(samples, columns, width)`; None
            where there are no frozen layers below them.
        critic_inputs: Inputs of the critics' layers, `(samples, columns, width)`.
        old_values: Values of each critic before learning, by its name.
        returns: Values that each critic should predict, by its name.
        advantages: Advantages that the policy learns from; None before `Learner.assign`.
    """

    rollout: Rollout
    scores: dict[str, Tensor]
    log_probs: Tensor
    log_ratio: Tensor
    entropy: Tensor
    policy_inputs: Tensor | None
    critic_inputs: Tensor
    old_values: dict[str, Tensor]
    returns: dict[str, Tensor] = field(default_factory=dict)
    advantages: Tensor | None = None

    def rows(self, chosen: slice) -> Experience:
        """Return some of the samples."""

        def each(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor[chosen] for name, tensor in tensors.items()}

        return Experience(
            rollout=self.rollout.rows(chosen),
            scores=each(self.scores),
            log_probs=self.log_probs[chosen],
            log_ratio=self.log_ratio[chosen],
            entropy=self.entropy[chosen],
            policy_inputs=None if self.policy_inputs is None else self.policy_inputs[chosen],
            critic_inputs=self.critic_inputs[chosen],
            old_values=each(self.old_values),
            returns=each(self.returns),
            advantages=None if self.advantages is None else self.advantages[chosen],
        )

    def means(self) -> dict[str, float]:
        """Return the KL of a response and the entropy of a token, in nats."""
        mask = self.rollout.mask
        return {
            "kl": (self.log_ratio.sum() / len(mask)).item(),
            "entropy": ((self.entropy * mask).sum() / mask.sum()).item(),
        }


class Learner:
    """Policy, critics and their optimizer.

    Args:
        policy: Policy without trained weights yet.
        recipe: Recipe of the step.
        with_cost: Whether there is a critic of the cost too.
        dtype: Type of matrix products; None: that of the weights.
    """

    def __init__(
        self, policy: Policy, recipe: RlhfRecipe, with_cost: bool, dtype: torch.dtype | None
    ) -> None:
        self.policy, self._recipe, self._dtype = policy, recipe, dtype
        self.device = policy.model.device

        # The critics copy their layers before the policy's are switched on.
        names = ("reward", "cost") if with_cost else ("reward",)
        self.critics = {name: Critic(policy.start, recipe.critic_layers) for name in names}
        groups = {"policy": policy.prepare_training()}
        groups |= {name: critic.trained(name) for name, critic in self.critics.items()}
        self.trained: dict[str, nn.Parameter] = {
            name: weight for group in groups.values() for name, weight in group.items()
        }

        # The betas are those of the reference program.
        rates = dict.fromkeys(self.critics, recipe.critic_learning_rate)
        rates["policy"] = recipe.learning_rate
        self.optimizer = make_adamw(
            [Group(name, list(group.values()), rates[name]) for name, group in groups.items()],
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
        )

    def observe(self, rollout: Rollout, scores: dict[str, Tensor]) -> Experience:
        """Run policy, reference and critics over a rollout, in micro-batches."""
        size = self._recipe.micro_batch
        parts = [
            self._observe(rollout.rows(slice(start, start + size)))
            for start in range(0, len(rollout.ids), size)
        ]

        def join(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        has_inputs = parts[0].policy_inputs is not None
        return Experience(
            rollout=rollout,
            scores=scores,
            log_probs=join("log_probs"),
            log_ratio=join("log_ratio"),
            entropy=join("entropy"),
            policy_inputs=join("policy_inputs") if has_inputs else None,
            critic_inputs=join("critic_inputs"),
            old_values={
                name: torch.cat([part.old_values[name] for part in parts]) for name in self.critics
            },
        )

    @torch.no_grad()
    def _observe(self, rollout: Rollout) -> Experience:
        policy, temperature = self.policy, self._recipe.temperature
        with self._mixed():
            seen = policy.observe(rollout)  # hidden states, (samples, columns, width)

            # Look at the response tokens under the policy.
            logits = policy.logits(rollout.before(seen.policy)) / temperature
            log_probs = chosen_log_probs(logits, rollout.responses)  # (samples, tokens)
            spread = entropy(logits)  # (samples, tokens)

            # Compare with the reference. Logits are (samples, tokens, vocabulary): keep one.
            hidden = rollout.before(seen.reference)
            logits = policy.logits(hidden, of_reference=True) / temperature
            reference = chosen_log_probs(logits, rollout.responses)  # (samples, tokens)
            log_ratio = (log_probs - reference) * rollout.mask

            # Ask the critics.
            values = {
                name: self._values(critic, rollout, seen.critic_inputs)
                for name, critic in self.critics.items()
            }
        return Experience(
            rollout=rollout,
            scores={},
            log_probs=log_probs,
            log_ratio=log_ratio,
            entropy=spread,
            policy_inputs=seen.policy_inputs,
            critic_inputs=seen.critic_inputs,
            old_values=values,
        )

    def assign(self, experience: Experience, multiplier: float) -> Experience:
        """Turn the scores into advantages and returns.

        Args:
            experience: Experience with scores.
            multiplier: Price of cost, lambda.
        """
        recipe, mask = self._recipe, experience.rollout.mask
        advantages, returns = {}, {}

        # Leaving the reference lowers the reward and raises the cost, hence the signs.
        for name, sign in zip(self.critics, (1, -1), strict=False):
            rewards = token_rewards(
                experience.scores[name],
                experience.log_ratio,
                mask,
                sign * recipe.kl_weight,
                recipe.score_clip,
            )
            advantages[name], returns[name] = generalized_advantages(
                rewards, experience.old_values[name], mask, recipe.gae_gamma, recipe.gae_lambda
            )

        combined = combined_advantages(advantages["reward"], advantages.get("cost"), multiplier)
        return replace(experience, returns=returns, advantages=combined)

    def learn(
        self, experience: Experience, instructions: Sequence[list[Exchange]], share: float
    ) -> dict[str, float]:
        """Update policy and critics.

        Args:
            experience: Experience with advantages.
            instructions: Instructions of each optimizer step, whose language-model loss is added;
                the lists may be empty.
            share: Share of the peak learning rates.

        Returns:
            Means over the tokens of the losses, and the share of tokens that the clip affected.

        Raises:
            FloatingPointError: A loss or gradient is not finite; no weight was changed by it.
        """
        recipe, means = self._recipe, {}
        set_learning_rates(self.optimizer, share)

        # Every pass over the experience takes its minibatches in order.
        size = recipe.batch_size // recipe.minibatches
        starts = [
            start for _ in range(recipe.ppo_epochs) for start in range(0, recipe.batch_size, size)
        ]
        for start, texts in zip(starts, instructions, strict=True):
            # Collect gradients.
            losses = self._backward(experience.rows(slice(start, start + size)))
            if texts:
                losses["ptx_loss"] = self._backward_instructions(texts)
            norms = [
                nn.utils.clip_grad_norm_(group["params"], recipe.max_grad_norm or math.inf)
                for group in self.optimizer.param_groups
            ]

            # Stop before anything that is not finite reaches the weights.
            bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
            if bad or not all(math.isfinite(norm) for norm in norms):
                self.optimizer.zero_grad()
                raise FloatingPointError(f"{bad or 'the norm of the gradient'} is not finite")

            # Update the weights.
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, value in losses.items():
                means[name] = means.get(name, 0.0) + value / len(starts)
        return means

    def _backward(self, minibatch: Experience) -> dict[str, float]:
        """Add the gradients of a minibatch, and return its losses as means over its tokens."""
        recipe, means = self._recipe, {}
        num_tokens = int(minibatch.rollout.mask.sum())
        for start in range(0, len(minibatch.log_probs), recipe.micro_batch):
            part = minibatch.rows(slice(start, start + recipe.micro_batch))
            rollout = part.rollout
            with self._mixed():
                # The policy's loss.
                hidden = self.policy.hidden(
                    rollout.ids, rollout.attention, rollout.positions, part.policy_inputs
                )  # (samples, columns, width)
                logits = self.policy.logits(rollout.before(hidden)) / recipe.temperature
                log_probs = chosen_log_probs(logits, rollout.responses)  # (samples, tokens)
                loss, num_clipped = policy_loss(
                    log_probs, part.log_probs, part.advantages, rollout.mask, recipe.clip
                )
                losses = {"policy_loss": loss}

                # The critics' losses.
                for name, critic in self.critics.items():
                    values = self._values(critic, rollout, part.critic_inputs)
                    losses[f"{name}_value_loss"] = value_loss(
                        values,
                        part.old_values[name],
                        part.returns[name],
                        rollout.mask,
                        recipe.value_clip,
                    )

            # They share no weights, so one backward pass serves all.
            (sum(losses.values()) / num_tokens).backward()
            for name, value in {**losses, "clip_fraction": num_clipped}.items():
                means[name] = means.get(name, 0.0) + value.item() / num_tokens
        return means

    def _backward_instructions(self, texts: list[Exchange]) -> float:
        """Add the gradient of the language-model loss of some instructions, weighted.

        Returns:
            The loss, a mean over all response tokens, without its weight.
        """
        recipe, total = self._recipe, 0.0
        num_tokens = sum(len(response) for _, response in texts)
        for start in range(0, len(texts), recipe.micro_batch):
            rows = texts[start : start + recipe.micro_batch]

            # Pad the conversations on the right.
            lengths = torch.tensor(
                [len(prompt) + len(response) for prompt, response in rows], device=self.device
            )  # (samples,)
            columns = torch.arange(int(lengths.max()), device=self.device)
            ids = torch.zeros(len(rows), len(columns), dtype=torch.long, device=self.device)
            for row, (prompt, response) in zip(ids, rows, strict=True):
                row[: len(prompt) + len(response)] = torch.tensor(
                    [*prompt, *response], device=self.device
                )

            # Mark the response tokens, which the token before each predicts.
            starts = torch.tensor([len(prompt) for prompt, _ in rows], device=self.device)[:, None]
            attention = columns < lengths[:, None]  # (samples, columns)
            spoken = ((columns >= starts) & attention)[:, 1:]  # (samples, columns - 1)

            # Collect the gradient.
            with self._mixed():
                hidden = self.policy.hidden(ids, attention.long(), columns.expand_as(ids))
                logits = self.policy.logits(hidden[:, :-1][spoken])  # (tokens, vocabulary)
                chosen = chosen_log_probs(logits[None], ids[:, 1:][spoken][None])  # (1, tokens)
                loss = -chosen.sum() / num_tokens
            (recipe.ptx_weight * loss).backward()
            total += loss.item()
        return total

    def _values(self, critic: Critic, rollout: Rollout, inputs: Tensor) -> Tensor:
        """Return a critic's value before each response token, `(samples, tokens)`."""
        values = critic(inputs, rollout.attention, rollout.positions)  # (samples, columns)
        return rollout.before(values) * rollout.mask

    def _mixed(self) -> torch.autocast:
        return autocast(self.device, self._dtype)
