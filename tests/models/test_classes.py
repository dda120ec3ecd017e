"""Checkpoints of every class that transformers alone has made: ids, pixels, logits, answers.

`fixtures/images` holds what stock transformers makes of them (5.23, float32, Pillow).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    GenerationConfig,
    Idefics3Processor,
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Qwen3NextConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from mipha.api import train
from mipha.assistant import load
from mipha.checkpoint_files import read_checkpoint, read_processor
from mipha.data.images import image_list
from mipha.data.sample import IMAGE, Message, turns_of
from mipha.geometry import Native, geometry_of
from mipha.models.build import save_checkpoint
from mipha.models.features import join_inputs
from mipha.models.modeling import is_recurrent
from mipha.recipe import Recipe

FIXTURES = Path(__file__).parents[1] / "fixtures" / "images"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
IS_OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13
"""Whether images are resized otherwise than in the fixtures, by two of 256 levels at most."""


class Golden:
    """One fixture: the assistant, and each case with its prompt."""

    def __init__(self, name: str) -> None:
        self.folder = FIXTURES / name
        self.assistant = load(self.folder, device="cpu")
        self.cases = json.loads((self.folder / "cases.json").read_text())["cases"]
        self.reference = load_file(self.folder / "ref.safetensors")

    @property
    def is_native(self) -> bool:
        return isinstance(geometry_of(self.assistant.processor), Native)

    def messages(self, case: dict[str, Any]) -> list[Message]:
        return [
            Message(
                turn["role"],
                "".join(
                    f"{IMAGE}\n" if part["type"] == "image" else part["text"]
                    for part in turn["content"]
                ),
            )
            for turn in case["messages"]
        ]

    def prompt(self, case: dict[str, Any]) -> Any:
        images = [self.folder / image for image in case["images"]]
        return self.assistant.prompt(self.messages(case), images, max_new_tokens=6)

    @torch.inference_mode()
    def logits(self, prompt: Any) -> torch.Tensor:
        """Return the logits of the last position, from the inputs that training gives."""
        model = self.assistant.model
        inputs = {"input_ids": torch.tensor([prompt.ids])}
        if prompt.images and "batch_num_images" not in prompt.images[0].inputs:
            inputs |= join_inputs([image.inputs for image in prompt.images])
            return model(**inputs).logits[0, -1]
        embeddings = self.assistant.embeddings(inputs["input_ids"], prompt.images)
        return model(inputs_embeds=embeddings).logits[0, -1]


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_ids_are_those_of_the_stock_processor(golden: Golden) -> None:
    for case in golden.cases:
        assert golden.prompt(case).ids == case["input_ids"], case["name"]
        found = sum(image.num_tokens for image in golden.prompt(case).images)
        assert found == case["num_image_tokens"]


def test_pixels_are_those_of_the_stock_processor(golden: Golden) -> None:
    for case in golden.cases:
        images = golden.prompt(case).images
        if not images:
            continue
        inputs = join_inputs([image.inputs for image in images])
        for name in ("image_sizes", "spatial_shapes"):
            if name in case:
                assert inputs[name].tolist() == case[name]

        ours, shape = inputs["pixel_values"], case["pixels"]["pixel_values"]
        wanted = golden.reference[f"{case['name']}.pixels_every_97th"]
        theirs = torch.zeros(shape)
        if len(shape) == 5:  # (rows or pictures, most tiles, 3, height, width), padded with zeros
            counts = [image.inputs["pixel_values"].shape[0] for image in images]
            pieces = ours.split(counts if shape[0] == len(images) else [len(ours)])
            for row, tiles in zip(theirs, pieces, strict=True):
                row[: len(tiles)] = tiles
        elif golden.is_native:
            theirs[:, : ours.shape[1]] = ours
        else:
            theirs = ours
        # The stock processor of native images resizes with torchvision: two of 256 levels.
        tolerance = 0.0157 if golden.is_native or IS_OLD_PILLOW else 0
        assert theirs.shape == tuple(shape)
        torch.testing.assert_close(theirs.flatten()[::97], wanted, atol=tolerance, rtol=0)


def test_logits_are_those_of_the_stock_class(golden: Golden) -> None:
    for case in golden.cases:
        biased = golden.reference.get(f"{case['name']}.logits_with_head_bias")
        wanted = golden.reference[f"{case['name']}.logits"] if biased is None else biased
        is_resized_otherwise = golden.is_native or IS_OLD_PILLOW
        tolerance = 2e-2 if is_resized_otherwise and case["images"] else 5e-6
        torch.testing.assert_close(
            golden.logits(golden.prompt(case)), wanted, atol=tolerance, rtol=0
        )


def test_native_logits_are_exact_given_the_same_pixels(golden: Golden) -> None:
    if not golden.is_native:
        pytest.skip("the pixels of the others are equal already")
    for case in golden.cases:
        prompt = golden.prompt(case)
        if not prompt.images:
            continue
        levels = golden.reference[f"{case['name']}.pixel_levels"].float()
        inputs = join_inputs([image.inputs for image in prompt.images])
        mask = inputs["pixel_attention_mask"]
        length = mask.shape[1]
        exact = (levels[:, :length] - 127.5) / 127.5 * mask[..., None]
        with torch.inference_mode():
            logits = golden.assistant.model(
                input_ids=torch.tensor([prompt.ids]), **inputs | {"pixel_values": exact}
            ).logits[0, -1]
        wanted = golden.reference[f"{case['name']}.logits"]
        torch.testing.assert_close(logits, wanted, atol=5e-6, rtol=0)


def greedy(golden: Golden, prompts: list[Any]) -> list[list[int]]:
    """Answer with end tokens that do not stop, as the fixtures were made."""
    assistant, told = golden.assistant, [[] for _ in prompts]
    ends, assistant.end_tokens = assistant.end_tokens, set()

    def on_tokens(tokens: list[int | None]) -> list[int]:
        for row, token in zip(told, tokens, strict=True):
            row.append(token)
        return []

    saved = assistant.model.generation_config.eos_token_id
    assistant.model.generation_config.eos_token_id = None
    try:
        assistant.generate(prompts, on_tokens)
    finally:
        assistant.end_tokens = ends
        assistant.model.generation_config.eos_token_id = saved
    return told


def test_answers_are_those_of_the_stock_class_alone_and_in_a_batch(golden: Golden) -> None:
    if (golden.assistant.model.lm_head.bias) is not None:
        pytest.skip("the stock class drops the bias of the head")
    wanted = [case["generated"] for case in golden.cases]
    prompts = [golden.prompt(case) for case in golden.cases]
    assert [greedy(golden, [prompt])[0] for prompt in prompts] == wanted
    assert greedy(golden, prompts) == wanted


def test_questions_in_a_batch_are_answered_as_alone(golden: Golden) -> None:
    files = sorted(golden.folder.glob("images/*.png"))
    thin, dot = golden.folder, Image.new("RGB", (1, 1), (200, 10, 10))
    thin = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[:, None], (1, 9)))
    pairs = [
        (files[0], "What is this?"),
        (files[1], "What is this?"),
        (files[0], "Which colour?"),
        (files[:2], f"Is {IMAGE} like {IMAGE} or not?"),
        (files[1::-1], f"Is {IMAGE} like {IMAGE} or not?"),
        ([*files], "Which is taller?"),
        (dot, "What is this?"),
        (thin, "What is this?"),
        (None, "Hello?"),
    ]
    together = golden.assistant.answer_many(pairs, max_new_tokens=6)
    for pair, answer in zip(pairs, together, strict=True):
        assert golden.assistant.answer(*pair, max_new_tokens=6) == answer
    encoded = golden.assistant.encode_image(files[0])
    assert golden.assistant.answer(encoded, "What is this?", max_new_tokens=6) == together[0]
    streamed = "".join(golden.assistant.stream(files[:2], pairs[3][1], max_new_tokens=6))
    assert streamed.strip() == together[3].text


def test_a_saved_copy_is_the_same(golden: Golden, tmp_path: Path) -> None:
    assistant = golden.assistant
    save_checkpoint(assistant.model, assistant.processor, tmp_path / "copy")
    again = load(tmp_path / "copy", device="cpu")
    assert geometry_of(again.processor) == geometry_of(assistant.processor)
    # The towers of the hub have one prefix more, which every reader takes.
    saved = [
        {
            name.replace("vision_tower.vision_model.", "vision_tower."): value
            for name, value in load_file(folder / "model.safetensors").items()
        }
        for folder in (golden.folder, tmp_path / "copy")
    ]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    other = Golden(golden.folder.name)
    other.assistant = again
    for case in golden.cases:
        assert torch.equal(golden.logits(golden.prompt(case)), other.logits(other.prompt(case)))


def in_two_files(source: Path, folder: Path, *dropped: str) -> Path:
    """Return a copy of a checkpoint with its processor in the two files of earlier years."""
    shutil.copytree(source, folder)
    around = json.loads((folder / "processor_config.json").read_text())
    around.pop("video_processor", None)
    image = around.pop("image_processor")
    for name, content in (("processor", around), ("preprocessor", image)):
        kept = {
            key: value
            for key, value in content.items()
            if key not in dropped and value is not None  # as they were written then
        }
        (folder / f"{name}_config.json").write_text(json.dumps(kept))
    return folder


def test_the_layout_of_earlier_years_is_read_alike(golden: Golden, tmp_path: Path) -> None:
    folder = in_two_files(golden.folder, tmp_path / "old")
    processor = load(folder, device="cpu").processor
    assert geometry_of(processor) == geometry_of(golden.assistant.processor)
    image = Image.open(golden.folder / golden.cases[0]["images"][0])
    again = load(folder, device="cpu").image_inputs(image).inputs
    for name, value in golden.assistant.image_inputs(image).inputs.items():
        assert torch.equal(again[name], value)


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("onevision-siglip-llama-cap2", ["vision_aspect_ratio"]),
        ("idefics3-llama-tied", ["image_seq_len", "do_image_splitting", "size", "max_image_size"]),
    ],
)
def test_a_setting_that_old_files_lack_is_the_default_of_its_class(
    name: str, dropped: list[str], tmp_path: Path
) -> None:
    found = read_processor(in_two_files(FIXTURES / name, tmp_path / "old", *dropped))
    stock = {
        "vision_aspect_ratio": "anyres_max_9",  # the stock class cannot be made without torchvision
        "image_seq_len": signature(Idefics3Processor).parameters["image_seq_len"].default,
        **{key: getattr(Idefics3ImageProcessorPil, key) for key in dropped[1:]},
    }
    for key in dropped:
        assert (found | found["image_processor"])[key] == stock[key]


def test_an_image_may_take_more_tokens_than_a_small_model_has_words(tmp_path: Path) -> None:
    source = FIXTURES / "next-siglip-qwen2"
    most = max(max(tensor.shape) for tensor in read_checkpoint(source).tensors.values())
    shutil.copytree(source, tmp_path / "wide")
    config, processor = (
        json.loads((source / f"{name}.json").read_text()) for name in ("config", "processor_config")
    )
    side = config["vision_config"]["image_size"]
    grids = [[side, side * 90], [side * 90, side]]
    config["image_grid_pinpoints"] = processor["image_processor"]["image_grid_pinpoints"] = grids
    for name, content in (("config", config), ("processor_config", processor)):
        (tmp_path / "wide" / f"{name}.json").write_text(json.dumps(content))
    assert read_checkpoint(tmp_path / "wide").geometry.longest > most


def test_a_model_of_another_class_is_named_before_its_processor_fails(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "idefics3-llama-tied", tmp_path / "other")
    for name, old, new in (
        ("config", '"idefics3"', '"smolvlm"'),
        ("processor_config", "Idefics3Image", "SmolVLMImage"),
    ):
        path = tmp_path / "other" / f"{name}.json"
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match="holds a 'smolvlm', not a LLaVA"):
        load(tmp_path / "other", device="cpu")


def changed(source: Path, folder: Path, **settings: Any) -> Path:
    """Return a copy of a checkpoint with other settings of its image processor."""
    shutil.copytree(source, folder)
    content = json.loads((folder / "processor_config.json").read_text())
    content["image_processor"] |= settings
    (folder / "processor_config.json").write_text(json.dumps(content))
    return folder


def test_a_black_tile_that_is_zero_is_read_as_every_other(tmp_path: Path) -> None:
    source = FIXTURES / "idefics3-llama-tied"
    black = changed(source, tmp_path / "black", image_mean=[0.0] * 3, image_std=[1.0] * 3)
    assistant = load(black, device="cpu")
    image = Image.new("RGB", (96, 64))
    image.paste((255, 255, 255), (0, 0, 32, 32))  # one of six tiles
    inputs = assistant.image_inputs(image).inputs["pixel_values"]
    assert (inputs == 0).flatten(1).all(1).sum() == 5
    assert assistant.answer(image, "What is it?", max_new_tokens=3).num_tokens
    features = assistant.model.get_image_features(inputs).pooler_output
    nearly = assistant.model.get_image_features(inputs + 1e-7).pooler_output
    torch.testing.assert_close(features, nearly, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["idefics3-llama-tied", "llava-siglip-llama-several"])
def test_a_processor_that_does_not_resize_is_refused(name: str, tmp_path: Path) -> None:
    folder = changed(FIXTURES / name, tmp_path / "sized", do_resize=False)
    with pytest.raises(ValueError, match="do_resize is false, and the tower takes one size"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"do_normalize": False}, 51 / 255),
        ({"do_rescale": False, "image_mean": [0.0] * 3, "image_std": [3.0] * 3}, 17.0),
        ({"rescale_factor": 1 / 51, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 1.0),
    ],
)
def test_native_pixels_are_scaled_as_the_processor_says(
    settings: dict[str, Any], wanted: float, tmp_path: Path
) -> None:
    folder = changed(FIXTURES / "lfm2vl-llama-native", tmp_path / "scaled", **settings)
    inputs = load(folder, device="cpu").image_inputs(Image.new("RGB", (64, 64), (51, 51, 51)))
    assert torch.allclose(inputs.inputs["pixel_values"], torch.tensor(wanted))


def test_native_images_are_scaled_by_the_filter_of_the_processor(tmp_path: Path) -> None:
    source, image = FIXTURES / "lfm2vl-llama-native", Image.new("L", (200, 200))
    image.paste(255, (0, 0, 90, 200))
    own, nearest = (
        load(folder, device="cpu").image_inputs(image).inputs["pixel_values"]
        for folder in (source, changed(source, tmp_path / "nearest", resample=0))
    )
    assert set(nearest.unique().tolist()) == {-1.0, 1.0} and len(own.unique()) > 2


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LFM2-VL with its own language model, some of whose layers are convolutions."""
    source = FIXTURES / "lfm2vl-qwen3-tiles"
    folder = Path(shutil.copytree(source, tmp_path_factory.mktemp("lfm2") / "model"))
    config = Lfm2VlConfig.from_pretrained(folder)
    text = config.text_config
    config.text_config = Lfm2Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Lfm2VlForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(source)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


def test_a_recurrent_language_model_answers_in_a_batch_and_in_turns_as_alone(
    recurrent: Path,
) -> None:
    assistant = load(recurrent, device="cpu")
    files = sorted((FIXTURES / "lfm2vl-qwen3-tiles").glob("images/*.png"))
    pairs = [
        (files[0], "What is this?"),
        (files[0], "Which colour has it?"),
        (files[:2], "Which is taller?"),
        (None, "Hello?"),
    ]
    together = [answer.text for answer in assistant.answer_many(pairs, max_new_tokens=8)]
    alone = [
        assistant.generate(
            [
                assistant.prompt(
                    turns_of(question, len(image_list(shown))),
                    image_list(shown),
                    max_new_tokens=8,
                )
            ]
        )[0].text
        for shown, question in pairs
    ]
    assert together == alone and len(set(alone)) > 2

    chat, again = assistant.chat(files[0]), assistant.chat(files[0])
    for question in ("What is this?", "And what more?"):
        again.messages = list(chat.messages)
        again._forget()
        assert list(chat.ask(question, max_new_tokens=8)) == list(
            again.ask(question, max_new_tokens=8)
        )


def test_a_recurrent_language_model_trains_one_sample_a_row(
    recurrent: Path, tiny_run_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    stage = tiny_run_recipe().stages["finetune"].model_dump(mode="json", exclude_unset=True)
    stage |= {"row_tokens": 600, "max_steps": 2}
    tree = {"name": "tune", "precision": "float32", "model": {"checkpoint": str(recurrent)}}
    recipe = Recipe.parse(tree | {"stages": {"tune": stage}}, source="tune")
    with pytest.raises(ValueError, match=r"packing would let .* stages\.tune\.batching=padded"):
        train(recipe, tmp_path / "packed")
    run = train(recipe.override("stages.tune.batching=padded"), tmp_path / "padded")
    assert load(run, device="cpu").answer(None, "What is it?", max_new_tokens=3).num_tokens


@pytest.mark.parametrize("kinds", [["conv"], ["linear_attention"], ["full_attention"]])
def test_layers_that_carry_a_state_are_known(kinds: list[str]) -> None:
    text = Qwen3NextConfig(num_hidden_layers=1, layer_types=kinds)
    assert is_recurrent(text) == (kinds != ["full_attention"])
