"""A model for VLMEvalKit, which has no plug-in mechanism: register it, then run.

    from functools import partial
    from vlmeval.config import supported_VLM
    from mipha.integrations.vlmevalkit import Mipha

    supported_VLM["mipha"] = partial(Mipha, model_path="runs/quickstart")

Source: open-compass/VLMEvalKit e8e78f05 `vlmeval/vlm/base.py`, `docs/en/Development.md`.
"""

from __future__ import annotations

from typing import Any

from vlmeval.vlm.base import BaseModel

from mipha.assistant import load


class Mipha(BaseModel):
    """A model that answers through `mipha.Assistant`: greedy, at most one image per question."""

    INSTALL_REQ = False
    INTERLEAVE = False

    def __init__(
        self, model_path: str, max_new_tokens: int = 1024, device: str | None = None
    ) -> None:
        """Load a run or a model folder."""
        super().__init__()
        self.assistant = load(model_path, device=device)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """Return the answer to a message of `{"type": "image" | "text", "value": ...}` parts.

        Raises:
            ValueError: Several images.
        """
        images = [part["value"] for part in message if part["type"] == "image"]
        if len(images) > 1:
            raise ValueError(
                f"{dataset or 'the message'} has {len(images)} images, and this model reads one: "
                "choose another data set"
            )
        question = "\n".join(part["value"] for part in message if part["type"] == "text")
        return self.assistant.answer(
            images[0] if images else None, question, max_new_tokens=self.max_new_tokens
        ).text
