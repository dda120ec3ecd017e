"""The tokenizer as llama.cpp reads it: tokens, how words are split, merges or scores, and the tokens that mean something.

Source: llama.cpp `src/llama-vocab.cpp` for what each name of a pre-tokenizer does and how the two kinds work; `gguf` for the keys.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mipha.deploy.gguf.writer import Field
from mipha.models.language_model import end_of_turn
from mipha.models.processing import IMAGE_TOKEN

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_SPACE = "\u2581"
"""What SentencePiece writes for a space."""

_LETTERS_ONE_DIGIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS_THREE_DIGITS = _LETTERS_ONE_DIGIT.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")

_SPLITS: dict[tuple[Any, ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _LETTERS_ONE_DIGIT), ("ByteLevel", False)): "qwen2",
    (("Split", _LETTERS_THREE_DIGITS), ("ByteLevel", False)): "dbrx",
}
"""How a byte-level tokenizer splits a text into words -> llama.cpp's name for the same rule."""

_TAKES_WHOLE_WORDS = {"dbrx": "llama-bpe"}
"""Names of the rules whose words are looked up whole before any merge."""


def tokenizer_fields(
    folder: Path, tokenizer: PreTrainedTokenizerBase, template: str, num_rows: int, ends: list[int]
) -> dict[str, Field]:
    """Everything about the tokenizer, by llama.cpp's keys.

    Args:
        folder: Holds tokenizer.json.
        tokenizer: The same, loaded.
        template: The checkpoint's chat template: it tells the token that ends a turn.
        num_rows: Of the word embeddings. Rows without a word become tokens that no text has.
        ends: Tokens that end generation.

    Raises:
        ValueError: It splits or merges text by a rule that llama.cpp does not have.
    """
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    if (
        model["type"] != "BPE"
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        raise _refused(folder, f"is a {model['type']}, not a plain BPE")
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    tokens, types = _tokens(content, num_rows)
    fields: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if model.get("byte_fallback"):
        fields |= {"model": "llama", "pre": "default", "scores": _scores(tokens, merges)}
        fields["add_space_prefix"] = _adds_space(content, folder)
    else:
        name = _split_name(content, folder)
        if model.get("ignore_merges"):
            if name not in _TAKES_WHOLE_WORDS:
                raise _refused(folder, "looks words up whole before it merges")
            name = _TAKES_WHOLE_WORDS[name]
        fields |= {"model": "gpt2", "pre": name, "merges": [" ".join(pair) for pair in merges]}
    fields |= _special(tokenizer, template, ends)
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def name_for(name: str, content: dict[str, Any]) -> str:
    """A name of the model after which llama.cpp treats its tokenizer rightly.

    A model whose name has `phi-3` in it gets special tokens that swallow the white space behind them; it must have the other
    special tokens of Phi-3, or llama.cpp crashes.

    Args:
        name: Wanted.
        content: Of tokenizer.json.

    Raises:
        ValueError: Its tokens swallow white space in another way.
    """
    swallows = {token["content"] for token in content["added_tokens"] if token["rstrip"]}
    known = set(content["model"]["vocab"]) | {token["content"] for token in content["added_tokens"]}
    left = {token["content"] for token in content["added_tokens"] if token["lstrip"]}
    if not swallows and not left:
        return re.sub(r"phi-?3", "phi 3", name, flags=re.IGNORECASE)
    kept = {"<unk>", "<s>", "<|endoftext|>"}
    others = (
        {token["content"] for token in content["added_tokens"]} - swallows - kept - {IMAGE_TOKEN}
    )
    if left or others or not kept | {"</s>"} <= known or swallows & kept:
        raise ValueError(
            f"the special tokens {sorted(left or swallows)} swallow the white space beside them, which llama.cpp does for Phi-3 alone: "
            "set lstrip and rstrip to false in tokenizer.json, if the model was trained so, or serve with transformers"
        )
    return name if re.search("phi-?3", name, flags=re.IGNORECASE) else f"{name} (phi-3)"


def _tokens(content: dict[str, Any], num_rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the word embeddings."""
    tokens, types = [f"[PAD{row}]" for row in range(num_rows)], [UNUSED] * num_rows
    unknown = content["model"].get("unk_token")
    by_bytes = content["model"].get("byte_fallback")
    for token, row in content["model"]["vocab"].items():
        tokens[row], types[row] = (
            token,
            BYTE if by_bytes and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL,
        )
    for added in content["added_tokens"]:
        # llama.cpp looks for added tokens in the text as it was written
        tokens[added["id"]] = (
            added["content"] if added["special"] else added["content"].replace(_SPACE, " ")
        )
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if added["content"] == IMAGE_TOKEN:
            types[added["id"]] = UNUSED  # its row holds no picture: a text that names it is text
    if unknown is not None and by_bytes:
        types[tokens.index(unknown)] = UNKNOWN
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece's order of merging: the earlier a token's first merge, the higher its score."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _adds_space(content: dict[str, Any], folder: Path) -> bool:
    """Whether a space is put before every text, for a SentencePiece tokenizer.

    Raises:
        ValueError: Its text is changed in another way than spaces made visible.
    """
    normalizers, splits = (
        _flat(content["normalizer"], "normalizers"),
        _flat(content["pre_tokenizer"], "pretokenizers"),
    )
    adds = False
    for step in normalizers:
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            adds = True
        elif not (
            step["type"] == "Replace"
            and step["pattern"] == {"String": " "}
            and step["content"] == _SPACE
        ):
            raise _refused(folder, f"changes text by {step['type']!r} before it reads it")
    for step in splits:
        if (
            step["type"] == "Metaspace"
            and step.get("prepend_scheme") in ("always", "never")
            and not step.get("split")
        ):
            adds = step["prepend_scheme"] == "always"
        elif not (
            step["type"] == "Split" and step["pattern"] == {"String": " "} and normalizers
        ):  # there are no spaces any more
            raise _refused(
                folder, f"splits text by {step['type']!r} {step.get('prepend_scheme', '')}".rstrip()
            )
    return adds


def _split_name(content: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text.

    Raises:
        ValueError: It has none.
    """
    normalizers = [step["type"] for step in _flat(content["normalizer"], "normalizers")]
    if set(normalizers) - {
        "NFC"
    }:  # llama.cpp leaves text as it is; nearly all text is in that form
        raise _refused(folder, f"changes text by {', '.join(normalizers)} before it reads it")
    rule: list[tuple[str, Any]] = []
    for step in _flat(content["pre_tokenizer"], "pretokenizers"):
        kind = step["type"]
        if kind == "ByteLevel" and step["add_prefix_space"]:
            raise _refused(folder, "puts a space before every text")
        detail = {"ByteLevel": step.get("use_regex", True), "Digits": step.get("individual_digits")}
        split = (
            step.get("pattern", {}).get("Regex")
            if step.get("behavior") == "Isolated" and not step.get("invert")
            else None
        )
        rule.append((kind, detail.get(kind, split)))
    if tuple(rule) not in _SPLITS:
        raise _refused(folder, f"splits text into words by {rule}")
    return _SPLITS[tuple(rule)]


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return (
        [one for part in step[inner] for one in _flat(part, inner)]
        if step["type"] == "Sequence"
        else [step]
    )


def _special(
    tokenizer: PreTrainedTokenizerBase, template: str, ends: list[int]
) -> dict[str, Field]:
    """Tokens that begin, pad and end, and what is added to a text."""
    ids = tokenizer("a").input_ids
    named = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    fields: dict[str, Any] = {
        f"{name}_token_id": token for name, token in named.items() if token is not None
    }
    fields["add_bos_token"] = (
        tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    )
    fields["add_eos_token"] = (
        tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    )
    turn = end_of_turn(tokenizer, template)
    more = [token for token in dict.fromkeys([turn, *ends]) if token != tokenizer.eos_token_id]
    if len(more) > 2:
        raise ValueError(
            f"generation ends at {len(more) + 1} tokens, but GGUF has place for three: shorten eos_token_id in generation_config.json"
        )
    return fields | dict(zip(("eot_token_id", "eom_token_id"), more, strict=False))


def _refused(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"the tokenizer of {folder} {what}, for which llama.cpp has no name: serve this checkpoint with transformers"
    )
