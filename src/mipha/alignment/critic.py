"""What a critic expects of a response that is half written: layers and a head of its own, above frozen ones that it shares."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from mipha.alignment.layers import decoder_layers, top_layers


class Critic(nn.Module):
    """Its own copy of the last layers of the model that the policy starts from, and one number on top.

    The reference program gives each critic a whole model, started from the reward or cost model. A few layers above the frozen
    reference, whose states are computed anyway, need a fraction of that memory and time; the head starts at zero, which expects nothing.
    """

    def __init__(self, start: PreTrainedModel, num_layers: int) -> None:
        super().__init__()
        self.top = top_layers(start, num_layers, own=True).requires_grad_(False)
        self.own = decoder_layers(self.top).requires_grad_(True)
        self.head = nn.Linear(start.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(start.device)

    def forward(self, inputs: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        """Values after each column, `(samples, columns)` float32, from `(samples, columns, width)` of the layers below."""
        hidden = self.top(
            inputs_embeds=inputs, attention_mask=attention, position_ids=positions, use_cache=False
        ).last_hidden_state
        return self.head(hidden).squeeze(-1).float()

    def trained(self, prefix: str) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {
            f"{prefix}.{name}": weight
            for part in ("own", "head")
            for name, weight in getattr(self, part).named_parameters(part)
        }
