"""The words of one message: damaged encodings, leftovers of other programs, missing answers."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mipha.data.check.findings import Problem, quoted
from mipha.data.sample import IMAGE, Message

if TYPE_CHECKING:
    from transformers import LlavaProcessor

LONG_ANSWER = 8_192
"""Characters: at about four a token, an answer that fills a row of 2,048 tokens by itself."""

CONTROL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<start_of_turn>",
    "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>",
)  # fmt: skip
"""Of ChatML, GPT-2, Llama 3, Gemma and Llama 2; searched for where there is no tokenizer."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Zero-width space, word joiner, byte order mark, soft hyphen; embeddings, overrides and isolates
# of text direction. The two joiners U+200C and U+200D stay: Persian and emoji need them.
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u00ad\u202a-\u202e\u2066-\u2069]")

# Source: the processors of Qwen-VL, InternVL, Phi-3.5, Gemma 3, PaliGemma, Idefics, SmolVLM,
# Pixtral, DeepSeek-VL, LLaVA-NeXT, Kosmos-2, MiniCPM-V and Fuyu; placeholders of ms-swift and MMMU.
_FOREIGN_MARKER = re.compile(
    r"<\|?(?:/?(?:image|img|vision)|video|picture|audio|media)(?:[_ |-][\w|-]{0,20}|\d{0,3})?\|?>"
    r"|<\|?/?(?:start|end)_of_(?:image|img|video|audio)\|?>|<im_(?:start|end|patch)>"
    r"|<\|?(?:bbox|ref-object|object_ref|box|quad|point|grounding|det|ref|region)"
    r"(?:_(?:start|end|pad))?\|>|<(?:bbox|ref-object|region\d{0,3}|cls-\d+|tile_\w+)>"
    r"|<(?:loc|seg|patch_index_)\[?_?\d{1,5}\]?>|<fake_token_around_image>|<global-img>"
    r"|<row_\d+_col_\d+>|<patch>|<img_context>|<image_?placeholder>|<\|?(?:speaker|newline)\|>"
    r"|\[(?:IMG|IMAGE|VIDEO|AUDIO)(?:[_ ]?(?:\d{1,3}|BREAK|END|TOKEN|PLACEHOLDER))?\]"
    r"|(?<![\w\]}])\{(?:image|img|bbox)\}|\{\{(?:image|img)\}\}|!\[\]\(<?image>?\)|<ImageHere>|<Img>",
    re.IGNORECASE,
)
_MARKUP = re.compile(
    r"&(?:amp|lt|gt|quot|nbsp|#\d{1,5}|#x[0-9a-f]{1,5});|</?(?:br|p|div|span|li|ul|ol|strong|em|table|td|tr|h[1-6])\b[^<>]{0,200}>",
    re.I,
)
_TURN = re.compile(
    r"(?m)^[ \t]*(?:#{2,3}[ \t]*)?"
    r"(?:USER|ASSISTANT|SYSTEM|Human|Assistant|User|Instruction|Response):(?:\s|$)"
)
_PLACEHOLDER = re.compile(
    r"(?:nan|null|undefined|n/?a|#n/a|tbd|todo|"
    r"\[?object object\]?|lorem ipsum.*|<answer>|answer here|\.{3,}|-{2,}|\?+)",
    re.I | re.S,
)
_REFUSAL = re.compile(
    r"\b(?:as an ai(?: language)? model|i(?:'|’)m sorry, but i (?:can|am)|"
    r"i cannot (?:see|view) (?:the |any )?images?)",
    re.I,
)


def text_problems(message: Message, special_tokens: re.Pattern[str]) -> Iterator[Problem]:
    """Find all that is wrong with one message.

    Args:
        message: A message of any role.
        special_tokens: Texts that the tokenizer reads as control tokens.
    """
    text = message.text
    if not text.isascii():
        yield from _encoding_problems(text)
    if found := _CONTROL.search(text):
        yield (
            "control-characters",
            f"the {message.role}'s text holds the control character {quoted(found.group())}",
        )
    if found := special_tokens.search(text):
        yield (
            "special-token",
            f"the {message.role}'s text holds {found.group()}, "
            "which is read as a control token, not as text",
        )
    for found in _FOREIGN_MARKER.finditer(text):
        if found.group() != IMAGE:
            yield (
                "foreign-marker",
                f"the {message.role}'s text holds {quoted(found.group())}, "
                "which would be learned as plain text",
            )
            break
    if found := _MARKUP.search(text):
        yield "markup", f"the {message.role}'s text holds {quoted(found.group())}"
    if message.role != "system" and (found := _TURN.search(text)):
        yield (
            "turn-in-text",
            f"a line of the {message.role}'s text begins with {quoted(found.group().strip())}",
        )
    if message.role == "user" and not text.replace(IMAGE, "").strip() and IMAGE not in text:
        yield "empty-question", "the user says nothing"
    if message.role == "assistant":
        yield from _answer_problems(text)


def _encoding_problems(text: str) -> Iterator[Problem]:
    if found := _SURROGATE.search(text):
        yield (
            "lone-surrogate",
            f"a text holds {quoted(found.group())}, half of a character, "
            "which no tokenizer accepts",
        )
    if "\ufffd" in text:
        yield (
            "replacement-character",
            f"a text holds {text.count(chr(0xFFFD))} U+FFFD, "
            f"as in {_around(text, text.index(chr(0xFFFD)))}",
        )
    if (fixed := fix_mojibake(text)) != text:
        at = next(
            index
            for index, (old, new) in enumerate(zip(text, fixed + "\0", strict=False))
            if old != new
        )
        yield "mojibake", f"a text was read in the wrong encoding, as in {_around(text, at)}"
    if found := _INVISIBLE.search(text):
        yield (
            "invisible-characters",
            f"a text holds the invisible character U+{ord(found.group()):04X}",
        )


def _answer_problems(text: str) -> Iterator[Problem]:
    words = fix_text(text).strip()
    if not words:
        yield "empty-answer", "an answer is empty"
    elif _PLACEHOLDER.fullmatch(words):
        yield "placeholder-answer", f"an answer is {quoted(words)}"
    if len(words) > LONG_ANSWER:
        yield "long-answer", f"an answer has {len(words):,} characters, more than {LONG_ANSWER:,}"
    # Prose shrinks to about a half, lists to a fourth. Short texts do not tell.
    if len(words) >= 300 and len(
        zlib.compress(words[:LONG_ANSWER].encode("utf-8", "replace"), 1)
    ) < 0.1 * len(words[:LONG_ANSWER]):
        yield "repetition", f"an answer says the same again and again: {quoted(words)}"
    if found := _REFUSAL.search(words):
        yield "refusal", f"an answer says {quoted(found.group())}"


def _around(text: str, at: int, most: int = 12) -> str:
    return quoted(text[max(0, at - most) : at + most])


def special_tokens_of(processor: LlavaProcessor) -> re.Pattern[str]:
    """Return what the tokenizer reads as a control token when it stands in a text.

    The image marker is meant to be one.
    """
    added = processor.tokenizer.added_tokens_decoder.values()
    tokens = {str(token) for token in added if token.special} - {IMAGE}
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def fix_text(text: str) -> str:
    """Read mojibake again; remove half, control and invisible characters."""
    if text.isascii() and not _CONTROL.search(text):
        return text
    return _INVISIBLE.sub("", _CONTROL.sub("", _SURROGATE.sub("", fix_mojibake(text))))


def _as_bytes() -> dict[str, int]:
    """Map characters to bytes, as Windows-1252 reads them.

    The five bytes that it leaves open are read as Latin-1.
    """
    table = {chr(byte): byte for byte in range(0x80, 0x100)}
    for byte in range(0x80, 0xA0):
        read = bytes([byte]).decode("cp1252", "ignore")
        if read:
            table[read] = byte
    return table


_BYTE_OF = _as_bytes()
_TAIL = (
    "[" + re.escape("".join(character for character, byte in _BYTE_OF.items() if byte < 0xC0)) + "]"
)
# Two bytes behind any other lead could be two characters side by side, such as É» at the end of a
# French quotation; several times in a row (Cyrillic, Greek) they could not.
_MOJIBAKE = re.compile(
    f"(?:[\xc2\xc3]{_TAIL})+|(?:[\xc4-\xdf]{_TAIL}){{2,}}|(?:[\xe0-\xef]{_TAIL}{{2}})+|(?:[\xf0-\xf4]{_TAIL}{{3}})+"
)
_CLOSING = "»”’“›…\xa0"


def fix_mojibake(text: str) -> str:
    """Read again a text whose UTF-8 was read as Windows-1252 or Latin-1: `cafÃ©` becomes `café`.

    Only sequences that are certainly damaged are changed, so sound text in the same string stays.
    """
    return text if text.isascii() else _MOJIBAKE.sub(_read_again, text)


def _read_again(found: re.Match[str]) -> str:
    text = found.group()
    before = found.string[found.start() - 1 : found.start()]
    if len(text) <= 3 and set(text[1:]) <= set(_CLOSING) and (len(text) == 3 or before.isupper()):
        return text  # a quotation ends here, as in «MAÇÃ» and «allé…»
    try:
        return bytes(_BYTE_OF[character] for character in text).decode("utf-8")
    except UnicodeDecodeError:
        return text
