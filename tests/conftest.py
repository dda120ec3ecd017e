"""Tiny random parts on disk and data to train them on, shared by the tests of several rooms.

The fixtures that need torch and transformers import them, so that the tests of the light rooms stay
light.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from mipha.recipe import ModelRecipe, Recipe

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    from mipha.models.modeling import LlavaForConditionalGeneration

# Examples have no deadline, because test machines are shared. They are the same in every run, so
# that a change fails for what it breaks and not by chance.
settings.register_profile("untimed", deadline=None, derandomize=True)
settings.load_profile("untimed")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
for _setting in ("MIPHA_API_KEY", "MIPHA_DEBUG", "MIPHA_JUDGE_KEY"):  # those of the user's shell
    os.environ.pop(_setting, None)

_LANGUAGE_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi": ("PhiConfig", "PhiForCausalLM", {"partial_rotary_factor": 0.5, "resid_pdrop": 0.1}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"rotary_pct": 0.5}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {"num_key_value_heads": 4}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"num_key_value_heads": 1, "head_dim": 8}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2}),
}
_TOWERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "siglip": (
        "SiglipVisionConfig",
        "SiglipVisionModel",
        "SiglipImageProcessor",
        {"image_size": 28, "patch_size": 14},
    ),
    "clip": (
        "CLIPVisionConfig",
        "CLIPVisionModel",
        "CLIPImageProcessor",
        {"image_size": 28, "patch_size": 14, "projection_dim": 16},
    ),
    "dinov2": (
        "Dinov2Config",
        "Dinov2Model",
        "BitImageProcessor",
        {"image_size": 28, "patch_size": 14, "mlp_ratio": 2},
    ),
    "vit": ("ViTConfig", "ViTModel", "ViTImageProcessor", {"image_size": 32, "patch_size": 8}),
}
_TOWER_WIDTHS = {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "num_channels": 3,
}
_WIDTHS = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}

_CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the picture? ASSISTANT: A red circle is in the picture.",
    "\n\n a\n\n\n  b\n c  \n\n d :\n\n",  # it learns to join white space
    "user assistant system yes no what which colour shape red blue green grey square circle "
    "triangle left right 0 1 2 3",
)


@pytest.fixture(params=list(_LANGUAGE_MODELS))
def family(request: pytest.FixtureRequest) -> str:
    """Name of each language model family in turn."""
    return request.param


@pytest.fixture(params=list(_TOWERS))
def tower(request: pytest.FixtureRequest) -> str:
    """Name of each kind of vision tower in turn."""
    return request.param


@dataclass(frozen=True)
class TinyParts:
    """Folders of a tower and a language model, as `save_pretrained` writes them."""

    vision_tower: Path
    language_model: Path

    def recipe(self, **changes: Any) -> ModelRecipe:
        """Return the recipe of a model from both."""
        names = {
            "vision_tower": str(self.vision_tower),
            "language_model": str(self.language_model),
            "chat_template": "chatml",
        }
        return ModelRecipe(**names | changes)


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyParts]:
    """`tiny_parts(family, tower, vocab_size)` saves each part once a session.

    With `vocab_size=None` the vocabulary has no unused row.
    """
    root = tmp_path_factory.mktemp("parts")
    made: dict[object, Path] = {}

    def once(key: object, make: Callable[[Path], None]) -> Path:
        if key not in made:
            made[key] = root / str(len(made))
            make(made[key])
        return made[key]

    def parts(
        family: str = "llama", tower: str = "siglip", vocab_size: int | None = 512
    ) -> TinyParts:
        language_model = once(
            (family, vocab_size), lambda folder: _save_language_model(folder, family, vocab_size)
        )
        return TinyParts(once(tower, lambda folder: _save_tower(folder, tower)), language_model)

    return parts


@pytest.fixture(scope="session")
def tiny_model(
    tiny_parts: Callable[..., TinyParts],
) -> Callable[..., tuple[LlavaForConditionalGeneration, LlavaProcessor]]:
    """`tiny_model(family, tower, **changes)` builds new objects with the same weights.

    The changes are those of the model recipe.
    """

    def model(
        family: str = "llama", tower: str = "siglip", **changes: Any
    ) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
        import torch

        from mipha.models.build import build
        from mipha.models.modeling import parts

        recipe = tiny_parts(family, tower).recipe(**changes)
        torch.manual_seed(0)
        built, processor = build(recipe)

        # A fresh projector's output is small; tests need answers that depend on the image.
        (projector,) = parts(built).projector
        layers = [layer for layer in projector.modules() if isinstance(layer, torch.nn.Linear)]
        with torch.no_grad():
            layers[-1].weight.mul_(4.0)
        return built, processor

    return model


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A messages file of 24 samples, and their 6 images beside it.

    Every fourth sample is text only, and every fifth has two turns.
    """
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(random.integers(0, 255, (20 + 4 * number, 24, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )

    colours = ("red", "blue", "green", "grey", "dark red", "light blue")
    lines = []
    for number in range(24):
        question = f"Which colour is shape {number}?" + " Look well." * (number % 5)
        turns = [("user", question), ("assistant", f"It is {colours[number % 6]}.")]
        if number % 5 == 0:
            turns += [
                ("user", "Is it a circle?"),
                ("assistant", "yes" if number % 2 else "no, a square"),
            ]

        messages = [{"role": role, "content": text} for role, text in turns]
        lines.append(
            json.dumps(
                {"messages": messages, "images": [f"{number % 6}.png"] if number % 4 else []}
            )
        )

    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_run_recipe(tiny_parts: Callable[..., TinyParts], tiny_data: Path) -> Callable[..., Recipe]:
    """`tiny_run_recipe("seed=1", ..., family=, tower=, data=)` is a recipe over tiny parts.

    It has two short stages, and the positional arguments override its keys.
    """

    def recipe(
        *overrides: str, family: str = "llama", tower: str = "siglip", data: Path = tiny_data
    ) -> Recipe:
        stage = {
            "data": [{"dataset": "messages", "root": str(data)}],
            "batch_size": 6,
            "row_tokens": 200,
            "checkpoint_every": 2,
        }
        frozen = {"vision_tower": "frozen", "projector": "full", "language_model": "frozen"}
        tree = {
            "name": "tiny",
            "precision": "float32",
            "model": tiny_parts(family, tower).recipe().model_dump(exclude_unset=True),
            "stages": {
                "pretrain": stage | {"tuning": frozen, "learning_rate": 1e-2, "max_steps": 2},
                "finetune": stage
                | {
                    "tuning": dict.fromkeys(frozen, "full"),
                    "learning_rate": 5e-3,
                    "max_steps": 6,
                    "epochs": 2,
                },
            },
        }
        return Recipe.parse(tree, source="tiny").override(*overrides)

    return recipe


UNMARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{{ '<image>\n' if part.type == 'image' else part.text }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template of content parts without marks, as most checkpoints have."""


@pytest.fixture(scope="session")
def stock_llava(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`stock_llava(family, tower, layout, **facts)` saves a LLaVA with transformers alone.

    Its tower keeps a layer behind the one that is read. `layout` is "today" or "2024": then the
    image processor and the template lie in files of their own, and there is no
    processor_config.json. The facts are those of LlavaConfig.
    """
    import torch
    import transformers
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    def save(
        family: str = "llama", tower: str = "clip", layout: str = "today", **facts: Any
    ) -> Path:
        folder = tmp_path_factory.mktemp("stock")
        torch.manual_seed(0)
        tokenizer = _tokenizer(begins_with_bos=family == "gemma")
        tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
        ids = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}

        text_class, _, text = _LANGUAGE_MODELS[family]
        vision_class, _, _, vision = _TOWERS[tower]
        config = transformers.LlavaConfig(
            text_config=getattr(transformers, text_class)(
                **_WIDTHS | text, vocab_size=512, initializer_range=0.15, eos_token_id=ids["eos"]
            ),
            vision_config=getattr(transformers, vision_class)(**_TOWER_WIDTHS | vision),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            **{"vision_feature_layer": -2, "image_seq_length": 4} | facts,
        )
        model = transformers.LlavaForConditionalGeneration(config)
        model.generation_config.eos_token_id = ids["eos"]
        model.generation_config.pad_token_id = ids["pad"]
        model.save_pretrained(folder)

        side = {"height": 28, "width": 28}
        images = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=side)
        if layout == "today":
            transformers.LlavaProcessor(
                images,
                tokenizer,
                patch_size=14,
                vision_feature_select_strategy="default",
                num_additional_image_tokens=1,
                chat_template=UNMARKED,
            ).save_pretrained(folder)
        else:
            tokenizer.save_pretrained(folder)
            settings = images.to_dict() | {"image_processor_type": "CLIPImageProcessor"}
            (folder / "preprocessor_config.json").write_text(json.dumps(settings))
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": UNMARKED}))
        return folder

    return save


def _save_language_model(folder: Path, family: str, vocab_size: int | None) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = _tokenizer(begins_with_bos=family == "gemma")
    config_class, model_class, facts = _LANGUAGE_MODELS[family]
    config = getattr(transformers, config_class)(
        **_WIDTHS | facts,
        vocab_size=vocab_size or len(tokenizer),
        initializer_range=0.15,  # with the usual 0.02, tiny attention is uniform
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    # Make the weights large enough for logits that differ.
    model = getattr(transformers, model_class)(config)
    head = model.get_output_embeddings()
    assert (head.bias is not None) == (family == "phi")
    if head.bias is not None:
        torch.nn.init.normal_(head.bias, std=0.5)
    # Gemma's head is tied and its embeddings are scaled up: with small layers it repeats its input.
    if family == "gemma":
        for parameter in model.model.layers.parameters():
            parameter.data.mul_(2.5)

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(begins_with_bos: bool) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of 400 tokens, with or without a BOS before texts, as Gemma has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)

    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if begins_with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", special.index("<bos>"))]
        )
        names["bos_token"] = "<bos>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _save_tower(folder: Path, tower: str) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config_class, model_class, processor_class, facts = _TOWERS[tower]
    config = getattr(transformers, config_class)(
        **_TOWER_WIDTHS | {"initializer_range": 0.1} | facts
    )
    model = getattr(transformers, model_class)(config)
    for name, parameter in model.named_parameters():
        if "position_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)

    pixels = {
        "image_processor_type": processor_class,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.25, 0.3],
    }
    pixels |= {"do_resize": True, "size": {"height": config.image_size, "width": config.image_size}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(pixels | {"do_rescale": True, "do_normalize": True})
    )


@pytest.fixture(scope="session")
def official_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small official files of every benchmark, in a folder each; tests must not change them."""
    from tests.evaluation.official import collect

    root = tmp_path_factory.mktemp("official")
    for name, official in collect().items():
        official.write(root / name)
    return root


# The order of files -------------------------------------------------------------------------------

_LONG = (
    "training/test_shard.py",
    "studies/test_runner.py",
    "benchmarks/test_serving.py",
    "alignment/test_trl_trainer.py",
    "deploy/test_verify.py",
    "training/test_kill.py",
    "models/test_isolation.py",
    "docs/test_own_data.py",
    "e2e/test_evaluate.py",
    "models/test_upstream.py",
    "training/test_loop.py",
    "alignment/test_rlhf.py",
    "benchmarks/test_training.py",
    "models/test_build.py",
    "models/test_catalog.py",
    "assistant/test_assistant.py",
)
"""Files of more than half a minute. They begin first: the last one of several workers would else
work alone. With pytest-xdist, give `--dist loadfile --no-loadscope-reorder`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {file: number for number, file in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(rank)))


# What is not run ---------------------------------------------------------------------------------

_not_run: set[tuple[str, str]] = set()
"""Test or file, and the reason."""


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _not_run.add((report.nodeid, _reason(report)))


def pytest_deselected(items: list[pytest.Item]) -> None:
    for marker in ("slow", "gpu"):
        _not_run.update(
            (item.nodeid, f"marked {marker}: pytest -m {marker}")
            for item in items
            if item.get_closest_marker(marker)
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand over what a worker of pytest-xdist has collected; it reports skipped tests by itself."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = sorted(_not_run)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _not_run.update(map(tuple, getattr(node, "workeroutput", {}).get("not_run", ())))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was not run, so that a machine without a browser does not look like one with."""
    for report in terminalreporter.stats.get("skipped", ()):
        _not_run.add((report.nodeid, _reason(report)))
    if not _not_run:
        return

    terminalreporter.section("not run")
    groups = Counter((reason, place.partition("::")[0]) for place, reason in _not_run)
    for (reason, file), number in sorted(groups.items()):
        is_file = (file, reason) in _not_run
        terminalreporter.line(f"{'all' if is_file else number} of {file}: {reason}")


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    _, _, reason = cast(tuple[str, int, str], report.longrepr)
    return reason.removeprefix("Skipped: ")
