"""A checkpoint as GGUF: the language model in one file, tower and projector in another.

config + weights --language_model, tokenizer--> model-f16.gguf, model-q4_k_m.gguf ...
                 --mmproj---------------------> mmproj-f16.gguf
`export.export_gguf` writes both into one folder, each file by `writer`.
"""

from __future__ import annotations

from collections.abc import Sequence

WRITTEN = ("f32", "f16", "bf16", "q8_0")
"""Kinds of weights that are written here."""

QUANTISED = ("q4_0", "q4_k_m", "q5_k_m", "q6_k")
"""Kinds that llama.cpp's quantiser makes of a file in f16."""


def parse_kinds(names: Sequence[str]) -> list[str]:
    """Return the kinds of weights that were asked for, each once, in lower case.

    Raises:
        ValueError: No such kind, or none at all.
    """
    known = (*WRITTEN, *QUANTISED)
    kinds = list(dict.fromkeys(kind.lower() for kind in names))
    if unknown := [kind for kind in kinds if kind not in known]:
        raise ValueError(f"no quantisation {unknown[0]!r}: give {', '.join(known)}")
    if not kinds:
        raise ValueError(f"no quantisation is given: choose from {', '.join(known)}")
    return kinds
