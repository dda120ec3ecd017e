"""Every tower with every language model: composed, trained a step, saved, and read back by transformers alone."""

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
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlavaConfig

from mipha.assistant import Assistant
from mipha.data.sample import IMAGE, Message
from mipha.models.build import TOWERS, build, fit_tower, save_checkpoint
from mipha.models.modeling import load_model, num_image_tokens
from mipha.models.processing import load_processor
from mipha.models.projector import new_projector

FAMILIES = ("phi", "qwen2", "gpt_neox", "stablelm", "gemma", "llama")
TOWER_NAMES = ("siglip", "clip", "dinov2", "vit")
QUESTION = "Which colour is the circle?"

STOCK_READER = """
import json, sys
sys.modules["mipha"] = None  # an import of it would fail
import torch
from pathlib import Path
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

root, found = Path(sys.argv[1]), {}
messages = [{"role": "user", "content": [{"type": "image", "path": str(root / "image.png")}, {"type": "text", "text": sys.argv[2]}]}]
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    ours = torch.load(root / f"{folder.name}.pt", weights_only=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    # The stock class has no bias to put this into: what a runtime that knows Phi reads from the file.
    logits = logits + load_file(folder / "model.safetensors").get("language_model.lm_head.bias", torch.zeros(()))
    new = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1]:]
    found[folder.name] = {
        "class": type(model).__module__,
        "ids": inputs["input_ids"][0].tolist(),
        "pixels": (inputs["pixel_values"] - ours["pixels"]).abs().max().item(),
        "logits": (logits - ours["logits"]).abs().max().item(),
        "scale": ours["logits"].abs().max().item(),
        "answer": processor.decode(new, skip_special_tokens=True).strip(),
        "problems": [str(key) for kind in ("missing_keys", "mismatched_keys") for key in info.get(kind, ())],
        "left_over": sorted(map(str, info.get("unexpected_keys", ()))),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def read_back(tiny_parts: Callable, tmp_path_factory: pytest.TempPathFactory, picture: Image.Image) -> dict[str, dict[str, Any]]:
    """Each combination trained one step and saved; what it says here, and what it says in a process without mipha."""
    root = tmp_path_factory.mktemp("checkpoints")
    picture.save(root / "image.png")
    said = {}
    combinations = [(family, tower, 512, "chatml") for family in FAMILIES for tower in TOWER_NAMES]
    combinations += [("phi", "siglip", None, "vicuna"), ("qwen2", "clip", None, "chatml"), ("gemma", "vit", 512, "vicuna")]
    for family, tower, vocab_size, template in combinations:
        torch.manual_seed(0)
        model, processor = build(tiny_parts(family, tower, vocab_size).recipe(chat_template=template))
        assistant = Assistant(model, processor)
        ids = torch.tensor([assistant.prompt_ids([Message("user", f"{IMAGE}\n{QUESTION}")])])
        loss = model(input_ids=ids, pixel_values=assistant.pixels(picture), labels=ids).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=assistant.pixels(picture)).logits
        name = f"{family}-{tower}-{vocab_size}-{template}"
        save_checkpoint(model, processor, root / name)
        torch.save({"pixels": assistant.pixels(picture), "logits": logits}, root / f"{name}.pt")
        answer = assistant.answer(picture, QUESTION, max_new_tokens=8).text
        said[name] = {"loss": loss.item(), "gradients": gradients, "ids": ids[0].tolist(), "answer": answer, "folder": root / name}
    done = subprocess.run([sys.executable, "-c", STOCK_READER, root, QUESTION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stock = json.loads(done.stdout.splitlines()[-1])
    return {name: {"ours": said[name], "stock": stock[name]} for name in said}


def test_every_tower_and_language_model_train(read_back: dict, family: str, tower: str) -> None:
    ours = read_back[f"{family}-{tower}-512-chatml"]["ours"]
    assert np.isfinite(ours["loss"])
    without = {name for name, gradient in ours["gradients"].items() if gradient is None}
    # What the features never pass: the norm behind the layer that is read, the mask token.
    assert all("layernorm" in name or "post_layernorm" in name or "mask_token" in name or "pooler" in name for name in without)
    assert all("vision_tower" in name for name in without)
    given = [gradient for gradient in ours["gradients"].values() if gradient is not None]
    assert all(gradient.isfinite().all() for gradient in given)
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(gradient is not None and gradient.any() for name, gradient in ours["gradients"].items() if part in name)


def test_stock_transformers_reads_what_we_save(read_back: dict) -> None:
    for name, both in read_back.items():
        ours, stock = both["ours"], both["stock"]
        assert stock["class"] == "transformers.models.llava.modeling_llava", name
        assert stock["ids"] == ours["ids"], name
        assert stock["pixels"] == 0, name
        assert stock["problems"] == [], name
        assert stock["left_over"] == (["lm_head.bias"] if name.startswith("phi") else []), name
        assert stock["logits"] < 1e-5 * max(1, stock["scale"]), (name, stock["logits"], stock["scale"])
        if not name.startswith("phi"):
            assert stock["answer"] == ours["answer"], name
    assert len({both["ours"]["answer"] for both in read_back.values()}) > 10, "answers that do not depend on the model test nothing"


def test_the_keys_are_those_of_stock_llava(read_back: dict, family: str, tower: str, tmp_path: Path) -> None:
    """As `llava-hf` has them on the hub, which vLLM, SGLang and llama.cpp read by name."""
    folder = read_back[f"{family}-{tower}-512-chatml"]["ours"]["folder"]
    config = LlavaConfig.from_pretrained(folder)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    wanted = set(load_file(tmp_path / "model.safetensors")) | ({"language_model.lm_head.bias"} if family == "phi" else set())
    assert set(load_file(folder / "model.safetensors")) == wanted
    assert any(key.startswith("language_model.model.layers.0.") for key in wanted)


def test_a_checkpoint_of_the_stock_class_is_loaded(tmp_path: Path, tiny_model: Callable) -> None:
    model, _ = tiny_model()
    stock = transformers.LlavaForConditionalGeneration(model.config)
    stock.save_pretrained(tmp_path)
    ours = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in stock.state_dict().items())


def test_the_checkpoint_says_what_it_is(read_back: dict) -> None:
    folder = read_back["phi-siglip-512-chatml"]["ours"]["folder"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["PhiForCausalLM"]
    assert config["text_config"]["lm_head_bias"] is True
    assert config["vision_feature_layer"] == -1
    assert not any("mipha" in path.read_text() for path in folder.glob("*.json"))


def test_save_then_load_is_identity(read_back: dict, family: str, picture: Image.Image) -> None:
    ours = read_back[f"{family}-dinov2-512-chatml"]["ours"]
    model, processor = load_model(str(ours["folder"])), load_processor(ours["folder"])
    saved = torch.load(f"{ours['folder']}.pt", weights_only=True)
    assistant = Assistant(model, processor)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ours["ids"]]), pixel_values=assistant.pixels(picture)).logits
    assert torch.equal(logits, saved["logits"])
    assert torch.equal(assistant.pixels(picture), saved["pixels"])
    assert assistant.answer(picture, QUESTION, max_new_tokens=8).text == ours["answer"]


def test_load_refuses_a_checkpoint_that_lacks_a_weight(read_back: dict, tmp_path: Path) -> None:
    source = read_back["llama-siglip-512-chatml"]["ours"]["folder"]
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if "linear_1.weight" in name)]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit .*linear_1\.weight"):
        load_model(str(tmp_path))


def test_save_replaces_what_a_killed_save_left(tiny_model: Callable, tmp_path: Path) -> None:
    model, processor = tiny_model()
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "rubbish").touch()
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
    bare, size = AutoModelForCausalLM.from_pretrained(parts.language_model), len(AutoTokenizer.from_pretrained(parts.language_model))
    model, processor = build(parts.recipe())
    assert size <= model.config.image_token_id < 512
    assert processor.image_token_id == model.config.image_token_id
    assert torch.equal(model.get_input_embeddings().weight, bare.get_input_embeddings().weight)
    assert torch.equal(model.lm_head.weight, bare.get_output_embeddings().weight)


def test_a_full_vocabulary_gets_new_rows(tiny_parts: Callable, family: str) -> None:
    parts = tiny_parts(family, "siglip", None)
    bare, size = AutoModelForCausalLM.from_pretrained(parts.language_model), len(AutoTokenizer.from_pretrained(parts.language_model))
    model, _ = build(parts.recipe())
    assert bare.config.vocab_size == size == model.config.image_token_id
    assert model.config.text_config.vocab_size == len(model.get_input_embeddings().weight) == len(model.lm_head.weight) == 448
    ids = torch.randint(4, size, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits[..., :size], bare(input_ids=ids).logits, atol=1e-6)


def test_dead_layers_are_dropped_and_the_features_stay(tiny_parts: Callable, tower: str) -> None:
    parts = tiny_parts("llama", tower)
    whole = load_tower(parts.vision_tower)
    size = whole.config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    seen = []
    for layer in (-2, -1, 1):
        model, _ = build(parts.recipe(feature_layer=layer))
        model.model.multi_modal_projector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            model.get_image_features(pixels)
            wanted = whole(pixels, output_hidden_states=True).hidden_states[layer]
        wanted = wanted[:, 1:] if tower != "siglip" else wanted
        assert seen[-1].shape == wanted.shape
        assert (seen[-1] - wanted).abs().max() < 1e-5, layer
        assert model.config.vision_config.num_hidden_layers == {-2: 2, -1: 3, 1: 1}[layer]
    assert not any("head" in name for name, _ in model.model.vision_tower.named_parameters())
    assert (seen[0] - seen[1]).abs().max() > 1e-2, "layers that are all the same test nothing"


@pytest.mark.parametrize("layer", [0, 4, -4, 99])
def test_a_layer_that_is_not_there_is_refused(tiny_parts: Callable, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"feature_layer={layer} does not exist: this tower has 3 layers"):
        build(tiny_parts().recipe(feature_layer=layer))


def test_an_image_smaller_than_a_patch_is_refused(tiny_parts: Callable) -> None:
    with pytest.raises(ValueError, match="image_size=13 is smaller than the tower's patch of 14 pixels"):
        build(tiny_parts().recipe(image_size=13))


def test_another_resolution(tiny_parts: Callable, tower: str, picture: Image.Image) -> None:
    parts = tiny_parts("llama", tower)
    whole = load_tower(parts.vision_tower)
    patch = whole.config.patch_size
    model, processor = build(parts.recipe(image_size=5 * patch))
    assert num_image_tokens(model.config) == model.config.image_seq_length == 25
    assistant = Assistant(model, processor)
    assert assistant.prompt_ids([Message("user", f"{IMAGE}\nWhat?")]).count(processor.image_token_id) == 25
    assert assistant.pixels(picture).shape == (1, 3, 5 * patch, 5 * patch)
    assert assistant.answer(picture, "What?", max_new_tokens=2).num_tokens > 0
    old, new = positions(whole), positions(model.model.vision_tower)
    extra = 0 if tower == "siglip" else 1
    assert len(new) == 25 + extra
    assert torch.equal(new[:extra], old[:extra])
    # Resizing keeps the mean of a smooth table, nearly, and its corners stay in their corners.
    grid, before = new[extra:].reshape(5, 5, -1), old[extra:].reshape(whole.config.image_size // patch, -1, old.shape[-1])
    for row in (0, -1):
        for column in (0, -1):
            nearest = (before.reshape(-1, before.shape[-1]) - grid[row, column]).norm(dim=-1).argmin()
            assert nearest == (row % len(before)) * len(before) + column % len(before)


def test_the_same_resolution_changes_no_weight(tiny_parts: Callable, tower: str) -> None:
    whole = load_tower(tiny_parts("llama", tower).vision_tower)
    same = fit_tower(whole, -1, whole.config.image_size).state_dict()
    before = whole.state_dict()
    assert same and all(torch.equal(value, before[name]) for name, value in same.items())


def test_a_smooth_position_table_stays_smooth(tiny_parts: Callable) -> None:
    """A ramp from left to right is a ramp at any size, and down the rows it stays constant."""
    whole = load_tower(tiny_parts("llama", "vit").vision_tower)
    with torch.no_grad():
        ramp = torch.arange(4.0).repeat(4)[:, None].expand(16, whole.config.hidden_size)
        whole.embeddings.position_embeddings[0, 1:] = ramp
    table = positions(fit_tower(whole, -1, 8 * 8))[1:].reshape(8, 8, -1)
    assert torch.allclose(table, table[:1].expand_as(table), atol=1e-5)
    steps = table[0, 1:, 0] - table[0, :-1, 0]
    assert (steps > 0).all()
    assert torch.allclose(steps[2:-2], torch.full((3,), 0.5), atol=0.05)


@pytest.mark.parametrize("kind", ["Siglip", "CLIP"])
def test_a_tower_is_taken_out_of_a_model_of_images_and_text(tiny_parts: Callable, kind: str, tmp_path: Path) -> None:
    """What the hub has under `google/siglip-so400m-patch14-384` and `openai/clip-vit-large-patch14-336`."""
    parts = tiny_parts("llama", kind.lower())
    alone = load_tower(parts.vision_tower)
    text = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 9}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=alone.config.to_dict())
    both = getattr(transformers, f"{kind}Model")(config)
    getattr(both.vision_model, "vision_model", both.vision_model).load_state_dict(alone.state_dict())
    both.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text((parts.vision_tower / "preprocessor_config.json").read_text())
    model, processor = build(parts.recipe(vision_tower=str(tmp_path)))
    wanted, _ = build(parts.recipe())
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    features = [one.model.vision_tower(pixels).last_hidden_state for one in (model, wanted)]
    assert torch.equal(*features)
    save_checkpoint(model, processor, tmp_path / "saved")
    assert load_model(str(tmp_path / "saved")).config.vision_config.model_type == f"{kind.lower()}_vision_model"


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
        assert torch.equal(getattr(projectors["gemma"].linear_1, name), getattr(projectors["llama"].linear_1, name))
        scaled, plain = getattr(projectors["gemma"].linear_2, name), getattr(projectors["llama"].linear_2, name)
        assert torch.allclose(scaled, plain * 32**0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vision_tower": "siglip-so400m-348"}, FileNotFoundError, "no vision tower 'siglip-so400m-348': did you mean siglip-so400m-384"),
        ({"language_model": "phi2"}, FileNotFoundError, "no language model 'phi2': did you mean phi-2"),
        ({"language_model": "./models/phi"}, FileNotFoundError, "no language model './models/phi'.* or give a folder or a hub id"),
        ({"chat_template": "vicunia"}, FileNotFoundError, "no chat template 'vicunia': did you mean vicuna"),
        ({"chat_template": None}, ValueError, "has no chat template: set model.chat_template"),
    ],
)
def test_a_name_that_is_not_there_gets_a_sentence(tiny_parts: Callable, change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build(tiny_parts().recipe(**change))


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_a_hub_id_that_cannot_be_reached_gets_one_sentence(tiny_parts: Callable, part: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{part.replace('_', ' ')} 'nobody/nothing'") as caught:
        build(tiny_parts().recipe(**{part: "nobody/nothing"}))
    assert "\n" not in str(caught.value)
    assert "network" in str(caught.value)


def test_a_language_model_is_no_tower(tiny_parts: Callable) -> None:
    with pytest.raises(ValueError, match="is a 'llama': a tower is one of clip"):
        build(tiny_parts().recipe(vision_tower=str(tiny_parts().language_model)))


def test_a_template_that_marks_nothing_is_refused(tiny_parts: Callable, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}")
    with pytest.raises(ValueError, match=r"mine\.jinja marks nothing to train on"):
        build(tiny_parts().recipe(chat_template=str(template)))


def test_the_biased_head_is_in_the_file(read_back: dict) -> None:
    for name, both in read_back.items():
        with safe_open(both["ours"]["folder"] / "model.safetensors", "pt") as file:
            assert ("language_model.lm_head.bias" in file.keys()) == name.startswith("phi")  # noqa: SIM118


def load_tower(folder: Path) -> torch.nn.Module:
    return TOWERS[AutoModel.from_pretrained(folder).config.model_type].from_pretrained(folder).eval()


def positions(tower: torch.nn.Module) -> torch.Tensor:
    """The position table, `(positions, width)`."""
    tables = [weight for name, weight in tower.named_parameters() if "position_embedding" in name]
    assert len(tables) == 1
    return tables[0].detach().reshape(-1, tables[0].shape[-1])
