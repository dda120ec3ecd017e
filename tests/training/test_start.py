"""Training that starts from a checkpoint that somebody else made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from mipha.assistant import load
from mipha.checkpoint_files import read_checkpoint
from mipha.models.build import build, load_start_processor, save_checkpoint, skeleton
from mipha.preflight import check_parts
from mipha.recipe import CheckpointRecipe, Recipe
from mipha.run import Run
from mipha.training.pipeline import train
from tests.training.test_kill import killed_at, num_lines

Stock = Callable[..., Path]
ALL = {"vision_tower": "full", "projector": "full", "language_model": "full"}


def recipe_from(checkpoint: Path, data: Path, tuning: dict[str, Any] = ALL, **keys: Any) -> Recipe:
    stage = {
        "data": [{"dataset": "messages", "root": str(data)}],
        "tuning": tuning,
        "learning_rate": 5e-3,
        "batch_size": 6,
        "row_tokens": 200,
        "max_steps": 2,
        "checkpoint_every": 1,
    }
    tree = {
        "name": "further",
        "precision": "float32",
        "model": {"checkpoint": str(checkpoint)},
        "stages": {"tune": stage | keys},
    }
    return Recipe.parse(tree, source="further")


@pytest.mark.parametrize("layout", ["today", "2024"])
def test_a_stock_checkpoint_trains_and_stays_what_it_says(
    stock_llava: Stock, tiny_data: Path, tmp_path: Path, layout: str
) -> None:
    folder = stock_llava(layout=layout)
    before = read_checkpoint(folder)
    run = train(recipe_from(folder, tiny_data), tmp_path / "run")
    after = read_checkpoint(run.final_checkpoint())

    # All keys are there again, and the settings that a recipe of parts would decide.
    # The tower's keys get the hub's prefix, as in every checkpoint of ours.
    assert {name.replace("vision_model.", "") for name in after.tensors} == set(before.tensors)
    for key in ("vision_feature_layer", "vision_feature_select_strategy", "tie_word_embeddings"):
        assert after.config[key] == before.config[key]
    assert after.config["vision_config"]["num_hidden_layers"] == 3
    assert after.geometry.longest == before.geometry.longest == 4
    assert not after.processor["image_processor"]["do_pad"]
    assert after.processor["image_processor"]["crop_size"] == {"height": 28, "width": 28}

    # The layer behind the one that is read did not move, and all others did.
    old = load_file(folder / "model.safetensors")
    new = load_file(run.final_checkpoint() / "model.safetensors")
    new = {name.replace("vision_model.", ""): tensor for name, tensor in new.items()}
    still = {name for name in old if torch.equal(old[name], new[name])}
    assert any("vision_tower.encoder.layers.2" in name for name in still)
    assert not any("encoder.layers.1." in name or "language_model" in name for name in still)


@pytest.mark.parametrize("family", ["llama", "phi", "qwen2"])
def test_a_loaded_checkpoint_answers_as_transformers_alone(stock_llava: Stock, family: str) -> None:
    folder = stock_llava(family)
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    image = Image.effect_noise((41, 30), 90).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=image, return_tensors="pt")
    wanted = stock.generate(**inputs, max_new_tokens=8, do_sample=False)

    model, ours = build(CheckpointRecipe(checkpoint=str(folder)))
    assert torch.equal(stock(**inputs).logits, model(**inputs).logits)
    new = wanted[0, inputs["input_ids"].shape[1] :]
    answer = load(folder).answer(image, "What is it?", max_new_tokens=8)
    assert answer.text == ours.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert model.lm_head.bias is None


def test_a_bias_of_the_head_and_a_tied_head_stay(
    stock_llava: Stock, tiny_model: Callable[..., Any], tiny_data: Path, tmp_path: Path
) -> None:
    from mipha.models.build import save_checkpoint

    model, processor = tiny_model("phi", "siglip")
    save_checkpoint(model, processor, tmp_path / "ours")
    run = train(recipe_from(tmp_path / "ours", tiny_data), tmp_path / "biased")
    assert "language_model.lm_head.bias" in read_checkpoint(run.final_checkpoint()).tensors

    tied = stock_llava("qwen2", tie_word_embeddings=True)
    run = train(recipe_from(tied, tiny_data), tmp_path / "tied")
    assert "language_model.lm_head.weight" not in read_checkpoint(run.final_checkpoint()).tensors


@pytest.mark.parametrize("language_model", ["full", "lora"])
def test_a_killed_run_goes_on_bit_for_bit(
    stock_llava: Stock, tiny_data: Path, tmp_path: Path, language_model: str
) -> None:
    tuning = ALL | {"vision_tower": "frozen", "language_model": language_model}
    recipe = recipe_from(stock_llava(), tiny_data, tuning, max_steps=6, epochs=6)
    whole, run = train(recipe, tmp_path / "whole"), Run(tmp_path / "killed")
    killed = [
        killed_at(recipe, run.folder, lambda n=n: num_lines(run.metrics("tune")) >= n, 0.0)
        for n in (1, 3)
    ]
    assert any(killed), "both kills came after the end"
    train(recipe, run.folder)
    one, other = (load_file(r.final_checkpoint() / "model.safetensors") for r in (whole, run))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_another_checkpoint_in_its_place_is_refused(
    stock_llava: Stock, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stock_llava()
    recipe = recipe_from(folder, tiny_data)
    import mipha.training.pipeline as pipeline

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_prove", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    save_file(weights | {name: weights[name] + 1}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights of .* changed since .* put the old ones back"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_adapters_have_the_checkpoint_as_their_base(
    stock_llava: Stock, tiny_data: Path, tmp_path: Path, part: str
) -> None:
    folder = stock_llava()
    tuning = dict.fromkeys(ALL, "frozen") | {"projector": "full", part: "lora"}
    tuning |= {"lora": {"rank": 4, "alpha": 8}}
    run = train(recipe_from(folder, tiny_data, tuning), tmp_path / "run")
    assert not (run.stage("tune") / "base").exists()
    facts = json.loads((run.stage("tune") / "adapter" / "base.json").read_text())
    assert (run.stage("tune") / "adapter" / facts["folder"]).resolve() == folder.resolve()
    if part == "vision_tower":  # no adapter in the layer that nothing reads
        names = load_file(run.stage("tune") / "adapter" / "adapter_model.safetensors")
        assert not any("layers.2." in name for name in names)


def test_the_skeleton_has_the_shapes_of_the_checkpoint(stock_llava: Stock) -> None:
    for folder in (stock_llava("phi"), stock_llava("qwen2", layout="2024")):
        recipe = CheckpointRecipe(checkpoint=str(folder))
        made, (model, _) = skeleton(recipe).state_dict(), build(recipe)
        assert {name: tensor.shape for name, tensor in made.items()} == {
            name: tensor.shape for name, tensor in model.state_dict().items()
        }


# ---- Refusals, before a weight is read -----------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", ["llava_next", "idefics3", "lfm2_vl"])
def test_a_processor_of_another_class_is_refused(stock_llava: Stock, kind: str) -> None:
    folder = stock_llava()
    edit(folder / "config.json", model_type=kind)
    with pytest.raises(ValueError, match=f"makes square images, and a '{kind}' takes others"):
        check_parts(CheckpointRecipe(checkpoint=str(folder)))


@pytest.mark.parametrize("kind", ["paligemma", "qwen2_vl"])
def test_another_class_is_refused(stock_llava: Stock, kind: str) -> None:
    folder = stock_llava()
    edit(folder / "config.json", model_type=kind)
    with pytest.raises(ValueError, match=f"holds a '{kind}', not a LLaVA"):
        check_parts(CheckpointRecipe(checkpoint=str(folder)))


def test_missing_shards_are_named(stock_llava: Stock) -> None:
    folder = stock_llava()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of .* shards"):
        check_parts(CheckpointRecipe(checkpoint=str(folder)))


def test_a_processor_of_another_model_is_refused(stock_llava: Stock) -> None:
    recipe = CheckpointRecipe(checkpoint=str(folder := stock_llava()))
    edit(folder / "config.json", image_token_index=7)
    with pytest.raises(ValueError, match=r"writes token .* for an image, but the model wants 7"):
        load_start_processor(recipe)

    other = stock_llava()
    tokens = transformers.AutoTokenizer.from_pretrained(other)
    tokens.add_tokens([f"new {number}" for number in range(200)])
    tokens.save_pretrained(other)
    with pytest.raises(ValueError, match=r"the tokenizer has 6.. tokens, but the model 512"):
        load_start_processor(CheckpointRecipe(checkpoint=str(other)))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text or '<image>' }}"
            "{% endfor %}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt else '' }}",
            "follows an answer, and generation stops at",
        ),
        (None, "has no chat_template.jinja"),
    ],
)
def test_a_template_that_cannot_be_masked_is_refused_or_replaced(
    stock_llava: Stock, tiny_data: Path, tmp_path: Path, template: str | None, reason: str
) -> None:
    folder = stock_llava()
    path = folder / "chat_template.jinja"
    path.write_text(template) if template else path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        load_start_processor(CheckpointRecipe(checkpoint=str(folder)))

    # A template that is named takes its place, and answers then end where it ends them.
    recipe = recipe_from(folder, tiny_data).override("model.chat_template=chatml")
    run = train(recipe, tmp_path / "run")
    assert "generation" in (run.final_checkpoint() / "chat_template.jinja").read_text()


def test_a_template_beside_one_that_works_is_refused(stock_llava: Stock) -> None:
    recipe = CheckpointRecipe(checkpoint=str(stock_llava()), chat_template="vicuna")
    with pytest.raises(ValueError, match=r"contradicts .* own template can be trained on"):
        load_start_processor(recipe)


def test_a_form_of_boxes_is_chosen_for_a_checkpoint_that_has_none(
    stock_llava: Stock, tmp_path: Path
) -> None:
    folder = stock_llava()
    assert load_start_processor(CheckpointRecipe(checkpoint=str(folder))).boxes is None
    model, processor = build(CheckpointRecipe(checkpoint=str(folder), boxes="bbox_2d"))
    save_checkpoint(model, processor, tmp_path / "tuned")

    # The checkpoint says it from then on.
    tuned = str(tmp_path / "tuned")
    for boxes in (None, "bbox_2d"):
        recipe = CheckpointRecipe(checkpoint=tuned, boxes=boxes)
        assert load_start_processor(recipe).boxes == "bbox_2d"
    with pytest.raises(ValueError, match=r"boxes=loc contradicts .*to write boxes as bbox_2d"):
        load_start_processor(CheckpointRecipe(checkpoint=tuned, boxes="loc"))


def test_arguments_that_a_mask_needs_are_kept_in_the_checkpoint(
    stock_llava: Stock, tiny_data: Path, tmp_path: Path
) -> None:
    folder = stock_llava()
    path = folder / "chat_template.jinja"
    thinking = "{{ '<think>' if enable_thinking is not defined or enable_thinking else '' }}"
    path.write_text(
        path.read_text().replace("assistant\n{% endif", f"assistant\n{thinking}{{% endif")
    )
    run = train(recipe_from(folder, tiny_data), tmp_path / "run")
    kept = (run.final_checkpoint() / "chat_template.jinja").read_text()
    assert kept.startswith("{%- set enable_thinking = false -%}")


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint nowhere: give a run"):
        check_parts(CheckpointRecipe(checkpoint="nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither a run .* nor a whole model"):
        check_parts(CheckpointRecipe(checkpoint=str(tmp_path / "empty")))


def test_a_part_of_a_checkpoint_is_refused_in_a_recipe(stock_llava: Stock, tiny_data: Path) -> None:
    recipe = recipe_from(stock_llava(), tiny_data)
    with pytest.raises(ValueError, match="beside image_size, which the checkpoint decides"):
        recipe.override("model.image_size=56")
    with pytest.raises(ValueError, match="model: checkpoint is given beside vision_tower"):
        recipe.override("model.vision_tower=dinov2-small", "model.checkpoint=x")
    parts = recipe.override("model.vision_tower=dinov2-small", "model.language_model=phi-2")
    assert parts.override("model.checkpoint=x").model == CheckpointRecipe(checkpoint="x")


def test_image_processors_of_towers_make_the_same_pixels() -> None:
    import numpy as np

    from mipha.models.processing import IMAGE_PROCESSORS, _image_processor

    image = Image.effect_noise((97, 61), 90).convert("RGB")
    for name in IMAGE_PROCESSORS:
        own = getattr(transformers, f"{name}Pil")()
        settings = own.to_dict() | {"image_processor_type": name}
        for saved in (settings, {"image_processor_type": f"{name}Fast"}):
            ours = _image_processor(saved)
            assert np.array_equal(
                *(made(image, return_tensors="np")["pixel_values"] for made in (own, ours))
            ), name
