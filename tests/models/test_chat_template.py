"""Chat templates of other people: used in the way that they are made for, or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from mipha.models.chat_template import (
    PARTS_TO_TEXT,
    end_of_turn,
    fit_template,
    trainable_template,
)
from mipha.models.processing import load_template
from mipha.preflight import CHAT_TEMPLATES

trl = pytest.importorskip("trl")
SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"))

# A prompt of these ends in <think>, and no text that they train on does.
OTHER_PROMPT = {"deepseek_r1_distill", "deepseekv3"} | {
    f"nemotron_3_{size}" for size in ("5_lightning", "nano", "super", "ultra")
}
NO_END = {"llava_next"}
"""Their answers end in no token."""

_TOKENS = re.compile(
    r"<[|｜][^<>\n]{1,40}[|｜]>|<(?:start|end)_of_turn>|<end_of_utterance>|<turn\|>"
)


def tokenizer_for(template: str) -> PreTrainedTokenizerBase:
    """A tokenizer of bytes that has the control tokens of a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<eos>", "<pad>", "<bos>"]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = bytes_of, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["a b"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>"
    )
    found = sorted(set(_TOKENS.findall(template)))
    tokenizer.add_special_tokens({"extra_special_tokens": [*found, "<image>"]})
    return tokenizer


def _chat(template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """What a template writes for a conversation of parts, and what of it is trained on."""
    image, words = {"type": "image"}, "What colour has it?"
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": words}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Dark blue it is."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Of course."}]},
    ]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    made = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = "".join(
        tokenizer.decode([token]) if mask else "\0"
        for token, mask in zip(made["input_ids"], made["assistant_masks"], strict=True)
    )
    return text, [piece for piece in marked.split("\0") if piece]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem.removesuffix("_training"))
def test_the_training_templates_of_trl(file: Path) -> None:
    name, template = file.stem.removesuffix("_training"), file.read_text()
    tokenizer = tokenizer_for(template)
    if name in OTHER_PROMPT:
        with pytest.raises(ValueError, match=rf"{name}.*a prompt ends in '.*<think>\\n'"):
            load_template(str(file), tokenizer)
        return

    loaded = load_template(str(file), tokenizer)
    text, marked = _chat(loaded, tokenizer)
    assert "'type'" not in text and text.count("<image>") == 1
    assert text.count("What colour has it?") == text.count("Dark blue it is.") == 1
    assert len(marked) == 2 and "Dark blue it is." in marked[0] and "Of course." in marked[1]
    assert not any("colour" in piece or "Sure?" in piece for piece in marked)

    if name in NO_END:
        with pytest.raises(ValueError, match="which is no special token of this language model"):
            end_of_turn(tokenizer, loaded)
    else:
        end = tokenizer.decode([end_of_turn(tokenizer, loaded)])
        assert end in marked[1] and end.startswith("<") and end.endswith(">")


def test_there_are_templates_of_trl() -> None:
    assert len(SHIPPED) >= 28


def test_the_end_of_a_turn_may_be_followed_by_white_space() -> None:
    template = (SHIPPED[0].parent / "qwen2_5_training.jinja").read_text()
    tokenizer = tokenizer_for(template)
    assert template.count("'<|im_end|>\\n'") or "<|im_end|>" in template
    fitted = fit_template(template, tokenizer, "qwen")
    assert tokenizer.decode([end_of_turn(tokenizer, fitted)]) == "<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "vicuna", "llama-3", "phi-3", "gemma"])
def test_our_own_take_parts_as_they_are(name: str) -> None:
    template = (CHAT_TEMPLATES / f"{name}.jinja").read_text()
    assert fit_template(template, tokenizer_for(template), name) == template


_TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>BODY{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt }}"
)
_MARKED = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>{% endgeneration %}"


def _turns(body: str) -> str:
    return _TURNS.replace("BODY", body)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            _turns("{% generation %}{{ m.content }}<eos>{% endgeneration %}"),
            "it marks 4 stretches of tokens for 2 answers",
        ),
        (
            _turns("{{ m.content }}{% generation %}<eos>{% endgeneration %}"),
            "it marks 4 stretches of tokens for 2 answers",
        ),
        (
            _turns(_MARKED.replace("{{ m.content }}", "") + "{% else %}{{ m.content }}{% endif %}"),
            "it writes 'That is a green circle.' 0 times",
        ),
        (
            _turns(_MARKED + "{% else %}{{ m.content | upper }}{% endif %}"),
            "it writes 'Which shape is that, please[?]' 0 times",
        ),
        (
            _turns(_MARKED + "{% else %}{{ m.content | replace('<image>', '') }}{% endif %}"),
            "it writes <image> 0 times",
        ),
        (
            (_turns(_MARKED + "{% else %}{{ m.content }}{% endif %}")).replace(
                "'<|assistant|>' if", "'<|bot|>' if"
            ),
            r"a prompt ends in '.*<\|bot\|>' where .* is trained on",
        ),
        (
            (_turns("<x>" + _MARKED + "{% else %}{{ m.content }}{% endif %}")),
            "a prompt is followed by '<x>No, as I said",
        ),
        ("{% generation %}{% endgeneration %}{{ raise_exception('no') }}", r"it fails \(no\)"),
    ],
)
def test_a_template_that_does_not_mark_the_answers_is_refused(
    template: str, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    with pytest.raises(ValueError, match=rf"chat template {file} cannot be used: .*{reason}"):
        load_template(str(file), tokenizer_for(template + "<|user|><|assistant|><|bot|>"))


def test_a_template_made_for_text_gets_text() -> None:
    template = _turns(_MARKED + "{% else %}{{ m.content | trim }}{% endif %}")
    tokenizer = tokenizer_for(template + "<|user|><|assistant|>")
    fitted = fit_template(template, tokenizer, "mine")
    assert fitted == PARTS_TO_TEXT + template
    text, marked = _chat(fitted, tokenizer)
    assert text.startswith("<|user|><image>\nWhat colour has it?<|assistant|>Dark blue it is.<eos>")
    assert marked == ["Dark blue it is.<eos>", "Of course.<eos>"]


def test_a_template_that_writes_the_date_writes_a_fixed_one() -> None:
    template = "{{ strftime_now('%S') }}" + _turns(_MARKED + "{% else %}{{ m.content }}{% endif %}")
    tokenizer = tokenizer_for(template + "<|user|><|assistant|>")
    fitted = fit_template(template, tokenizer, "mine")
    assert _chat(fitted, tokenizer)[0].startswith("26 Jul 2024<|user|>")
    assert fit_template(fitted, tokenizer, "mine") == fitted


@pytest.mark.parametrize("content", ["m.content", "'' + m.content", "m.content[-1].text"])
def test_the_end_behind_an_answer_is_found_for_text_and_for_parts(content: str) -> None:
    template = _turns("{{ CONTENT }}<|end|>\n".replace("CONTENT", content))
    tokenizer = tokenizer_for(template + "<|user|><|assistant|>")
    assert tokenizer.decode([end_of_turn(tokenizer, template)]) == "<|end|>"
    for broken, reason in (("'a'", "does not write 'Which shape"), ("m.a.b", r"fails \(")):
        with pytest.raises(ValueError, match=f"^the chat template {reason}"):
            end_of_turn(tokenizer, template.replace(content, broken))


@pytest.mark.parametrize("is_marked", [True, False])
def test_a_template_may_write_another_placeholder(is_marked: bool) -> None:
    body = "{{ m.content | trim }}"
    for_text = _turns(_MARKED + "{% else %}" + body + "{% endif %}")
    part = "{{ '[IMG]' if p.type == 'image' else p.text }}"
    for_parts = for_text.replace(body, "{% for p in m.content %}" + part + "{% endfor %}").replace(
        "{{ m.content }}", "{{ m.content[0].text }}"
    )
    for template, preamble in ((for_parts, ""), (for_text, PARTS_TO_TEXT)):
        if not is_marked:
            for mark in ("{% generation %}", "{% endgeneration %}"):
                template = template.replace(mark, "")
        tokenizer = tokenizer_for(template + "[IMG]<|user|><|assistant|>")
        fitted = trainable_template(template, tokenizer, ["<eos>"], "mine", "[IMG]")
        assert fitted == preamble.replace("<image>", "[IMG]") + template
