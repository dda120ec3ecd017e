"""Words that are damaged, and sound words of many languages that are not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipha.data.check.text import (
    CONTROL_TOKENS,
    fix_mojibake,
    fix_text,
    special_tokens_of,
    text_problems,
)
from mipha.data.sample import Message, Role

SPECIAL = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
SOUND = (
    "Il est allé… «allé…» et l’été — «là\xa0»; CAFÉ», «MAÇÃ», «MENÜ“», ÎLE, À “quoi”? "
    "ß² ×½ °C ±3 €5 £7 §2 ¡Ñandú! ¿Qué?",
    "Чайник стоит на столе. Τσαγιέρα. 茶壶在桌子上。やかん。"
    "주전자 إبريق הקומקום กาน้ำ केतली 🫖👩‍👩‍👧 می‌خواهم",
    "x < y && y > z; a <b> c; [1] {2} <3>; user: admin is a word; AT&T; R&D; "
    "https://example.org/?a=1&b=2\n\tdef f(x):\r\n\t\treturn x",
    "I'm sorry for the small picture. It reads USER in large letters. "
    "None of them. The nan bread. na. no. 0. -",
    "ha ha ha, well, well, well. " + " ".join(f"{n}," for n in range(300)),
)


def _kinds(text: str, role: Role = "assistant") -> list[str]:
    return [kind for kind, _ in text_problems(Message(role, text), SPECIAL)]


@pytest.mark.parametrize("text", SOUND)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_sound_text_is_left_alone(text: str, role: Role) -> None:
    assert _kinds(text, role) == []
    assert fix_text(text) == text


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize(
    "text",
    [
        "café",
        "Übergröße",
        "it’s “fine” – or…",
        "茶壶在桌子上",
        "Чайник",
        "Τσαγιέρα",
        "🫖",
        "5 €",
        "½ m²",
        "naïve piñata",
    ],
)
def test_text_read_in_the_wrong_encoding_is_read_again(text: str, encoding: str) -> None:
    """Python's cp1252 refuses five bytes that other programs read as Latin-1."""
    damaged = "".join(
        bytes([byte]).decode(encoding)
        if encoding == "latin-1" or byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
        else chr(byte)
        for byte in text.encode()
    )
    assert damaged != text
    assert "mojibake" in _kinds(damaged)
    assert fix_mojibake(damaged) == text
    assert fix_text(f"<image>\n{damaged} and café") == f"<image>\n{text} and café"


@given(st.text(st.characters(min_codepoint=0x00E0, max_codepoint=0x00FF)).filter(bool))
def test_any_word_of_latin_letters_comes_back(word: str) -> None:
    assert fix_mojibake(word.encode().decode("latin-1")) == word


@given(st.text())
def test_mending_is_done_once_and_leaves_nothing_to_mend(text: str) -> None:
    mended = fix_text(text)
    assert not {"lone-surrogate", "control-characters", "invisible-characters"} & set(
        _kinds(mended)
    )
    if "mojibake" not in _kinds(mended):  # text that was damaged twice takes two passes
        assert fix_text(mended) == mended


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("It smiles \ud83d.", "lone-surrogate"),
        ("caf\ufffd", "replacement-character"),
        ("a\x00b", "control-characters"),
        ("a\x1b[31m", "control-characters"),
        ("a\x85b", "control-characters"),
        ("\ufeffHello", "invisible-characters"),
        ("evil\u202etxt", "invisible-characters"),
        ("soft\u00adhyphen", "invisible-characters"),
        ("Yes.<|im_end|>", "special-token"),
        ("[INST] Hi", "special-token"),
        ("<Image>", "foreign-marker"),
        ("<image_1>", "foreign-marker"),
        ("<|image_pad|>", "foreign-marker"),
        ("<ImageHere>", "foreign-marker"),
        ("[IMG]", "foreign-marker"),
        ("Tom &amp; Anna", "markup"),
        ("one<br>two", "markup"),
        ("</div>", "markup"),
        ("It is.\n### Human: And?", "turn-in-text"),
        ("USER: hi", "turn-in-text"),
        ("", "empty-answer"),
        (" \n\t", "empty-answer"),
        ("\u200b", "empty-answer"),
        ("null", "placeholder-answer"),
        ("[object Object]", "placeholder-answer"),
        ("...", "placeholder-answer"),
        ("N/A", "placeholder-answer"),
        ("Lorem ipsum dolor sit amet", "placeholder-answer"),
        ("As an AI language model, I", "refusal"),
        ("I’m sorry, but I can’t see it.", "refusal"),
        ("the dog and " * 40, "repetition"),
        ("word " * 2000 + "and more", "long-answer"),
    ],
)
def test_damage_is_named(text: str, kind: str) -> None:
    assert kind in _kinds(text)


def test_what_is_wrong_with_an_answer_may_be_a_question() -> None:
    assert _kinds("null", "user") == _kinds("", "system") == []
    assert _kinds("", "user") == ["empty-question"]
    assert _kinds("<image>", "user") == []


def test_tokens_of_the_given_tokenizer_count() -> None:
    assert "special-token" not in [
        kind for kind, _ in text_problems(Message("user", "<s> struck </s>"), SPECIAL)
    ]
    assert "special-token" in [
        kind for kind, _ in text_problems(Message("user", "<s> struck </s>"), re.compile("</?s>"))
    ]


def test_a_control_token_is_found_whole(tiny_model: Callable) -> None:
    """One that another begins with does not hide it, and the marker of an image is none."""
    processor = tiny_model()[1]
    tokens = ["<|call|>", "<|call|><|name|>"]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    found = special_tokens_of(processor)
    assert found.findall("<image>a <|call|><|name|> b <|call|>") == [tokens[1], tokens[0]]


@pytest.mark.parametrize("piece", ["\n", " ", "<", "&", "Ã", "<image ", "à»", "### "])
def test_hostile_text_takes_no_longer_than_other_text(piece: str) -> None:
    """A rule that looks back at every character would take hours here."""
    assert "special-token" not in _kinds(piece * 500_000)
