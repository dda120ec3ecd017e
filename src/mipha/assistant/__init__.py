"""Image + question -> Answer: many at once, streamed, in several turns."""

from mipha.assistant.assistant import Answer, Assistant, Prompt, load
from mipha.assistant.chat import Chat
from mipha.assistant.inputs import ImageLike, render_prompt

__all__ = ["Answer", "Assistant", "Chat", "ImageLike", "Prompt", "load", "render_prompt"]
