"""The verbs that take a folder pass the gate, and refuse weights that are not finite."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mipha import rendering
from mipha.assistant import load
from mipha.assistant.assistant import render_prompt
from mipha.models.build import build, save_checkpoint
from mipha.models.checkpoint_folder import check_finite, check_finite_folder
from mipha.models.modeling import load_model
from mipha.models.processing import load_processor

PROJECTOR = "multi_modal_projector.linear_1.weight"


@pytest.fixture
def folder(tiny_model: Callable, tmp_path: Path) -> Path:
    """A LLaVA to spoil."""
    save_checkpoint(*tiny_model("llama", "siglip"), tmp_path / "model")
    return tmp_path / "model"


def plant(path: Path, name: str, value: float) -> None:
    """Put one number into the middle of a tensor of a safetensors file."""
    weights = load_file(path)
    flat = weights[name].reshape(-1)
    flat[len(flat) // 2] = value
    save_file(weights, path, metadata={"format": "pt"})


def _load(folder: Path, out: Path) -> object:
    from mipha.assistant import load

    return load(folder, "cpu")


def _verify(folder: Path, out: Path) -> object:
    from mipha.deploy.verify import verify

    return verify(folder, "cpu")


def _export(folder: Path, out: Path) -> object:
    from mipha.deploy.model_card import export_for_hub

    return export_for_hub(folder, out)


def _export_gguf(folder: Path, out: Path) -> object:
    from mipha.deploy.gguf.export import export_gguf

    return export_gguf(folder, out)


def _evaluate(folder: Path, out: Path) -> object:
    from mipha.evaluation.evaluate import evaluate

    return evaluate(folder, ["easy_vqa"], None, 4, 2, None, out, device="cpu", progress=False)


def _chat(folder: Path, out: Path) -> object:
    from mipha.cli.deployment import chat

    return chat(folder, None, "float32")


VERBS = (_load, _verify, _export, _export_gguf, _evaluate, _chat)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_passes_the_gate(folder: Path, verb: Callable, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a key")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes\.txt is a link out of the folder"):
        verb(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("verb", "value"),
    [
        *((verb, float("nan")) for verb in VERBS),
        *((verb, sign * float("inf")) for verb in (_load, _export) for sign in (1, -1)),
    ],
)
def test_every_verb_refuses_weights_that_are_not_finite(
    folder: Path, verb: Callable, value: float, tmp_path: Path
) -> None:
    plant(folder / "model.safetensors", PROJECTOR, value)
    with pytest.raises(ValueError, match=r"linear_1\.weight hold numbers that are not finite"):
        verb(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_a_pretrained_part_that_is_not_finite_is_refused(
    tiny_parts: Callable, part: str, tmp_path: Path
) -> None:
    parts = tiny_parts()
    copy = Path(shutil.copytree(getattr(parts, part), tmp_path / part))
    name = next(iter(load_file(copy / "model.safetensors")))
    plant(copy / "model.safetensors", name, float("nan"))
    with pytest.raises(ValueError, match=f"{part}.* hold numbers that are not finite in float32"):
        build(parts.recipe(**{part: str(copy)}))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_any_type_of_weights_is_looked_at(dtype: torch.dtype) -> None:
    tensors = {"good": torch.ones(3, 5).to(dtype), "none": torch.ones(0, 4).to(dtype)}
    check_finite((tensors | {"ids": torch.ones(3, dtype=torch.int64)}).items(), "here")
    bad = torch.ones(3, 5)
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match="here: the weights bad hold numbers"):
        check_finite((tensors | {"bad": bad.to(dtype)}).items(), "here")


def test_weights_too_large_for_the_type_are_refused(folder: Path) -> None:
    plant(folder / "model.safetensors", PROJECTOR, 1e6)
    check_finite_folder(folder)
    load_model(str(folder))
    with pytest.raises(ValueError, match="not finite in float16"):
        load_model(str(folder), dtype=torch.float16)


def test_a_generation_config_of_a_stranger_keeps_its_special_tokens_alone(folder: Path) -> None:
    own = json.loads((folder / "generation_config.json").read_text())
    loud = {"num_beams": 1000, "repetition_penalty": 3.0, "min_length": 100, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(own | loud))
    generation = load_model(str(folder)).generation_config
    assert generation.eos_token_id == own["eos_token_id"]
    assert not generation.do_sample
    for name in ("num_beams", "repetition_penalty", "min_length"):
        assert getattr(generation, name) in (None, 0, 1, 1.0), name


@pytest.mark.parametrize("strange", [2**70, -1, "2", True])
def test_an_end_of_turns_that_is_no_token_is_refused(folder: Path, strange: Any) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, strange]}))
    with pytest.raises(ValueError, match="has eos_token_id="):
        load_processor(folder)


def test_rules_on_tokens_belong_to_a_model_and_are_checked(folder: Path) -> None:
    path = folder / "generation_config.json"
    own = json.loads(path.read_text())
    rules = {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": [8], "sequence_bias": [[[9], 1.5]]}
    path.write_text(json.dumps(own | rules))
    generation = load_model(str(folder)).generation_config
    assert {name: getattr(generation, name) for name in rules} == rules

    for rules in ({"bad_words_ids": [[10**6]]}, {"suppress_tokens": ["x"]}, {"sequence_bias": [1]}):
        path.write_text(json.dumps(own | rules))
        (name,) = rules
        with pytest.raises(ValueError, match=rf"sets {name} to .*: give token ids below"):
            load_model(str(folder))


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}",
        "{% include 'other' %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__bases__[0].__subclasses__() }}",
    ],
)
def test_a_template_that_fails_is_one_sentence(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=r"chat_template\.jinja cannot write a conversation"):
        load_processor(folder)


@pytest.mark.parametrize("content", ["m.content", "'' + m.content"])
def test_a_template_that_is_made_for_text_gets_text(folder: Path, content: str) -> None:
    template = f"{{% for m in messages %}}{{{{ m.role + ':' }}}}{{{{ {content} }}}}{{% endfor %}}"
    (folder / "chat_template.jinja").write_text(template)
    assert render_prompt(load_processor(folder), "Red?", 1) == "user:<image>\nRed?"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer.json", {"model": 1}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("processor_config.json", {"image_processor": {"size": "x"}}),
    ],
)
def test_a_processor_that_cannot_be_read_is_one_sentence(
    folder: Path, name: str, changes: dict[str, Any]
) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match="model cannot be read: copy their files again"):
        load_processor(folder)


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "x"}, {"rope_parameters": 5}, {"model_type": "nothing"}]
)
def test_a_config_that_transformers_cannot_read_is_one_sentence(
    folder: Path, changes: dict[str, Any]
) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cannot be loaded as a LLaVA: check its config\.json"):
        load_model(str(folder))


LONG_LOOP = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        LONG_LOOP,
        "{% macro a(n) %}{% if n %}{{ a(n - 1) ~ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    ],
)
def test_a_template_that_does_not_end_is_refused(
    folder: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "TEMPLATE_SECONDS", 0.2)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=r"chat_template\.jinja takes longer than 0\.2 seconds"):
        load_processor(folder)


def test_a_template_whose_numbers_do_not_end_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ 9 ** 9 ** 9 ** 9 }}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja holds the operator \*\*"):
        load_processor(folder)


def test_a_template_that_does_not_end_with_one_question_fails_that_question(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "chat_template.jinja"
    trap = "{% if 'blue' in messages[-1].content | string %}" + LONG_LOOP + "{% endif %}"
    path.write_text(trap + path.read_text())
    assistant = load(folder)
    monkeypatch.setattr(rendering, "TEMPLATE_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"the chat template takes longer than 0\.5 seconds"):
        assistant.answer(None, "Is it blue?")
    assert assistant.answer(None, "Is it red?", max_new_tokens=2).num_tokens >= 0
