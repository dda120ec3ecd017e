"""Verification of good, biased and spoiled checkpoints, and folders that are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mipha.checkpoint_files import read_checkpoint
from mipha.deploy.model_card import model_card
from mipha.deploy.runtimes import odd_keys, runtimes
from mipha.deploy.verify import Verification, _check_files, print_verification, verify
from mipha.models.build import build, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(
    tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`checkpoint("phi", "clip")`: its folder, made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(family: str = "llama", tower: str = "siglip") -> Path:
        path = root / f"{family}-{tower}"
        if not path.exists():
            save_checkpoint(*tiny_model(family, tower), path)
        return path

    return folder


@pytest.fixture
def spoiled(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(checkpoint(), tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Replace keys of a JSON file; a dotted one through `__`."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = content
        for key in outer:
            inner = inner[key]
        inner[last] = value
    path.write_text(json.dumps(content))


def failed(found: Verification) -> dict[str, str]:
    return {check.name: check.found for check in found.checks if not check.passed}


@pytest.mark.parametrize(
    ("family", "tower", "vllm"), [("llama", "clip", "exact"), ("qwen2", "dinov2", "unsupported")]
)
def test_a_checkpoint_is_exact_without_mipha(
    checkpoint: Callable[..., Path], family: str, tower: str, vllm: str
) -> None:
    found = verify(checkpoint(family, tower))
    assert failed(found) == {}
    assert found.exact
    said = {check.name: check.found for check in found.checks}
    assert said["loads without mipha"].startswith("transformers.models.llava.")
    assert said["tokens per image"].startswith(
        "4,"
    )  # 28 pixels by patches of 14; neither tower's class token is among them
    assert said["head and word embeddings"] == (
        "tied" if family == "qwen2" else "a head of its own"
    )
    assert {row.name: row.status for row in found.runtimes} | {"llama.cpp": ""} == {
        "mipha": "exact",
        "transformers": "exact",
        "vLLM": vllm,
        "llama.cpp": "",
    }
    assert json.loads(json.dumps(found.as_json()))["exact"] is True


def test_a_biased_head_is_approximate_by_the_size_of_the_bias(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    found = verify(checkpoint("phi", "siglip"))
    assert not found.exact
    assert set(failed(found)) - {"answers"} == {"head bias", "logits"}
    bias = load_file(checkpoint("phi", "siglip") / "model.safetensors")[
        "language_model.lm_head.bias"
    ]
    off, fixed = re.fullmatch(
        r"differ by up to (\S+), of \S+; with the head's bias put back, by (\S+)",
        failed(found)["logits"],
    ).groups()
    assert float(off) == pytest.approx(
        bias.abs().max().item(), rel=0.06
    )  # every logit lacks its own bias
    assert float(fixed) < 1e-4
    status = {row.name: row for row in found.runtimes}
    assert (
        status["transformers"].status == "approximate"
        and "dropped" in status["transformers"].reason
    )
    assert status["vLLM"].status == "unsupported"
    print_verification(found)
    assert "approximate" in capsys.readouterr().out


def test_each_thing_that_is_not_as_it_says_is_found(spoiled: Path) -> None:
    weights = load_file(spoiled / "model.safetensors")
    renamed = {
        name if "lm_head" in name else f"model.{name}": value for name, value in weights.items()
    }
    save_file(renamed, spoiled / "model.safetensors", metadata={"format": "pt"})
    edit(spoiled / "config.json", dtype="bfloat16")
    edit(spoiled / "generation_config.json", eos_token_id=[3])
    found = verify(spoiled)
    assert {"names of weights", "type of weights", "end of an answer"} <= set(failed(found))
    assert "float32, but the config says bfloat16" in failed(found)["type of weights"]
    assert {row.name: row.status for row in found.runtimes}[
        "vLLM"
    ] == "unsupported"  # it finds weights by their names


def test_a_tower_without_the_name_that_others_look_for_is_found(spoiled: Path) -> None:
    weights = load_file(spoiled / "model.safetensors")
    short = {
        name.replace("vision_tower.vision_model.", "vision_tower."): value
        for name, value in weights.items()
    }
    assert short.keys() != weights.keys()
    save_file(short, spoiled / "model.safetensors", metadata={"format": "pt"})
    files = read_checkpoint(spoiled)
    said = {check.name: check.found for check in _check_files(files) if not check.passed}
    assert "such as vision_tower.embeddings" in said["names of weights"]
    rows = runtimes(files.config, files.processor, odd_keys(files))
    assert {row.name: row.status for row in rows}["vLLM"] == "unsupported"


def test_a_checkpoint_that_transformers_cannot_load_is_unsupported(spoiled: Path) -> None:
    edit(spoiled / "processor_config.json", processor_class="NoSuchProcessor")
    found = verify(spoiled)
    assert set(failed(found)) == {"loads without mipha"}
    assert {row.name: row.status for row in found.runtimes}["transformers"] == "unsupported"


def _cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _shards(folder: Path, drop: bool) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, keys in files.items():
        save_file(
            {key: weights[key] for key in keys if drop or key != names[0]},
            folder / file,
            metadata={"format": "pt"},
        )
    places = {key: file for file, keys in files.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()
    if drop:
        (folder / "model-00002-of-00002.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut, r"model\.safetensors is cut short"),
        (
            lambda folder: _shards(folder, drop=True),
            r"lacks 1 of 2 shards, such as model-00002-of-00002\.safetensors",
        ),
        (
            lambda folder: _shards(folder, drop=False),
            r"lacks 1 tensors that model\.safetensors\.index\.json names, such as language_model\.",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            r"pytorch_model\.bin is a pickle",
        ),
        (lambda folder: (folder / "training_args.bin").touch(), r"training_args\.bin is a pickle"),
        (lambda folder: (folder / "modeling_mine.py").touch(), r"modeling_mine\.py is code"),
        (
            lambda folder: edit(folder / "config.json", auto_map={"AutoModel": "x.Y"}),
            "code of its own",
        ),
        (
            lambda folder: edit(folder / "config.json", model_type="paligemma"),
            "holds a 'paligemma', not a LLaVA",
        ),
        (
            lambda folder: edit(folder / "config.json", text_config__model_type="phi"),
            "the weights do not fit",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": '),
            r"config\.json line 1 is not valid JSON",
        ),
        (lambda folder: (folder / "chat_template.jinja").unlink(), r"no chat_template\.jinja"),
        (lambda folder: (folder / "processor_config.json").unlink(), "no image processor"),
        (
            lambda folder: edit(folder / "processor_config.json", patch_size=7),
            "16 tokens by patches of 7, but the model wants images of 28 x 28 pixels, 4 ",
        ),
        (
            lambda folder: edit(folder / "processor_config.json", num_additional_image_tokens=1),
            "5 tokens by patches of 14, but",
        ),
        (lambda folder: (folder / "config.json").unlink(), r"neither a run .* nor a whole model"),
    ],
)
def test_a_broken_folder_gets_one_sentence(
    spoiled: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(spoiled)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        verify(spoiled)
    assert "\n" not in str(caught.value)


def test_no_folder_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run or model folder .*nothing"):
        verify(tmp_path / "nothing")


CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]


@pytest.mark.parametrize(
    ("tower", "text", "statuses", "reason"),
    [
        (
            "siglip_vision_model",
            {"model_type": "qwen2"},
            "exact exact approximate",
            "not square differently from PIL",
        ),
        (
            "clip_vision_model",
            {"model_type": "phi"},
            "approximate unsupported approximate",
            "bias in the head",
        ),
        (
            "clip_vision_model",
            {"model_type": "phi", "lm_head_bias": False},
            "exact unsupported approximate",
            "no class of its own for a 'phi'",
        ),
        (
            "clip_vision_model",
            {"model_type": "gpt_neox"},
            "exact unsupported approximate",
            "no class of its own for a 'gpt_neox'",
        ),
        (
            "clip_vision_model",
            {"model_type": "gpt2"},
            "exact unsupported unsupported",
            "layers named `model`",
        ),
        ("clip_vision_model", {"model_type": "gemma"}, "exact approximate approximate", "36787"),
        (
            "clip_vision_model",
            {"model_type": "olmo"},
            "exact unsupported unsupported",
            "nothing is known of a 'olmo'",
        ),
        (
            "clip_vision_model",
            {"model_type": "llama", "architectures": None},
            "exact unsupported approximate",
            "architectures is not set",
        ),
        ("dinov2", {"model_type": "qwen2"}, "exact unsupported unsupported", "no 'dinov2' tower"),
        ("vit", {"model_type": "llama"}, "exact unsupported unsupported", "no 'vit' tower"),
    ],
)
def test_which_programs_run_it(
    tower: str, text: dict[str, Any], statuses: str, reason: str
) -> None:
    config = {
        "model_type": "llava",
        "vision_config": {"model_type": tower},
        "text_config": {"architectures": ["X"]} | text,
    }
    ours, *others = runtimes(config, {"image_processor": {"do_pad": True, "image_mean": CLIP_MEAN}})
    assert ours.status == "exact"
    assert [other.name for other in others] == ["transformers", "vLLM", "llama.cpp"]
    assert [other.status for other in others] == statuses.split()
    assert any(reason in other.reason for other in others)


def test_a_normed_last_layer_is_for_transformers_alone() -> None:
    config = {"vision_config": {"model_type": "clip_vision_model", "tie_last_hidden_states": True}}
    config |= {"text_config": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}}
    config["model_type"] = "llava"
    assert [row.status for row in runtimes(config, {})][1:3] == ["exact", "unsupported"]


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        ({"do_pad": True, "image_mean": CLIP_MEAN}, None),
        ({"do_pad": True, "image_mean": [0.5, 0.5, 0.5]}, "in CLIP's grey"),
        ({"do_pad": False, "image_mean": CLIP_MEAN}, "model squashes them"),
    ],
)
def test_llama_cpp_pads_by_its_own_rule(pixels: dict[str, Any], reason: str | None) -> None:
    config = {
        "model_type": "llava",
        "vision_config": {"model_type": "clip"},
        "text_config": {"model_type": "llama", "architectures": ["X"]},
    }
    (found,) = [
        row.reason
        for row in runtimes(config, {"image_processor": pixels})
        if row.name == "llama.cpp"
    ]
    assert ("pads images" in found) == (reason is not None) and (reason or "") in found


@pytest.mark.parametrize(
    ("name", "has_processor"),
    [
        ("idefics3-llama-tied", True),
        ("next-siglip-qwen2", True),
        ("lfm2vl-qwen3-tiles", False),
        ("onevision-siglip-llama-cap2", False),
    ],
)
def test_checkpoints_of_the_other_classes_are_exact(name: str, has_processor: bool) -> None:
    """Without torchvision, the stock class gets our inputs where its processor cannot be made."""
    found = verify(Path(__file__).parents[1] / "fixtures" / "images" / name, device="cpu")
    checks = {check.name: check for check in found.checks}
    assert [check for check in found.checks if not check.passed] == [
        check for check in (checks["names of weights"],) if not check.passed
    ]
    has_torchvision = find_spec("torchvision") is not None
    said = checks["pixels"].found
    assert ("needs torchvision" in said) == (not has_processor and not has_torchvision)
    status = {row.name: row.status for row in found.runtimes}
    assert status["transformers"] == "exact" and status["llama.cpp"] == "unsupported"


def test_a_stock_class_that_gets_tiles_cut_is_exact(tiny_parts: Callable, tmp_path: Path) -> None:
    save_checkpoint(*build(tiny_parts().recipe(image="tiles", max_tiles=3)), tmp_path / "tiles")
    found = verify(tmp_path / "tiles", device="cpu")
    assert [check for check in found.checks if not check.passed] == []
    reasons = {row.name: row.reason for row in found.runtimes}
    assert "it gets whole images unless tiles are cut before it" in reasons["transformers"]
    assert "mipha.load" in model_card(tmp_path / "tiles")
