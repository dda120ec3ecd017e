"""Adapters: their layers, stock peft reads them, and merging changes no answer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from mipha.assistant import load
from mipha.errors import MissingPackage
from mipha.models.adapters import (
    adapter_layers,
    attach_adapter,
    check_base,
    export_adapter,
    merge_adapter,
    merged_weights,
    remove_adapters,
    save_adapter,
)
from mipha.models.build import save_checkpoint
from mipha.models.modeling import LlavaForConditionalGeneration, load_model, parts
from mipha.models.quantization import check_quantization
from mipha.models.tuning import apply_tuning, check_tuning, part_layers, tuned_modules
from mipha.recipe import PARTS, TuningRecipe

TOWERS = {
    "phi": "siglip",
    "qwen2": "clip",
    "gpt_neox": "dinov2",
    "stablelm": "vit",
    "gemma": "siglip",
    "llama": "clip",
}
# q, k, v, output and the MLP's two or three; GPT-NeoX keeps q, k, v in one.
LINEARS = {"phi": 6, "qwen2": 7, "gpt_neox": 4, "stablelm": 7, "gemma": 7, "llama": 7}


def tuning(
    tower: str = "frozen", projector: str = "full", language_model: str = "frozen"
) -> TuningRecipe:
    lora = {"rank": 4, "alpha": 12, "dropout": 0.1}
    return TuningRecipe(
        vision_tower=tower, projector=projector, language_model=language_model, lora=lora
    )


def logits(model: nn.Module) -> Tensor:
    """Of one picture and some text."""
    config = model.config
    size = config.vision_config.image_size
    ids = torch.cat(
        [
            torch.full((1, config.image_seq_length), config.image_token_index),
            torch.arange(1, 60)[None],
        ],
        dim=1,
    )
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels).logits


def move(model: nn.Module) -> None:
    """As if trained: everything that trains is elsewhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def once(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, what is tied a single time."""
    return dict(model.named_parameters())


def save(
    model: LlavaForConditionalGeneration, wanted: TuningRecipe, base: Path, folder: Path
) -> None:
    whole = [
        module for part in PARTS for module in tuned_modules(model, part, getattr(wanted, part))
    ]
    save_adapter(model, once(model), whole, base, folder)


@pytest.fixture
def tuned(tiny_model: Callable, tmp_path: Path) -> Callable[..., LlavaForConditionalGeneration]:
    """`tuned(wanted, family)`: base saved in `base/`, adapters trained and saved in `adapter/`."""

    def make(wanted: TuningRecipe, family: str = "llama") -> LlavaForConditionalGeneration:
        model, processor = tiny_model(family, TOWERS[family])
        save_checkpoint(model, processor, tmp_path / "base")
        apply_tuning(model, wanted)
        move(model)
        save(model, wanted, tmp_path / "base", tmp_path / "adapter")
        return model

    return make


def test_every_linear_layer_of_the_stacks_has_one(tiny_model: Callable, family: str) -> None:
    model, _ = tiny_model(family, TOWERS[family])
    before = logits(model)
    tower, projector, language_model = apply_tuning(model, tuning("lora", "frozen", "lora"))
    assert (tower.adapters, projector.adapters, language_model.adapters) == (
        2 * 6,
        0,
        2 * LINEARS[family],
    )
    assert projector.trained == 0
    inside = {
        id(module)
        for part in ("vision_tower", "language_model")
        for layer in part_layers(model, part)
        for module in layer.modules()
    }
    assert all(id(layer) in inside for layer in adapter_layers(model).values()), (
        "the head, the embeddings and the projector have none"
    )
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    factors = [layer.lora_A["default"].weight for layer in adapter_layers(model).values()]
    factors += [layer.lora_B["default"].weight for layer in adapter_layers(model).values()]
    assert trained == set(map(id, factors))
    assert torch.equal(logits(model), before), "an adapter begins as nothing"


def test_only_the_part_that_is_asked_for_has_them(tiny_model: Callable) -> None:
    """Llama's layers are 32 wide, 16 for keys and values, 48 in the MLP.

    A factor pair has rank x (in + out) numbers.
    """
    model, _ = tiny_model()
    reports = apply_tuning(model, tuning(language_model="lora"))
    assert [report.adapters for report in reports] == [0, 0, 14]
    assert reports[0].trained == 0
    assert reports[2].trained == 4 * 2 * (
        (32 + 32) + (32 + 16) + (32 + 16) + (32 + 32) + 3 * (32 + 48)
    )
    assert {layer.scaling["default"] for layer in adapter_layers(model).values()} == {12 / 4}
    assert {layer.lora_dropout["default"].p for layer in adapter_layers(model).values()} == {0.1}


@pytest.mark.parametrize("damage", ["one fewer", "none"])
def test_layers_that_adapters_do_not_fit_are_refused(tiny_model: Callable, damage: str) -> None:
    model, _ = tiny_model()
    layers = part_layers(model, "language_model")
    for layer in layers[: 1 if damage == "one fewer" else 2]:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear) and (damage == "none" or name == "mlp.up_proj"):
                layer.set_submodule(name, nn.Identity())
    counts = "6 or 7" if damage == "one fewer" else "0"
    for refuse in (check_tuning, apply_tuning):
        with pytest.raises(
            ValueError,
            match=rf"language_model: adapters want the same linear layers.* but there are {counts} "
            r"in a layer",
        ):
            refuse(model, tuning(language_model="lora"))


def test_layers_that_peft_passes_over_are_an_error(
    tiny_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peft once met Phi's renamed layers and silently adapted none of them."""
    monkeypatch.setattr(
        "mipha.models.adapters.LoraConfig",
        lambda **facts: LoraConfig(**facts | {"target_modules": ["q_proj"]}),
    )
    model, _ = tiny_model()
    with pytest.raises(ValueError, match=r"adapters were added to 4 layers where 14 were meant"):
        apply_tuning(model, tuning(language_model="lora"))


CASES = {
    "language model": ("llama", tuning(language_model="lora")),
    "both": ("gpt_neox", tuning("lora", "full", "lora")),
    "tied": ("gemma", tuning("lora", "frozen", "lora")),
    "tower alone, the rest whole, tied": ("qwen2", tuning("lora", "full", "full")),
    "last layer of the tower": ("stablelm", tuning("last-1", "full", "lora")),
    "a head with a bias": ("phi", tuning("full", "full", "lora")),
}


@pytest.mark.filterwarnings(
    "ignore:.*tie.*:UserWarning"
)  # said by peft where it keeps what was tied as two
@pytest.mark.parametrize("case", CASES)
def test_stock_peft_and_the_merged_model_answer_alike(
    tuned: Callable, tmp_path: Path, case: str
) -> None:
    family, wanted = CASES[case]
    model = tuned(wanted, family)
    before = logits(model)

    base = PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path
    # The stock class knows no bias of a head, so Phi is read with ours.
    stock = (
        load_model(base) if family == "phi" else AutoModelForImageTextToText.from_pretrained(base)
    )
    assert (logits(stock) - before).abs().max() > 0.1, "what was trained must matter"
    theirs = PeftModel.from_pretrained(stock, tmp_path / "adapter")
    assert torch.allclose(logits(theirs), before, atol=1e-5)

    # Unmerged beside its base: it answers as trained, and the base as ever.
    own = load_model(base)
    alone = logits(own)
    beside = attach_adapter(own, tmp_path / "adapter", Path(base))
    assert torch.allclose(logits(beside), before, atol=1e-5)
    assert torch.equal(logits(own), alone)
    shared = {id(weight) for weight in own.parameters()} & {id(w) for w in beside.parameters()}
    assert len(shared) >= len(adapter_layers(beside)), "weights below adapters are not copied"
    assert (beside.lm_head.weight is beside.get_input_embeddings().weight) == (
        own.lm_head.weight is own.get_input_embeddings().weight
    )

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert torch.allclose(logits(load_model(str(tmp_path / "merged"))), before, atol=1e-4)
    plain, shapes = (
        merged_weights(model, once(model)),
        {name: weight.shape for name, weight in once(load_model(base)).items()},
    )
    assert {name: weight.shape for name, weight in plain.items()} == shapes
    merged = once(load_model(str(tmp_path / "merged")))
    assert all(torch.allclose(plain[name], merged[name], atol=1e-5) for name in shapes)
    assert (tmp_path / "merged" / "chat_template.jinja").is_file()


def test_the_linear_layers_come_back(tuned: Callable, tmp_path: Path) -> None:
    model = tuned(tuning(projector="frozen", language_model="lora"))
    remove_adapters(model)
    assert not adapter_layers(model)
    assert torch.equal(logits(model), logits(load_model(str(tmp_path / "base"))))


def test_an_adapter_that_peft_trained_is_merged_too(tiny_model: Callable, tmp_path: Path) -> None:
    model, processor = tiny_model()
    save_checkpoint(model, processor, tmp_path / "base")
    theirs = get_peft_model(
        load_model(str(tmp_path / "base")),
        LoraConfig(r=2, target_modules=["q_proj"], use_rslora=True),
    )
    move(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    assert torch.allclose(logits(load_model(str(tmp_path / "merged"))), logits(theirs), atol=1e-4)


def test_a_run_that_was_moved_still_finds_its_base(tuned: Callable, tmp_path: Path) -> None:
    model = tuned(tuning(language_model="lora"))
    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "adapter"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    merge_adapter(tmp_path / "elsewhere" / "adapter", tmp_path / "merged")
    assert torch.allclose(logits(load_model(str(tmp_path / "merged"))), logits(model), atol=1e-4)


def test_what_cannot_be_merged_is_refused(
    tuned: Callable, tiny_model: Callable, tmp_path: Path
) -> None:
    tuned(tuning(language_model="lora"))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    with pytest.raises(
        FileNotFoundError, match=r"base has no adapter_config\.json: give the adapter/ folder"
    ):
        merge_adapter(tmp_path / "base", merged)
    with pytest.raises(ValueError, match=r"base exists: choose another folder"):
        merge_adapter(adapter, tmp_path / "base")
    with pytest.raises(FileNotFoundError, match=r"base model .*nowhere .* is not there"):
        merge_adapter(adapter, merged, base=tmp_path / "nowhere")

    other, processor = tiny_model()
    with torch.no_grad():
        next(iter(parts(other).language_model[0].parameters())).add_(1e-6)
    save_checkpoint(other, processor, tmp_path / "other")
    with pytest.raises(ValueError, match=r"adapter was trained on another base than .*other"):
        merge_adapter(adapter, merged, base=tmp_path / "other")

    facts = json.loads((adapter / "base.json").read_text())
    (adapter / "base.json").write_text(json.dumps(facts | {"quantized": True}))
    with pytest.raises(
        ValueError, match=r"was trained on weights of 4 bits, .* use the checkpoint/ beside it"
    ):
        merge_adapter(adapter, merged)

    (
        adapter / "base.json"
    ).unlink()  # as of an adapter from elsewhere: then shapes are all there is to tell by
    save_checkpoint(*tiny_model("phi"), tmp_path / "phi")
    with pytest.raises(
        ValueError,
        match=r"does not fit .*phi, which has no place for .*layers\.0\..* \(.*\): give the base",
    ):
        merge_adapter(adapter, merged, base=tmp_path / "phi")
    assert not merged.exists()


def test_several_adapters_stand_over_one_base(tuned: Callable, tmp_path: Path) -> None:
    wanted = {"one": tuning("lora", "full", "lora"), "two": tuning(language_model="lora")}
    trained = {}
    for name, one in wanted.items():
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        trained[name] = logits(tuned(one))
        shutil.move(tmp_path / "adapter", tmp_path / name)
    own = load_model(str(tmp_path / "base"))
    beside = {name: attach_adapter(own, tmp_path / name, tmp_path / "base") for name in wanted}
    for name in ("one", "two", "one"):
        assert torch.allclose(logits(beside[name]), trained[name], atol=1e-5)


def test_an_adapter_is_exported_with_the_identity_of_its_base(
    tuned: Callable, tiny_model: Callable, tmp_path: Path
) -> None:
    model = tuned(tuning(language_model="lora"))
    export_adapter(tmp_path / "adapter", tmp_path / "out", "somebody/base")
    texts = [
        path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"
    ]
    assert not any(str(tmp_path) in text or "../" in text for text in texts)
    assert PeftConfig.from_pretrained(tmp_path / "out").base_model_name_or_path == "somebody/base"

    # It is read back over its base, and over no other.
    check_base(tmp_path / "out", tmp_path / "base")
    assistant = load(tmp_path / "base", adapter=tmp_path / "out")
    assert torch.allclose(logits(assistant.model), logits(model), atol=1e-5)
    other, processor = tiny_model()
    with torch.no_grad():
        other.lm_head.weight.add_(1e-6)
    save_checkpoint(other, processor, tmp_path / "other")
    with pytest.raises(ValueError, match=r"out was trained on another base than .*other"):
        load(tmp_path / "other", adapter=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"base model somebody/base of .* is not there"):
        check_base(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"base has no adapter_config\.json: give a run"):
        load(tmp_path / "base", adapter=tmp_path / "base")


def test_an_adapter_that_is_not_whole_is_refused(tuned: Callable, tmp_path: Path) -> None:
    tuned(tuning(language_model="lora"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if "lora_A" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path)
    own = load_model(str(tmp_path / "base"))
    with pytest.raises(ValueError, match="lacks the adapters of 1 layers"):
        attach_adapter(own, tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(ValueError, match="lacks the adapters of 1 layers"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**9}, "sets r to 1000000000"),
        ({"r": "4"}, "sets r to '4'"),
        ({"lora_alpha": 1e308}, r"sets lora_alpha to 1e\+308"),
        ({"lora_alpha": "x"}, "sets lora_alpha to 'x'"),
        ({"lora_alpha": float("nan")}, "sets lora_alpha to nan"),
        ({"target_modules": None}, "sets target_modules to"),
        ({"target_modules": "(([a-z.0-9]+)+)+!"}, "may take for ever"),
        ({"target_modules": "(("}, "has the pattern"),
        ({"rank_pattern": {"(a+)+$": 4}}, "may take for ever"),
        ({"rank_pattern": [1]}, "sets rank_pattern to"),
        ({"alpha_pattern": {"q_proj": "x"}}, "sets lora_alpha to 'x'"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"use_dora": True}, "give a plain LoRA"),
        ({"layer_replication": [[0, 2]] * 1000}, "give a plain LoRA"),
        ({"alora_invocation_tokens": [1]}, "give a plain LoRA"),
        ({"a_key_of_tomorrow": 1}, "sets a_key_of_tomorrow to '1'"),
        ({"bias": "x"}, "sets bias to 'x'"),
    ],
)
def test_a_config_that_asks_for_more_than_a_lora_is_refused(
    tuned: Callable, tmp_path: Path, changes: dict, message: str
) -> None:
    tuned(tuning(language_model="lora"))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as caught:
        check_base(tmp_path / "adapter", tmp_path / "base")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor * torch.nan, "not finite"),
        (lambda tensor: tensor.flatten(), "has no place for"),
        (lambda tensor: tensor[:2].clone(), "its config describes|names rank"),
        (lambda tensor: (tensor * 99).to(torch.int8), r"in torch\.int8: save it as floats"),
    ],
)
@pytest.mark.parametrize("every", [False, True])
def test_factors_that_are_not_those_of_the_config_are_refused(
    tuned: Callable, tmp_path: Path, change: Callable, message: str, every: bool
) -> None:
    tuned(tuning(language_model="lora"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    chosen = [name for name in tensors if "lora_A" in name][: None if every else 1]
    save_file(tensors | {name: change(tensors[name]) for name in chosen}, path)
    own = load_model(str(tmp_path / "base"))
    with pytest.raises(ValueError, match=message):
        attach_adapter(own, tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(ValueError, match=f"{message}|are not those that its config describes"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_that_was_cut_short_is_named(tuned: Callable, tmp_path: Path) -> None:
    tuned(tuning(language_model="lora"))
    own, path = load_model(str(tmp_path / "base")), tmp_path / "adapter/adapter_model.safetensors"
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is cut short"):
        attach_adapter(own, tmp_path / "adapter", tmp_path / "base")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter has no adapter_model\.safetensors"):
        attach_adapter(own, tmp_path / "adapter", tmp_path / "base")


def test_the_chat_template_of_an_adapter_is_named_by_its_own_file(
    tuned: Callable, tmp_path: Path
) -> None:
    tuned(tuning(language_model="lora"))
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    with pytest.raises(ValueError, match=r"adapter/chat_template\.jinja cannot write"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_what_is_saved_names_its_base_and_its_shape(tuned: Callable, tmp_path: Path) -> None:
    tuned(tuning("last-1", "full", "lora"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 12, 0.1)
    assert config["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    assert config["modules_to_save"] == [
        "model.vision_tower.encoder.layers.1",
        "model.multi_modal_projector",
    ]
    assert json.loads((tmp_path / "adapter" / "base.json").read_text())["folder"] == "../base"


def test_4_bits_are_refused_where_they_cannot_run() -> None:
    cpu, gpu, wanted = torch.device("cpu"), torch.device("cuda", 0), tuning(language_model="qlora")
    check_quantization(tuning(language_model="lora"), cpu, 8)
    with pytest.raises(
        ValueError,
        match=r"language_model=qlora .* needs a GPU: "
        r"set tuning\.language_model to lora, or train on a GPU",
    ):
        check_quantization(wanted, cpu, 1)
    with pytest.raises(ValueError, match=r"qlora is for one GPU, but 2 processes were started"):
        check_quantization(wanted, gpu, 2)
    if find_spec("bitsandbytes") is None:
        with pytest.raises(
            MissingPackage,
            match=r'bitsandbytes, which is not installed: pip install "mipha-vlm\[qlora\]"',
        ):
            check_quantization(wanted, gpu, 1)
    else:
        check_quantization(wanted, gpu, 1)


@pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes comes with the extra qlora"
)
def test_4_bits_train_and_merge(tiny_model: Callable) -> None:
    """bitsandbytes also computes on the CPU, slowly, so its layers pass the same tests as ours."""
    model, _ = tiny_model()
    full = logits(model)
    report = apply_tuning(model, tuning(language_model="qlora"))[-1]
    assert report.adapters == 14 and report.dtypes == ("float32", "nf4")
    vocabulary, norms, linears = 2 * 512 * 32, 5 * 32, 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    assert report.parameters == vocabulary + norms + linears + report.trained, (
        "two weights in a byte are two weights"
    )
    for layer in adapter_layers(model).values():
        layer.get_base_layer().support_avx512bf16_for_cpu = (
            False  # its fast kernel wants rows of 64 and more
        )
    rounded = logits(model)
    assert 0 < (rounded - full).abs().mean() < full.std()
    packed = {
        name: layer.get_base_layer().weight.detach().clone()
        for name, layer in adapter_layers(model).items()
    }
    move(model)
    before = logits(model)
    assert (before - rounded).abs().max() > 0.1
    assert all(
        torch.equal(layer.get_base_layer().weight, packed[name])
        for name, layer in adapter_layers(model).items()
    )
    merged = merged_weights(model, model.state_dict())
    plain, _ = tiny_model()
    plain.load_state_dict(merged)
    assert torch.allclose(logits(plain), before, atol=1e-3)
