"""Every tower with every language model, each size and feature layer.

Each is composed, trained one step, saved, and read back by transformers alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaProcessor

from mipha.assistant import Assistant
from mipha.data.encode import IGNORE, encode
from mipha.data.regions import as_region
from mipha.data.sample import IMAGE, Message, Sample
from mipha.models.build import build, load_parts_processor, save_checkpoint
from mipha.models.modeling import load_model
from mipha.models.processing import load_processor
from mipha.models.projector import new_projector

FAMILIES = ("phi", "qwen2", "gpt_neox", "stablelm", "gemma", "llama")
TOWER_NAMES = ("siglip", "clip", "dinov2", "vit")
QUESTION = "Which colour is the circle?"
LONGER = "Which colour is it, red or blue or green or grey?"
PATCH = {"siglip": 14, "clip": 14, "dinov2": 14, "vit": 8}

STOCK_READER = """
import json, sys
sys.modules["mipha"] = None  # an import of it would fail
import torch
from pathlib import Path
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

root, found = Path(sys.argv[1]), {}
image = {"type": "image", "path": str(root / "image.png")}
messages, longer = [
    [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
    for text in sys.argv[2:]
]
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ours = torch.load(root / f"{folder.name}.pt", weights_only=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    # The stock class drops this bias; a runtime that knows Phi reads it from the file.
    tensors = load_file(folder / "model.safetensors")
    logits = logits + tensors.get("language_model.lm_head.bias", torch.zeros(()))
    new = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1]:]
    processor.tokenizer.padding_side = "left"
    both = processor.apply_chat_template(
        [messages, longer],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    batch = model.generate(**both, max_new_tokens=8)[:, both["input_ids"].shape[1]:]
    found[folder.name] = {
        "class": type(model).__module__,
        "ids": inputs["input_ids"][0].tolist(),
        "pixels": (inputs["pixel_values"] - ours["pixels"]).abs().max().item(),
        "logits": (logits - ours["logits"]).abs().max().item(),
        "scale": ours["logits"].abs().max().item(),
        "answer": processor.decode(new, skip_special_tokens=True).strip(),
        "batch": [text.strip() for text in processor.batch_decode(batch, skip_special_tokens=True)],
        "problems": [
            str(key)
            for kind in ("missing_keys", "mismatched_keys")
            for key in info.get(kind, ())
        ],
        "left_over": sorted(map(str, info.get("unexpected_keys", ()))),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def read_back(
    tiny_parts: Callable, tmp_path_factory: pytest.TempPathFactory, image: Image.Image
) -> dict[str, dict[str, Any]]:
    """Each combination, trained one step and saved: its numbers here and without mipha."""
    root = tmp_path_factory.mktemp("checkpoints")
    image.save(root / "image.png")
    said = {}
    made = {
        f"{family}-{tower}": tiny_parts(family, tower).recipe()
        for family in FAMILIES
        for tower in TOWER_NAMES
    }
    made |= {
        f"llama-{tower}-larger": tiny_parts("llama", tower).recipe(image_size=5 * PATCH[tower])
        for tower in TOWER_NAMES
    }
    made |= {
        f"llama-{tower}-{layer}-normed": tiny_parts("llama", tower).recipe(
            feature_layer=layer, post_layernorm=True
        )
        for tower in TOWER_NAMES
        if tower != "clip"
        for layer in (-1, -2)
    }
    made["phi-siglip-full"] = tiny_parts("phi", "siglip", None).recipe(chat_template="vicuna")
    made["qwen2-clip-full"] = tiny_parts("qwen2", "clip", None).recipe()
    made["gemma-vit-vicuna"] = tiny_parts("gemma", "vit").recipe(chat_template="vicuna")
    for name, recipe in made.items():
        torch.manual_seed(0)
        model, processor = build(recipe)
        assistant = Assistant(model, processor)
        ids = torch.tensor([assistant.prompt_ids([Message("user", f"{IMAGE}\n{QUESTION}")])])
        loss = model(input_ids=ids, pixel_values=assistant.pixels(image), labels=ids).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=assistant.pixels(image)).logits
        save_checkpoint(model, processor, root / name)
        torch.save({"pixels": assistant.pixels(image), "logits": logits}, root / f"{name}.pt")
        batch = [
            answer.text
            for answer in assistant.answer_many(
                [(image, QUESTION), (image, LONGER)], max_new_tokens=8
            )
        ]
        answer = assistant.answer(image, QUESTION, max_new_tokens=8).text
        said[name] = {
            "loss": loss.item(),
            "gradients": gradients,
            "ids": ids[0].tolist(),
            "answer": answer,
            "batch": batch,
        }
        said[name] |= {"folder": root / name, "tokens": model.config.image_seq_length}
    done = subprocess.run(
        [sys.executable, "-c", STOCK_READER, root, QUESTION, LONGER], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    stock = json.loads(done.stdout.splitlines()[-1])
    return {name: {"ours": said[name], "stock": stock[name]} for name in said}


def test_every_tower_and_language_model_train(read_back: dict, family: str, tower: str) -> None:
    ours = read_back[f"{family}-{tower}"]["ours"]
    assert np.isfinite(ours["loss"])
    without = {name for name, gradient in ours["gradients"].items() if gradient is None}
    # What the features never pass: the norm behind the layer that is read, the mask token.
    assert all(
        "layernorm" in name or "post_layernorm" in name or "mask_token" in name or "pooler" in name
        for name in without
    )
    assert all("vision_tower" in name for name in without)
    given = [gradient for gradient in ours["gradients"].values() if gradient is not None]
    assert all(gradient.isfinite().all() for gradient in given)
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(
            gradient is not None and gradient.any()
            for name, gradient in ours["gradients"].items()
            if part in name
        )


def test_stock_transformers_reads_what_we_save(read_back: dict) -> None:
    for name, both in read_back.items():
        ours, stock = both["ours"], both["stock"]
        assert stock["class"] == "transformers.models.llava.modeling_llava", name
        assert stock["ids"] == ours["ids"], name
        assert stock["pixels"] == 0, name
        assert stock["problems"] == [], name
        assert stock["left_over"] == (["lm_head.bias"] if name.startswith("phi") else []), name
        assert stock["logits"] < 1e-5 * max(1, stock["scale"]), (
            name,
            stock["logits"],
            stock["scale"],
        )
        assert ours["batch"][0] == ours["answer"], name
        if not name.startswith("phi"):
            assert stock["answer"] == ours["answer"], name
            assert stock["batch"] == ours["batch"], name
    assert len({both["ours"]["answer"] for both in read_back.values()}) > 10, (
        "answers that do not depend on the model test nothing"
    )


def test_the_tokens_of_an_image_follow_its_size(read_back: dict, tower: str) -> None:
    """28 / 14 is 2 and 32 / 8 is 4 patches a side; the larger ones are of 5."""
    own = 16 if tower == "vit" else 4
    for name, tokens in ((f"llama-{tower}", own), (f"llama-{tower}-larger", 25)):
        ours = read_back[name]["ours"]
        image_token = load_processor(ours["folder"]).image_token_id
        assert ours["tokens"] == ours["ids"].count(image_token) == tokens


@pytest.mark.parametrize("tower", ["siglip", "dinov2", "vit"])
def test_the_feature_layer_and_its_norm_matter(read_back: dict, tower: str) -> None:
    kinds = (f"llama-{tower}", f"llama-{tower}--1-normed", f"llama-{tower}--2-normed")
    assert len({round(read_back[name]["ours"]["loss"], 4) for name in kinds}) == 3


def test_the_keys_are_those_of_llavas_on_the_hub(
    read_back: dict, family: str, tower: str, tmp_path: Path
) -> None:
    """The names of `llava-hf`, which vLLM, SGLang and llama.cpp read."""
    folder = read_back[f"{family}-{tower}"]["ours"]["folder"]
    keys = set(load_file(folder / "model.safetensors"))
    of_tower = "vision_tower.vision_model." if tower in ("clip", "siglip") else "vision_tower."
    assert (
        {key for key in keys if key.startswith("vision_tower.")}
        == {key for key in keys if key.startswith(of_tower)}
        != set()
    )
    assert any(key.startswith("language_model.model.layers.0.") for key in keys) or family in (
        "gpt_neox",
        "gpt2",
    )
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    stock.save_pretrained(tmp_path / "stock")
    head_bias = {"language_model.lm_head.bias"} if family == "phi" else set()
    assert set(load_file(tmp_path / "stock" / "model.safetensors")) | head_bias == keys, (
        "stock keeps the names that it read"
    )
    load_model(str(folder)).save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == keys


def test_a_checkpoint_without_the_prefix_gets_it_back(tmp_path: Path, tiny_model: Callable) -> None:
    model, processor = tiny_model()
    transformers.LlavaForConditionalGeneration(model.config).save_pretrained(tmp_path / "new")
    processor.save_pretrained(tmp_path / "new")
    assert any(
        key.startswith("vision_tower.encoder.")
        for key in load_file(tmp_path / "new" / "model.safetensors")
    ), "what stock writes"
    load_model(str(tmp_path / "new")).save_pretrained(tmp_path / "ours")
    assert any(
        key.startswith("vision_tower.vision_model.encoder.")
        for key in load_file(tmp_path / "ours" / "model.safetensors")
    )


def test_a_checkpoint_of_the_stock_class_is_loaded(tmp_path: Path, tiny_model: Callable) -> None:
    model, processor = tiny_model()
    stock = transformers.LlavaForConditionalGeneration(model.config)
    stock.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ours = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in stock.state_dict().items())


def test_the_checkpoint_says_what_it_is(read_back: dict) -> None:
    folder = read_back["phi-siglip"]["ours"]["folder"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["PhiForCausalLM"]
    assert config["text_config"]["lm_head_bias"] is True
    assert config["vision_feature_layer"] == -1
    assert not any("mipha" in path.read_text() for path in folder.glob("*.json"))


def test_save_then_load_is_identity(read_back: dict, family: str, image: Image.Image) -> None:
    ours = read_back[f"{family}-dinov2"]["ours"]
    model, processor = load_model(str(ours["folder"])), load_processor(ours["folder"])
    saved = torch.load(f"{ours['folder']}.pt", weights_only=True)
    assistant = Assistant(model, processor)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([ours["ids"]]), pixel_values=assistant.pixels(image)
        ).logits
    assert torch.equal(logits, saved["logits"])
    assert torch.equal(assistant.pixels(image), saved["pixels"])
    assert assistant.answer(image, QUESTION, max_new_tokens=8).text == ours["answer"]


def test_load_refuses_a_checkpoint_that_lacks_a_weight(read_back: dict, tmp_path: Path) -> None:
    source = read_back["llama-siglip"]["ours"]["folder"]
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if "linear_1.weight" in name)]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"do not fit .*\(missing: model.*linear_1\.weight\): give config"
    ):
        load_model(str(tmp_path))


def test_save_replaces_what_a_killed_save_left(tiny_model: Callable, tmp_path: Path) -> None:
    model, processor = tiny_model()
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "rubbish").touch()
    save_checkpoint(model, processor, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "rubbish").exists()


def test_text_alone_is_what_the_language_model_says(tiny_parts: Callable, family: str) -> None:
    parts = tiny_parts(family)
    bare = AutoModelForCausalLM.from_pretrained(parts.language_model)
    model, _ = build(parts.recipe())
    ids = torch.randint(4, 400, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, bare(input_ids=ids).logits)
    if family == "phi":
        assert bare.lm_head.bias.abs().max() > 0.5


def test_the_image_token_takes_an_unused_row(tiny_parts: Callable, family: str) -> None:
    parts = tiny_parts(family)
    bare, size = (
        AutoModelForCausalLM.from_pretrained(parts.language_model),
        len(AutoTokenizer.from_pretrained(parts.language_model)),
    )
    model, processor = build(parts.recipe())
    assert size <= model.config.image_token_id < 512
    assert processor.image_token_id == model.config.image_token_id
    assert torch.equal(model.get_input_embeddings().weight, bare.get_input_embeddings().weight)
    assert torch.equal(model.lm_head.weight, bare.get_output_embeddings().weight)


def test_a_full_vocabulary_gets_new_rows(tiny_parts: Callable, family: str) -> None:
    parts = tiny_parts(family, "siglip", None)
    bare, size = (
        AutoModelForCausalLM.from_pretrained(parts.language_model),
        len(AutoTokenizer.from_pretrained(parts.language_model)),
    )
    model, _ = build(parts.recipe())
    assert bare.config.vocab_size == size == model.config.image_token_id
    assert (
        model.config.text_config.vocab_size
        == len(model.get_input_embeddings().weight)
        == len(model.lm_head.weight)
        == 448
    )
    ids = torch.randint(4, size, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(
            model(input_ids=ids).logits[..., :size], bare(input_ids=ids).logits, atol=1e-6
        )


def test_the_projector_starts_from_the_seed_alone(tiny_parts: Callable) -> None:
    parts, starts = tiny_parts(), []
    for seed in (1, 1, 2, 1):
        torch.manual_seed(seed)
        model, _ = build(parts.recipe())
        starts.append(model.model.multi_modal_projector.linear_1.weight)
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[3])
    assert not torch.equal(starts[0], starts[2])


def test_gemma_image_features_are_scaled_as_its_words_are(tiny_parts: Callable) -> None:
    projectors = {}
    for family in ("gemma", "llama"):
        model, _ = build(tiny_parts(family).recipe())
        bare = AutoModelForCausalLM.from_pretrained(tiny_parts(family).language_model)
        torch.manual_seed(0)
        projectors[family] = new_projector(model.model.multi_modal_projector.to("meta"), bare)
    for name in ("weight", "bias"):
        assert torch.equal(
            getattr(projectors["gemma"].linear_1, name), getattr(projectors["llama"].linear_1, name)
        )
        scaled, plain = (
            getattr(projectors["gemma"].linear_2, name),
            getattr(projectors["llama"].linear_2, name),
        )
        assert torch.allclose(scaled, plain * 32**0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"vision_tower": "siglip-so400m-348"},
            FileNotFoundError,
            "no vision tower 'siglip-so400m-348': did you mean siglip-so400m-384",
        ),
        (
            {"language_model": "phi2"},
            FileNotFoundError,
            "no language model 'phi2': did you mean phi-2",
        ),
        (
            {"language_model": "./models/phi"},
            FileNotFoundError,
            "no language model './models/phi'.* or give a folder or a hub id",
        ),
        (
            {"chat_template": "vicunia"},
            FileNotFoundError,
            "no chat template 'vicunia': did you mean vicuna",
        ),
        ({"chat_template": None}, ValueError, "has no chat template: set model.chat_template"),
    ],
)
def test_a_name_that_is_not_there_gets_a_sentence(
    tiny_parts: Callable, change: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        build(tiny_parts().recipe(**change))


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_a_hub_id_that_cannot_be_reached_gets_one_sentence(tiny_parts: Callable, part: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=f"{part.replace('_', ' ')} 'nobody/nothing'"
    ) as caught:
        build(tiny_parts().recipe(**{part: "nobody/nothing"}))
    assert "\n" not in str(caught.value)
    assert "network" in str(caught.value)


def test_a_template_that_marks_nothing_is_refused(tiny_parts: Callable, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    with pytest.raises(ValueError, match=r"mine\.jinja marks nothing to train on"):
        build(tiny_parts().recipe(chat_template=str(template)))


def test_the_biased_head_is_in_the_file(read_back: dict) -> None:
    for name, both in read_back.items():
        with safe_open(both["ours"]["folder"] / "model.safetensors", "pt") as file:
            assert ("language_model.lm_head.bias" in file.keys()) == name.startswith("phi")  # noqa: SIM118


def test_the_processor_without_the_weights_is_that_of_the_built_model(
    tiny_parts, family: str
) -> None:
    recipe = tiny_parts(family, "clip").recipe(image_size=42)
    (_, whole), light = build(recipe), load_parts_processor(recipe)
    assert light.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    assert (
        light.image_token_id == whole.image_token_id and light.chat_template == whole.chat_template
    )
    assert light.image_processor.to_dict() == whole.image_processor.to_dict()
    assert (light.num_additional_image_tokens, light.patch_size) == (
        whole.num_additional_image_tokens,
        whole.patch_size,
    )


def test_a_wide_image_is_padded_or_squashed_as_the_recipe_says(tiny_model: Callable) -> None:
    wide = Image.new("RGB", (60, 20), "red")
    for pads in (True, False):
        images = tiny_model(pad_to_square=pads)[1].image_processor
        (pixels,) = images(wide, return_tensors="pt")["pixel_values"]  # (3, side, side)
        assert torch.equal(pixels[:, 0, 0], pixels[:, pixels.shape[1] // 2, 0]) != pads


def test_the_form_of_boxes_is_in_the_checkpoint(tiny_model: Callable, tmp_path: Path) -> None:
    model, processor = tiny_model(boxes="bbox_2d")
    save_checkpoint(model, processor, tmp_path / "saved")
    assert load_processor(tmp_path / "saved").boxes == "bbox_2d"
    stock = LlavaProcessor.from_pretrained(tmp_path / "saved")
    assert stock.patch_size == processor.patch_size

    path = tmp_path / "saved/processor_config.json"
    path.write_text(path.read_text().replace("bbox_2d", "nosuch"))
    with pytest.raises(ValueError, match="sets boxes to 'nosuch': use one of thousand, "):
        load_processor(tmp_path / "saved")


def test_a_sample_is_written_in_the_form_of_the_model(tiny_model: Callable) -> None:
    _, processor = tiny_model()
    region = as_region((10, 20, 30, 60), (100, 100), 0, "", "")
    turns = (Message("user", "<image>\nWhere?"), Message("assistant", "<region>"))
    sample = Sample("s", turns, (Path("a.png"),), regions=(region,))
    for form, text in ((None, "[100, 200, 300, 600]"), ("unit3", "[0.100, 0.200, 0.300, 0.600]")):
        processor.boxes = form
        encoded = encode(sample, processor, 1000)
        said = processor.tokenizer.decode(encoded.labels[encoded.labels != IGNORE])
        assert said.startswith(text)
