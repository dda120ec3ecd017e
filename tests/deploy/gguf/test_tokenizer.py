"""llama.cpp with our fields and template tokenizes and renders as transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mipha.deploy.gguf.export import modelfile
from mipha.deploy.gguf.tokenizer import UNUSED, gguf_template, name_for, tokenizer_fields
from mipha.deploy.gguf.writer import write_gguf
from mipha.deploy.llama_cpp.library import Vocabulary
from mipha.deploy.model_card import PretrainedPart
from mipha.models.processing import load_template

MARK = "<__media_Xy12__>"
SYSTEM = {"role": "system", "content": "Be short."}

TEXTS = (
    "Hello, world! What is in the picture?",
    " before and behind  ",
    "\n\n\n",
    "a\n\nb\n c\r\n d\t\te",
    "   \n  \t x",
    "123456 7890.12 3,141 1.5e-3",
    "don't DON'T we'll It's'",
    "naïve café Straße Ωμέγα привет 你好世界 こんにちは",
    "🙂🙃👩‍👩‍👧 ٣٤٥ ½ Ⅷ \u200b\ufeffz",
    "(){}[]<>|_-+=*&^%$#@!~`\\\"'",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "x<|endoftext|>y <|im_end|> z",
    "def f(x):\n        return x**2\n",
    "https://a.b/c?d=e&f=1#g",
    "a" * 50,
    " ",
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{% generation %}{{ message.content + '<|im_end|>' }}"
    "{% endgeneration %}{% endfor %}"
)


def byte_level(*steps: Any, regex: bool = True, **facts: Any) -> Any:
    """A byte-level BPE that learned from the texts; some of its added tokens are not special."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(**facts))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    return tokenizer


def split(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(pattern), "isolated")


def digits() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Digits(individual_digits=True)


def sentence_piece(prepends: bool = False, swallows: bool = False) -> Any:
    """A SentencePiece BPE; its special tokens may swallow white space, as Phi-3's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), replace] if prepends else [replace]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        "\u2581", "merged_with_next"
    )  # only while it learns
    special = ["<unk>", "<s>", "</s>", *SPECIAL]
    known = special + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        TEXTS[:6] * 3,
        trainers.BpeTrainer(vocab_size=500, special_tokens=known, show_progress=False),
    )
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] in special
    ]
    for token in content["added_tokens"]:
        token["rstrip"] = swallows and token["content"] not in (
            "<unk>",
            "<s>",
            "<|endoftext|>",
            "<image>",
        )
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def fields_of(tokenizer: Any, folder: Path, num_rows: int = 600) -> tuple[Any, dict[str, Any]]:
    from transformers import PreTrainedTokenizerFast

    sentences = "<s>" in tokenizer.get_vocab()
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | (
        {"bos_token": "<s>", "unk_token": "<unk>"} if sentences else {}
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return fast, tokenizer_fields(
        content, fast, TEMPLATE, num_rows, [fast.eos_token_id, fast.pad_token_id]
    )


TOKENIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt-2": (byte_level, "gpt-2"),
    "smollm": (lambda: byte_level(digits()), "smollm"),
    "qwen2": (lambda: byte_level(split(WORDS % ""), regex=False), "qwen2"),
    "llama-3": (
        lambda: byte_level(split(WORDS % "{1,3}"), regex=False, ignore_merges=True),
        "llama-bpe",
    ),
    "three-digits": (lambda: byte_level(split(WORDS % "{1,3}"), regex=False), "dbrx"),
    "gemma": (sentence_piece, "default"),
    "llama-2": (lambda: sentence_piece(prepends=True), "default"),
    "phi-3": (lambda: sentence_piece(prepends=True, swallows=True), "default"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_reads_every_text_as_the_host_does(tmp_path: Path, name: str) -> None:
    make, rule = TOKENIZERS[name]
    fast, fields = fields_of(make(), tmp_path)
    assert fields["tokenizer.ggml.pre"] == rule
    called = name_for("mine", json.loads((tmp_path / "tokenizer.json").read_text()))
    assert ("phi-3" in called) == (name == "phi-3")
    write_gguf(tmp_path / "words.gguf", "llama", {"general.name": called, **fields}, [], "f32")
    vocabulary = Vocabulary(tmp_path / "words.gguf")
    differ = {
        text: vocabulary.tokenize(text)
        for text in TEXTS
        if vocabulary.tokenize(text) != fast(text, add_special_tokens=False).input_ids
    }
    vocabulary.close()
    assert differ == {}


def test_rows_and_special_tokens(tmp_path: Path) -> None:
    _, fields = fields_of(byte_level(), tmp_path)
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    types = dict(zip(values["tokens"], values["token_type"], strict=True))
    assert (
        len(values["tokens"]) == 600
        and values["tokens"][-1] == "[PAD599]"
        and types["[PAD599]"] == UNUSED
    )
    assert types["<|im_end|>"] == 3 and types["    "] == 4 and types["a"] == 1
    assert types["<image>"] == UNUSED  # a question that names it is not read as a image
    assert (values["eos_token_id"], values["eot_token_id"], values["padding_token_id"]) == (2, 0, 0)
    assert "bos_token_id" not in values and values["add_bos_token"] is False
    _, fields = fields_of(sentence_piece(), tmp_path)
    assert (
        fields["tokenizer.ggml.add_bos_token"] is True
        and fields["tokenizer.ggml.bos_token_id"] == 1
    )
    scores = dict(
        zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True)
    )
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert [scores["".join(pair)] for pair in merges[:3]] == [
        0,
        -1,
        -2,
    ]  # the earlier merged, the higher


def _prefixed() -> Any:
    from tokenizers import pre_tokenizers

    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def _lower() -> Any:
    from tokenizers import normalizers

    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def _unigram() -> Any:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(
        models.Unigram([(token, 0.0) for token in ("<unk>", *SPECIAL, "a")], unk_id=0)
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: byte_level(split(r"\w+"), regex=False),
            r"splits text into words by \[\('Split', '\\\\w\+'\), \('ByteLevel', False\)\]",
        ),
        (lambda: byte_level(ignore_merges=True), "looks words up whole"),
        (_prefixed, "puts a space before every text"),
        (_lower, "changes text by Lowercase"),
        (_unigram, "is a Unigram, not a plain BPE"),
    ],
)
def test_a_rule_that_llama_cpp_lacks_is_refused(
    tmp_path: Path, make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fields_of(make(), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_name_does_not_change_how_words_are_read(tmp_path: Path) -> None:
    fields_of(byte_level(), tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (
        name_for("my-Phi-3-like", content) == "my-phi 3-like"
    )  # with the name as it was llama.cpp would look for </s>, and end
    content["added_tokens"][0]["lstrip"] = True
    with pytest.raises(ValueError, match="swallow the white space beside them"):
        name_for("mine", content)


@pytest.fixture(scope="module")
def tokenizer(tiny_parts: Callable):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_parts("gemma").language_model)


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama-3", "phi-3", "vicuna"])
def test_the_mark_stands_where_the_image_stood(tokenizer, name: str) -> None:
    template = load_template(name, tokenizer)
    theirs = gguf_template(template, tokenizer)
    assert "generation -%}" not in theirs.replace("add_generation_prompt -%}", "")

    def render(template: str, *messages: dict) -> str:
        return tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=True, tokenize=False
        )

    words, image = {"type": "text", "text": 'What\'s "it"?'}, {"type": "image"}
    later = ({"role": "assistant", "content": "a cat"}, {"role": "user", "content": "Sure?"})
    for before in ((), (SYSTEM,)):
        own = render(template, *before, {"role": "user", "content": [image, words]}, *later)
        assert own.count("<image>\n") == 1 and own.startswith("<bos>")
        # llama.cpp makes one text of a message with an image; builds before 2026 pass on its parts
        for content in (MARK + words["text"], [{"type": "media_marker", "text": MARK}, words]):
            assert render(
                theirs, *before, {"role": "user", "content": content}, *later
            ) == own.replace("<image>", MARK)
        plain = ({"role": "user", "content": "Is a __> b?"}, *later)
        assert render(theirs, *before, *plain) == render(template, *before, *plain)


def test_a_template_without_images_is_refused(tokenizer) -> None:
    template = (
        "{% for message in messages %}{% for part in message.content %}{{ part.text }}"
        "{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="writes no <image> for a part of type image"):
        gguf_template(template, tokenizer)


def test_a_template_that_counts_images_is_refused(tokenizer) -> None:
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}{{ loop.index }}<image>\n{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"in a way that llama\.cpp cannot reproduce"):
        gguf_template(template, tokenizer)


def test_ollama_is_told_the_same(tokenizer) -> None:
    parts = [
        PretrainedPart("vision tower", "siglip-base-224", "x/y", "Apache-2.0", ""),
        PretrainedPart("language model", "mine", None, None, ""),
    ]
    told = modelfile(
        "model-q8_0.gguf",
        "mmproj-f16.gguf",
        tokenizer,
        load_template("vicuna", tokenizer),
        [2, 0],
        parts,
    )
    assert told.startswith('FROM ./model-q8_0.gguf\nFROM ./mmproj-f16.gguf\nTEMPLATE """')
    assert (
        '{{ if eq $last "" }}A chat between a curious user' in told and "<bos>" not in told
    )  # Ollama puts it in front
    assert (
        "{{ else }}<|im_end|>USER: {{ end }}" in told
        and "{{ .Content }}{{ end }} ASSISTANT:{{ else }} {{ .Content }}" in told
    )
    assert "{{ slice .Content 0 7 }}\n{{ slice .Content 7 }}" in told  # a new line behind the image
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n' in told
    assert told.endswith(
        'LICENSE """vision tower (siglip-base-224): Apache-2.0; '
        'language model (mine): not known"""\n'
    )


def test_a_system_turn_that_the_template_refuses_is_left_out(tokenizer) -> None:
    template = (
        "{% for message in messages %}"
        "{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% if message.content is string %}[{{ message.content }}]{% else %}"
        "{% for part in message.content %}{{ part.text or '<image>' }}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    told = modelfile("a", "b", tokenizer, template, [], [])
    assert (
        '{{ if eq .Role "system" }}{{ else if eq .Role "user" }}{{ if eq $last "" }}['
        '{{ else if eq $last "system" }}[{{ else }}][' in told
    )
