"""The host's LLaVA class, with the two things it lacks: the head's bias, and a loss that skips what is not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, LlavaConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from mipha.models.loss import supervised_cross_entropy
from mipha.models.packed_attention import NAME as PACKED
from mipha.models.packed_attention import spans_as_mask


@dataclass
class SupervisedOutput(LlavaCausalLMOutputWithPast):
    """Output of a forward pass with labels.

    Args:
        loss: Mean over the supervised tokens, nats.
        loss_sum: Sum over the supervised tokens, nats; what a loop adds up over micro-batches and processes.
        num_tokens: How many tokens were supervised.
    """

    loss_sum: Tensor | None = None
    num_tokens: Tensor | None = None


class LlavaForConditionalGeneration(transformers.LlavaForConditionalGeneration):
    """Stock LLaVA with a biased head where the language model has one (Phi: the stock class silently drops it).

    It carries the stock name, and says that it is no custom code, because by these the host picks the key names of a
    checkpoint: so it reads and writes `language_model.model.layers.0...` like every LLaVA on the hub.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        if head_bias(config):
            self.lm_head = nn.Linear(
                config.text_config.hidden_size, config.text_config.vocab_size, bias=True
            )
            self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """Its weights are the stock class's; for custom code the host would rename only some of them when it saves."""
        return False

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As stock, under the key names of the hub, `vision_tower.vision_model.` of CLIP and SigLIP included: vLLM asks for them.

        The host by itself writes that prefix only where it has read it, and a model that was made of parts never had one.
        """
        self._weight_conversions = get_model_conversion_mapping(self, add_legacy=False)
        super().save_pretrained(save_directory, **options)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        spans: Tensor | None = None,
        **kwargs,
    ):
        """As stock without `labels`. With them: the loss over supervised positions, and no logits.

        The arguments are spelled out because `generate` reads this signature and drops, unsaid, what is not in it.

        Args:
            input_ids: `(rows, tokens)`.
            pixel_values: `(images, 3, height, width)`, in reading order.
            attention_mask: `(rows, tokens)`, or `(rows, 1, tokens, tokens)` added to the scores.
            position_ids: `(rows, tokens)`.
            labels: `(rows, tokens)`, -100 where not trained on.
            spans: `(spans, 3)`, as `collate` makes them: with packed attention they take the mask's place; else the mask counts.
        """
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        inputs |= {"inputs_embeds": inputs_embeds, **kwargs}
        if labels is None:
            return super().forward(past_key_values=past_key_values, **inputs)
        if spans is not None and self.config.text_config._attn_implementation == PACKED:
            inputs["attention_mask"] = spans_as_mask(spans)
        # A default cache switches off the isolation of packed samples without a word; training never needs one.
        outputs = self.model(**{**inputs, "use_cache": False})
        loss_sum, num_tokens = supervised_cross_entropy(
            outputs.last_hidden_state, labels, self.lm_head
        )
        return SupervisedOutput(
            loss=loss_sum / num_tokens.clamp(min=1), loss_sum=loss_sum, num_tokens=num_tokens
        )


def head_bias(config: LlavaConfig) -> bool:
    """Whether the language model's head has a bias: kept in the checkpoint, and known for Phi, whose stock class always has one."""
    return bool(getattr(config.text_config, "lm_head_bias", config.text_config.model_type == "phi"))


@dataclass(frozen=True)
class Parts:
    """The three parts of a model, as the paper names them."""

    vision_tower: tuple[nn.Module, ...]
    projector: tuple[nn.Module, ...]
    language_model: tuple[nn.Module, ...]


def parts(model: LlavaForConditionalGeneration) -> Parts:
    """The modules of each part; the head belongs to the language model."""
    inner = model.model
    return Parts(
        (inner.vision_tower,), (inner.multi_modal_projector,), (inner.language_model, model.lm_head)
    )


def attention_window(config: LlavaConfig) -> int | None:
    """Tokens that the language model's sliding layers see at a time; null where every layer sees all."""
    return getattr(config.text_config, "sliding_window", None)


def load_model(
    folder: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """Load a saved checkpoint, complete or not at all.

    Raises:
        ValueError: Weights are missing, left over or of another shape: the folder is not the checkpoint it says.
    """
    options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    # Without it the host raises an error of its own for a wrong shape, in many sentences.
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, **options, ignore_mismatched_sizes=True
    )
    problems = {
        kind: sorted(map(str, info.get(kind) or ()))[:5]
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(problems.values()):
        raise ValueError(
            f"{folder}: the weights do not fit the model they describe: { {k: v for k, v in problems.items() if v} }"
        )
    return model.to(device).eval()
