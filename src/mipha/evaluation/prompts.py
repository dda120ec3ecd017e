"""What the LLaVA-1.5 / Mipha protocol adds to a question.

Source: haotian-liu/LLaVA c121f043 `scripts/v1_5/eval`, `llava/eval/model_vqa*.py`; the same text in zhuyiche/llava-phi 21dafbf5.
"""

from __future__ import annotations

from collections.abc import Sequence

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def options(choices: Sequence[str]) -> str:
    """One line an option, each after a newline: `\\nA. red\\nB. blue`."""
    return "".join(
        f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )
