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
from mipha.data.sample import IMAGE


class Mipha(BaseModel):
    """A model that answers through `mipha.Assistant`: greedy, any number of images."""

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self, model_path: str, max_new_tokens: int = 1024, device: str | None = None
    ) -> None:
        """Load a run or a model folder."""
        super().__init__()
        self.assistant = load(model_path, device=device)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """Return the answer to a message of `{"type": "image" | "text", "value": ...}` parts.

        One image stands in front of the text, as in training; several stand where they are.
        """
        images = [part["value"] for part in message if part["type"] == "image"]
        question = "\n".join(
            part["value"] if part["type"] == "text" else IMAGE
            for part in message
            if part["type"] == "text" or len(images) > 1
        )
        return self.assistant.answer(images, question, max_new_tokens=self.max_new_tokens).text
