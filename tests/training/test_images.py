"""Each kind of picture: built of parts, packed as separate, trained, resumed, read by stock."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mipha.assistant import Assistant, load
from mipha.data.collate import collate, to_device
from mipha.data.encode import encode
from mipha.data.packing import make_rows
from mipha.data.pixels import read_pixels
from mipha.data.sample import IMAGE, Message, Sample
from mipha.geometry import geometry_of
from mipha.models.build import (
    _has_exact_positions,
    build,
    load_parts_processor,
    save_checkpoint,
)
from mipha.models.modeling import parts
from mipha.recipe import Recipe, load_recipe
from mipha.training import loop
from mipha.training.pipeline import train

FIXTURES = Path(__file__).parents[1] / "fixtures" / "images"
KINDS: dict[str, dict[str, Any]] = {
    "tiles": {"image": "tiles"},
    "shuffled": {"image": "tiles", "shuffle": 2},
    "one-tile": {"image": "tiles", "shuffle": 2, "max_tiles": 1},
    "anyres": {"image": "anyres"},
    "native": {"image": "native", "min_image_tokens": 2, "max_image_tokens": 12},
}
SHAPES = ((40, 30), (30, 62), (97, 41), (28, 28))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for number, (width, height) in enumerate(SHAPES):
        blocks = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(blocks).save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(len(SHAPES))]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def made(tiny_parts: Callable, kind: str, family: str = "llama") -> tuple[Any, Any]:
    torch.manual_seed(0)
    return build(tiny_parts(family).recipe(**KINDS[kind]))


def samples(pictures: list[Path]) -> list[Sample]:
    """Return samples with one picture, none, two and three pictures."""
    shown = [[0], [], [1, 2], [3, 0, 1], [2]]
    found = []
    for number, places in enumerate(shown):
        question = "".join(f"{IMAGE}\n" for _ in places) + f"Which colour is shape {number}?"
        messages = (Message("user", question), Message("assistant", "It is red."))
        found.append(Sample(f"s{number}", messages, tuple(pictures[place] for place in places)))
    return found


def loss_and_gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch).loss_sum
        loss.backward()
        total += float(loss.detach())
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return total, gradients


@pytest.mark.parametrize("name", [*KINDS, "square", "squashed"])
def test_bytes_that_are_scaled_on_the_device_are_the_pixels_to_the_bit(
    tiny_parts: Callable, pictures: list[Path], name: str
) -> None:
    """And they are a quarter of the memory on their way there."""
    changes = KINDS.get(name, {"pad_to_square": name == "square"})
    _, processor = build(tiny_parts().recipe(**changes))
    rows = make_rows([encode(one, processor, 500) for one in samples(pictures)], 700, "packed")
    floats = collate(rows, processor)
    as_bytes = collate(rows, processor, as_bytes=True)
    assert ("pixel_scaling" in as_bytes) == (name != "native")
    if name != "native":
        pixels = as_bytes["pixel_values"]
        assert pixels.dtype == torch.uint8 and 4 * pixels.nbytes == floats["pixel_values"].nbytes

    moved = to_device(as_bytes, "cpu")
    assert moved.keys() == floats.keys()
    assert all(
        torch.equal(moved[key], value) and moved[key].dtype == value.dtype
        for key, value in floats.items()
        if isinstance(value, torch.Tensor)
    )


def test_pixels_are_scaled_by_the_mean_and_the_deviation_of_the_tower(
    tiny_parts: Callable, tmp_path: Path, kind: str
) -> None:
    recipe = tiny_parts().recipe(**KINDS[kind])
    tower = tmp_path / "tower"
    shutil.copytree(recipe.vision_tower, tower)
    settings = json.loads((tower / "preprocessor_config.json").read_text())
    mean, std = [0.1, 0.3, 0.5], [0.2, 0.4, 0.6]
    (tower / "preprocessor_config.json").write_text(
        json.dumps(settings | {"image_mean": mean, "image_std": std})
    )

    _, processor = build(recipe.model_copy(update={"vision_tower": str(tower)}))
    colour = (51, 102, 255)
    pixels = read_pixels([Image.new("RGB", (28, 28), colour)], processor)["pixel_values"]
    values = pixels.reshape(-1, 3) if kind == "native" else pixels.movedim(1, -1).reshape(-1, 3)
    wanted = (torch.tensor(colour) / 255 - torch.tensor(mean)) / torch.tensor(std)
    assert torch.allclose(values[0], wanted, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "gpt_neox"])
def test_packed_is_separate(
    tiny_parts: Callable, pictures: list[Path], kind: str, family: str
) -> None:
    model, processor = made(tiny_parts, kind, family)
    model.eval()
    encoded = [encode(sample, processor, 500) for sample in samples(pictures)]
    packed = collate(make_rows(encoded, 700, "packed"), processor)
    alone = [collate([row], processor) for row in make_rows(encoded, 500, "padded")]
    assert len(alone) == len(encoded) > len(packed["input_ids"])

    # Logits: of every token, found by the texts before it.
    total, gradients = loss_and_gradients(model, [packed])
    wanted, separate = loss_and_gradients(model, alone)
    assert total == pytest.approx(wanted, rel=1e-6)
    assert gradients.keys() == separate.keys()
    largest = max(float(gradient.abs().max()) for gradient in separate.values())
    for name, gradient in separate.items():
        assert float((gradient - gradients[name]).abs().max()) <= 1e-6 * largest, name


def test_a_shared_picture_is_one_of_its_own(
    tiny_parts: Callable, pictures: list[Path], kind: str
) -> None:
    model, processor = made(tiny_parts, kind)
    model.eval()
    asked = [
        Sample(
            f"q{number}",
            (Message("user", f"{IMAGE}\nIs it {number}?"), Message("assistant", "yes")),
            (pictures[2],),
        )
        for number in range(3)
    ]
    encoded = [encode(sample, processor, 500) for sample in asked]
    (row,) = make_rows(encoded, 500, "shared-image")
    assert len(row.images) == 1 and len(row) < sum(map(len, encoded))
    total, gradients = loss_and_gradients(model, [collate([row], processor)])
    alone = [collate([row], processor) for row in make_rows(encoded, 500, "padded")]
    wanted, separate = loss_and_gradients(model, alone)
    assert total == pytest.approx(wanted, rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in separate.values())
    for name, gradient in separate.items():
        assert float((gradient - gradients[name]).abs().max()) <= 1e-5 * largest, name


def test_every_weight_of_tower_and_projector_gets_a_gradient(
    tiny_parts: Callable, pictures: list[Path], kind: str
) -> None:
    model, processor = made(tiny_parts, kind)
    batch = collate(
        make_rows([encode(samples(pictures)[0], processor, 500)], 500, "packed"), processor
    )
    model(**batch).loss.backward()
    for module in (*parts(model).projector, *parts(model).vision_tower):
        idle = [name for name, value in module.named_parameters() if value.grad is None]
        assert all("post_layernorm" in name for name in idle) or not idle
    assert (
        getattr(model.model, "image_newline", batch["labels"]).grad is not None or kind != "anyres"
    )


def test_it_trains_resumes_to_the_same_bits_and_is_read_by_stock(
    tiny_run_recipe: Callable[..., Recipe],
    pictures: list[Path],
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = [f"model.{key}={value}" for key, value in KINDS[kind].items()]
    sizes = [f"stages.{name}.row_tokens=400" for name in ("pretrain", "finetune")]
    sizes += ["stages.finetune.max_steps=4", "stages.finetune.activation_checkpointing=true"]
    recipe = tiny_run_recipe(*keys, *sizes)
    whole = train(recipe, tmp_path / "whole")
    first = load_file(whole.checkpoint("finetune") / "model.safetensors")

    # A run that ends in its third step and goes on from the second is the same.
    optimize, taken = loop._optimize, []

    def stop_in_the_third(stage: Any, *arguments: Any, **options: Any) -> Any:
        if stage.name == "finetune":
            taken.append(stage)
            if len(taken) == 3:
                raise KeyboardInterrupt
        return optimize(stage, *arguments, **options)

    monkeypatch.setattr(loop, "_optimize", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "again")
    again = train(recipe, tmp_path / "again")
    assert len(taken) == 5, "steps 1 to 3, then 3 and 4"
    second = load_file(again.checkpoint("finetune") / "model.safetensors")
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    # The checkpoint answers, alone and in a batch, and its geometry is the recipe's.
    assistant = load(whole, device="cpu")
    _, processor = build(recipe.model)
    assert geometry_of(assistant.processor) == geometry_of(processor)
    pairs = [(picture, "Which colour?") for picture in pictures]
    pairs += [((pictures[0], pictures[2]), "Which is red?"), (None, "Is it?")]
    together = assistant.answer_many(pairs, max_new_tokens=6)
    assert [assistant.answer(*pair, max_new_tokens=6) for pair in pairs] == together


@pytest.mark.parametrize("kind", ["shuffled", "native"])
def test_a_run_starts_from_a_calibrated_projector(
    tiny_run_recipe: Callable[..., Recipe], tmp_path: Path, kind: str
) -> None:
    keys = [f"model.{key}={value}" for key, value in KINDS[kind].items()]
    keys += [f"stages.{name}.row_tokens=400" for name in ("pretrain", "finetune")]
    keys += ["model.calibrate_projector=true", "stages.finetune.max_steps=1"]
    run = train(tiny_run_recipe(*keys), tmp_path / "run")
    model = load(run.checkpoint("pretrain"), device="cpu").model
    plain, _ = build(run.recipe.model)
    before, after = (dict(one.named_parameters()) for one in (plain, model))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    norm = "model.vision_model.post_layernorm."
    assert any("projector" in name or "connector" in name for name in moved)
    # The tower is frozen; calibration has changed the norm that only the projector reads.
    assert {name for name in moved if "vision" in name} == (
        {f"{norm}weight", f"{norm}bias"} if kind == "shuffled" else set()
    )


def test_the_small_recipe_of_the_catalog_trains_at_toy_size(
    tiny_parts: Callable, tiny_data: Path, tmp_path: Path
) -> None:
    recipe, parts = load_recipe("mipha-2026-small"), tiny_parts()
    assert (recipe.model.image, recipe.model.shuffle, recipe.model.max_tiles) == ("tiles", 4, 4)
    toy = [
        f"model.vision_tower={parts.vision_tower}",
        f"model.language_model={parts.language_model}",
        "model.shuffle=2",
        "precision=float32",
    ]
    small = {"batch_size": 4, "row_tokens": 300, "max_steps": 1, "micro_batch_rows": 1}
    for stage in recipe.stages:
        toy.append(f"stages.{stage}.data={{dataset: messages, root: {tiny_data}}}")
        toy += [f"stages.{stage}.{key}={value}" for key, value in small.items()]
    run = train(recipe.override(*toy), tmp_path / "run")
    before = load_file(run.checkpoint("pretrain") / "model.safetensors")
    after = load_file(run.checkpoint("finetune") / "model.safetensors")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    for part in ("vision_model", "connector", "text_model"):
        assert any(name.startswith(f"model.{part}.") for name in moved), part


@pytest.mark.parametrize(
    "name", ["idefics3-llama-tied", "idefics3-phi-bias", "lfm2vl-qwen3-tiles", "next-siglip-qwen2"]
)
def test_a_checkpoint_of_each_class_is_tuned(
    tiny_run_recipe: Callable[..., Recipe], tmp_path: Path, name: str
) -> None:
    folder = FIXTURES / name
    plain = tiny_run_recipe()
    stage = plain.stages["finetune"].model_dump(mode="json", exclude_unset=True)
    stage |= {"row_tokens": 600, "max_steps": 2}
    stage["tuning"] |= {"language_model": "lora"}
    tree = {"name": "tune", "precision": "float32", "model": {"checkpoint": str(folder)}}
    recipe = Recipe.parse(tree | {"stages": {"tune": stage}}, source="tune")
    run = train(recipe, tmp_path / "run")
    before, after = (
        load_file(place / "model.safetensors") for place in (folder, run.checkpoint("tune"))
    )
    after = {key.replace("tower.vision_model.", "tower."): value for key, value in after.items()}
    assert before.keys() == after.keys()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert any("projector" in key or "connector" in key for key in moved)
    assert any("self_attn" in key and "vision" not in key for key in moved)
    assert load(run, device="cpu").answer(None, "What is it?", max_new_tokens=3).num_tokens


@pytest.mark.parametrize("kind", ["shuffled", "anyres", "native"])
@pytest.mark.parametrize("pads", ["true", "false"])
def test_a_stage_pads_squares_alone(
    tiny_run_recipe: Callable[..., Recipe], kind: str, pads: str
) -> None:
    keys = [f"model.{key}={value}" for key, value in KINDS[kind].items()]
    asked = f"stages.finetune.pad_to_square={pads}"
    with pytest.raises(ValueError, match=rf"{asked} is for images as squares, and .*leave it out"):
        tiny_run_recipe(*keys, asked)


def test_a_stage_does_not_pad_the_images_of_a_checkpoint_that_keeps_their_shape(
    tiny_run_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    stage = tiny_run_recipe().stages["finetune"].model_dump(mode="json", exclude_unset=True)
    stage |= {"row_tokens": 600, "pad_to_square": True}
    model = {"checkpoint": str(FIXTURES / "next-siglip-qwen2")}
    recipe = Recipe.parse({"name": "t", "model": model, "stages": {"tune": stage}}, source="t")
    with pytest.raises(ValueError, match="those of this model are anyres: leave it out"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tiles": 4}, "model.max_tiles=4 means nothing with model.image=square"),
        (
            {"image": "anyres", "shuffle": 2},
            "shuffle=2 means nothing with model.image=anyres",
        ),
        (
            {"image": "tiles", "pad_to_square": False},
            "pad_to_square=false is for model.image=square",
        ),
        ({"image": "tiles", "shuffle": 2, "max_tiles": 6}, "is no square: .* use 4 or 9"),
        ({"image": "tiles", "shuffle": 2, "max_tiles": 49}, "knows rows and columns 1 to 6"),
        ({"image": "native", "post_layernorm": False}, "post_layernorm=false cannot be had with"),
        ({"image": "native", "min_image_tokens": 300}, "more than model.max_image_tokens=256"),
        ({"image": "anyres", "token_cap": 2}, "token_cap=2 is not supported: LLaVA-OneVision"),
    ],
)
def test_a_key_without_effect_is_refused(
    tiny_parts: Callable, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_parts().recipe(**changes)


@pytest.mark.parametrize(
    ("tower", "changes", "message"),
    [
        ("dinov2", {"image": "tiles", "shuffle": 2}, "takes a SigLIP tower, and .* is a dinov2"),
        ("clip", {"image": "native"}, "model.image=native takes a SigLIP tower, and .* is a clip"),
        (
            "siglip",
            {"image": "tiles", "shuffle": 3},
            "model.shuffle=3 does not divide the 2 x 2 patches of a tile of 28 pixels: use 2",
        ),
        (
            "siglip",
            {"image": "tiles", "shuffle": 2, "image_size": 560},
            "a tower of 40 x 40 patches gets wrong positions .* use model.image_size=504 or 588",
        ),
        ("siglip", {"image": "anyres", "max_tiles": 400}, "one image may take .* reads 512"),
    ],
)
def test_what_a_class_cannot_read_is_refused(
    tiny_parts: Callable, tower: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_parts_processor(tiny_parts("llama", tower).recipe(**changes))


def test_positions_of_idefics3_are_wrong_for_some_grids() -> None:
    wrong = {number for number in range(2, 78) if not _has_exact_positions(number)}
    known = {19, 25, 29, 31, 38, 40, 41, 43, 47, 49, 50, 54, 55, 58, 59, 61, 62, 67, 68}
    assert wrong == known | {71, 72, 73, 74, 76, 77}


def test_towers_of_the_classes_compute_what_the_siglip_computes(
    tiny_parts: Callable, pictures: list[Path]
) -> None:
    tower = {}
    for name in ("shuffled", "native"):
        model, _ = made(tiny_parts, name)
        (tower[name],) = parts(model).vision_tower
    torch.manual_seed(0)
    plain, _ = build(tiny_parts().recipe(post_layernorm=True))
    pixels = torch.rand(2, 3, 28, 28) * 2 - 1
    with torch.inference_mode():
        wanted = plain.model.vision_tower(pixels).last_hidden_state
        found = tower["shuffled"](
            pixel_values=pixels, patch_attention_mask=torch.ones(2, 2, 2, dtype=torch.bool)
        ).last_hidden_state
        patches = pixels.reshape(2, 3, 2, 14, 2, 14).permute(0, 2, 4, 3, 5, 1).reshape(2, 4, -1)
        native = tower["native"](
            pixel_values=patches,
            pixel_attention_mask=torch.ones(2, 4, dtype=torch.int32),
            spatial_shapes=torch.tensor([[2, 2], [2, 2]]),
        ).last_hidden_state
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(native, wanted, atol=5e-6, rtol=0)


def test_words_say_how_tiles_lie(tiny_parts: Callable, pictures: list[Path]) -> None:
    model, processor = made(tiny_parts, "tiles")
    (sample,) = samples(pictures)[4:]
    encoded = encode(sample, processor, 500)
    tile = IMAGE * 4
    row = f"{tile}\n" * 3
    text = processor.tokenizer.decode(encoded.input_ids)
    assert f"user\n1x3:\n{row}\n{tile}\nWhich colour" in text
    assert encoded.num_tiles == 4

    # What others may share ends behind the last tile, and the assistant begins in the same way.
    head = processor.tokenizer.decode(encoded.input_ids[: encoded.prefix])
    assert head.endswith(f"\n\n{tile}")
    prompt = Assistant(model, processor).prompt_ids(sample.messages[:1], sample.images)
    assert prompt == encoded.input_ids[: len(prompt)].tolist()


def test_a_saved_model_is_stock(tiny_parts: Callable, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForImageTextToText

    model, processor = made(tiny_parts, kind)
    save_checkpoint(model, processor, tmp_path / "model")
    stock, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(stock).__name__ == type(model).__name__ and type(stock) is not type(model)
