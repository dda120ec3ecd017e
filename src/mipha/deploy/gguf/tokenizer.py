"""Write tokenizer and chat template as llama.cpp reads them.

The tokenizer: its tokens, how a text is split into words, merges or scores, and special tokens. The
chat template: llama.cpp passes images to it as marks in the text, and knows no `generation` blocks.

Source: llama.cpp `src/llama-vocab.cpp` for the names of pre-tokenizers and the two kinds of
    tokenizer, `gguf` for the keys; `common/chat.cpp` (`to_json_oaicompat`: a message with media
    becomes one text, the mark right before the next part) and `tools/server/server-common.cpp`
    (`get_media_marker`: `<__media_`, random letters, `__>`) for the template.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from mipha.deploy.gguf.writer import Field
from mipha.geometry import Geometry, Shuffled
from mipha.models.language_model import end_of_turn
from mipha.models.processing import IMAGE_TOKEN
from mipha.rendering import ConversationRefused, write_chat

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_SPACE = "\u2581"
"""Written for a space by SentencePiece."""

_LETTERS_ONE_DIGIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS_THREE_DIGITS = _LETTERS_ONE_DIGIT.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")

_SPLITS: dict[tuple[Any, ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _LETTERS_ONE_DIGIT), ("ByteLevel", False)): "qwen2",
    (("Split", _LETTERS_THREE_DIGITS), ("ByteLevel", False)): "dbrx",
}
"""Rules by which byte-level tokenizers split a text into words, with llama.cpp's names for them."""

_TAKES_WHOLE_WORDS = {"dbrx": "llama-bpe"}
"""Names of the rules whose words are looked up whole before any merge."""


def tokenizer_fields(
    content: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    num_rows: int,
    ends: list[int],
) -> dict[str, Field]:
    """Return the fields of the tokenizer, by llama.cpp's keys.

    Args:
        content: Content of tokenizer.json.
        tokenizer: The same tokenizer, loaded.
        template: The checkpoint's chat template, which names the token that ends a turn.
        num_rows: Rows of the word embeddings. Rows without a token become tokens that no text has.
        ends: Tokens that end generation.

    Raises:
        ValueError: It splits or merges text by a rule that llama.cpp does not have.
    """
    model = content["model"]
    if (
        model["type"] != "BPE"
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        raise _refused(f"is a {model['type']}, not a plain BPE")

    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    tokens, types = _tokens(content, num_rows)
    fields: dict[str, Any] = {"tokens": tokens, "token_type": types}

    # SentencePiece has scores, a byte-level tokenizer has merges.
    if model.get("byte_fallback"):
        fields |= {"model": "llama", "pre": "default", "scores": _scores(tokens, merges)}
        fields["add_space_prefix"] = _adds_space(content)
    else:
        name = _split_name(content)
        if model.get("ignore_merges"):
            if name not in _TAKES_WHOLE_WORDS:
                raise _refused("looks words up whole before it merges")
            name = _TAKES_WHOLE_WORDS[name]
        fields |= {"model": "gpt2", "pre": name, "merges": [" ".join(pair) for pair in merges]}

    fields |= _special(tokenizer, template, ends)
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def check_marks(tokenizer: PreTrainedTokenizerBase, geometry: Geometry) -> None:
    """Refuse a tokenizer in which llama.cpp does not find what stands around an image.

    It writes these marks by their ids, newlines among them, where our processor tokenises text.

    Args:
        tokenizer: Tokenizer of the checkpoint, with its special tokens.
        geometry: What an image becomes; only Idefics3 writes newlines.

    Raises:
        ValueError: Newlines between two marks are not one token.
    """
    if not isinstance(geometry, Shuffled):
        return
    mark = "<global-img>"
    for text in ("\n", "\n\n"):
        ids = tokenizer(f"{mark}{text}{mark}", add_special_tokens=False).input_ids
        if len(ids) != 3 or tokenizer.decode(ids[1:2]) != text:
            raise ValueError(
                f"the checkpoint's tokenizer writes {text!r} between two marks as "
                f"{len(ids) - 2} tokens, and llama.cpp looks for one: serve it with transformers"
            )


def name_for(name: str, content: dict[str, Any]) -> str:
    """Return a name of the model with which llama.cpp reads its tokenizer correctly.

    llama.cpp gives a model with `phi-3` in its name special tokens that swallow the white space
    behind them; without the other special tokens of Phi-3 it crashes.

    Args:
        name: Name to start from.
        content: Content of tokenizer.json.

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
            f"the special tokens {sorted(left or swallows)} swallow the white space beside them, "
            "which llama.cpp does for Phi-3 alone: set lstrip and rstrip to false in "
            "tokenizer.json, if the model was trained so, or serve with transformers"
        )
    return name if re.search("phi-?3", name, flags=re.IGNORECASE) else f"{name} (phi-3)"


def _tokens(content: dict[str, Any], num_rows: int) -> tuple[list[str], list[int]]:
    """Return text and type of every row of the word embeddings."""
    tokens, types = [f"[PAD{row}]" for row in range(num_rows)], [UNUSED] * num_rows
    unknown = content["model"].get("unk_token")
    by_bytes = content["model"].get("byte_fallback")
    for token, row in content["model"]["vocab"].items():
        is_byte = by_bytes and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        tokens[row], types[row] = token, BYTE if is_byte else NORMAL

    for added in content["added_tokens"]:
        # llama.cpp looks for added tokens in the text as it was written.
        tokens[added["id"]] = (
            added["content"] if added["special"] else added["content"].replace(_SPACE, " ")
        )
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if added["content"] == IMAGE_TOKEN:
            types[added["id"]] = UNUSED  # its row holds no image: a text that names it is text
    if unknown is not None and by_bytes:
        types[tokens.index(unknown)] = UNKNOWN
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return SentencePiece's scores: the earlier a token's first merge, the higher."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _adds_space(content: dict[str, Any]) -> bool:
    """Return whether a SentencePiece tokenizer puts a space before every text.

    Raises:
        ValueError: It changes text in other ways than by making spaces visible.
    """
    normalizers = _flat(content["normalizer"], "normalizers")
    splits = _flat(content["pre_tokenizer"], "pretokenizers")
    adds = False
    for step in normalizers:
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            adds = True
        elif not (
            step["type"] == "Replace"
            and step["pattern"] == {"String": " "}
            and step["content"] == _SPACE
        ):
            raise _refused(f"changes text by {step['type']!r} before it reads it")

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
                f"splits text by {step['type']!r} {step.get('prepend_scheme', '')}".rstrip()
            )
    return adds


def _split_name(content: dict[str, Any]) -> str:
    """Return llama.cpp's name for the rule by which a byte-level tokenizer splits text.

    Raises:
        ValueError: llama.cpp has no such rule.
    """
    # llama.cpp leaves text as it is; nearly all text is in the form NFC.
    normalizers = [step["type"] for step in _flat(content["normalizer"], "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise _refused(f"changes text by {', '.join(normalizers)} before it reads it")

    rule: list[tuple[str, Any]] = []
    for step in _flat(content["pre_tokenizer"], "pretokenizers"):
        kind = step["type"]
        if kind == "ByteLevel" and step["add_prefix_space"]:
            raise _refused("puts a space before every text")
        detail = {"ByteLevel": step.get("use_regex", True), "Digits": step.get("individual_digits")}
        split = (
            step.get("pattern", {}).get("Regex")
            if step.get("behavior") == "Isolated" and not step.get("invert")
            else None
        )
        rule.append((kind, detail.get(kind, split)))

    if tuple(rule) not in _SPLITS:
        raise _refused(f"splits text into words by {rule}")
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
    """Return the special tokens, and which of them are added to a text."""
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
            f"generation ends at {len(more) + 1} tokens, but GGUF has place for three: "
            "shorten eos_token_id in generation_config.json"
        )
    return fields | dict(zip(("eot_token_id", "eom_token_id"), more, strict=False))


def _refused(what: str) -> ValueError:
    return ValueError(
        f"the checkpoint's tokenizer {what}, for which llama.cpp has no name: "
        "serve this checkpoint with transformers"
    )


_MARK = "<__media__>"

_PRELUDE = """\
{%- set marked = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set words = namespace(text='') -%}
  {%- if message.content is string -%}{%- set words.text = message.content -%}
  {%- else -%}
    {%- for part in message.content -%}{%- set words.text = words.text + part.text -%}{%- endfor -%}
  {%- endif -%}
  {%- if '<__media_' in words.text -%}
    {%- set words.text = words.text | replace('<__media_', BEFORE + '<__media_') \
| replace('__>', '__>' + AFTER) -%}
  {%- endif -%}
  {%- set marked.messages = marked.messages + [{'role': message.role, 'content': words.text}] -%}
{%- endfor -%}
{%- set messages = marked.messages -%}
"""
"""Writes around a mark what the template writes around an image; turns messages into text."""


def gguf_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a template that writes in llama.cpp what the checkpoint's writes here.

    An image's mark replaces its token. The text that the template writes around an image
    is found by rendering it.

    Args:
        template: Chat template with `generation` blocks; an image is a part of type `image`.
        tokenizer: The checkpoint's tokenizer.

    Raises:
        ValueError: The text around an image is not the same for all images.
    """
    plain = re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", r"{#\1 \3#}", template)
    before, after = _around(template, tokenizer)
    rendered = _PRELUDE.replace("BEFORE", _quoted(before)).replace("AFTER", _quoted(after)) + plain

    # Check it on a few conversations.
    for conversation in _CONVERSATIONS:
        own = _render(template, tokenizer, conversation).replace(IMAGE_TOKEN, _MARK)
        try:
            is_same = _render(rendered, tokenizer, _as_marked(conversation)) == own
        except ConversationRefused:
            is_same = False
        if not is_same:
            raise ValueError(
                "the chat template writes images in a way that llama.cpp cannot reproduce: write "
                "them as the templates of mipha do, one placeholder and the text behind it, "
                "wherever they stand"
            )
    return rendered


_IMAGE = {"type": "image"}
_CONVERSATIONS = (
    [{"role": "user", "content": [{"type": "text", "text": "A?"}]}],
    [{"role": "user", "content": [_IMAGE, {"type": "text", "text": "A?"}]}],
    [
        {"role": "user", "content": [_IMAGE, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b."}]},
        {"role": "user", "content": [{"type": "text", "text": "C?"}]},
    ],
)


def _around(template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the text before and after an image's token, inside a message."""
    texts = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
    rendered = _render(
        template, tokenizer, [{"role": "user", "content": [texts[0], _IMAGE, texts[1]]}]
    )
    found = re.search(f"first(.*){re.escape(IMAGE_TOKEN)}(.*)second", rendered, flags=re.DOTALL)
    if not found:
        raise ValueError(
            f"the chat template writes no {IMAGE_TOKEN} for a part of type image: "
            "give the checkpoint a template that does"
        )
    return found[1], found[2]


def _as_marked(conversation: list[dict]) -> list[dict]:
    """Return the conversation as llama.cpp hands it to a template."""
    return [
        {
            "role": message["role"],
            "content": "".join(
                _MARK if part is _IMAGE else part["text"] for part in message["content"]
            ),
        }
        for message in conversation
    ]


def _render(template: str, tokenizer: PreTrainedTokenizerBase, conversation: list[dict]) -> str:
    ends_with_answer = conversation[-1]["role"] == "assistant"
    return write_chat(
        tokenizer, conversation, template, "the chat template", prompt=not ends_with_answer
    )


def _quoted(text: str) -> str:
    """Return a text as a Jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
