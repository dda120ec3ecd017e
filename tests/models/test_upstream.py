"""Released checkpoints: upstream's numbers, every tensor accounted for, the others refused."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mipha.assistant import Assistant
from mipha.data.collate import collate
from mipha.data.packing import Row
from mipha.data.sample import IMAGE, Message
from mipha.labels import IGNORE
from mipha.models.attention import use_segments
from mipha.models.build import build
from mipha.models.modeling import LlavaForConditionalGeneration, load_model
from mipha.models.processing import load_processor
from mipha.models.upstream import import_upstream, load_upstream
from mipha.models.vision_tower import TOWERS

UPSTREAM = Path(__file__).parents[1] / "fixtures" / "upstream"
PIXELS = {
    "do_resize": True,
    "size": {"height": 30, "width": 30},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}

STOCK_READER = """
import json, sys
sys.modules["mipha"] = None  # an import of it would fail
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

for folder in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(
        f"{folder}/out", dtype=torch.float32, output_loading_info=True
    )
    ours = torch.load(f"{folder}/ours.pt", weights_only=True)
    with torch.no_grad():
        logits = model(input_ids=ours["ids"], pixel_values=ours["pixels"]).logits + ours["bias"]
    prompt = AutoProcessor.from_pretrained(f"{folder}/out").apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]}],
        add_generation_prompt=True,
    )
    found = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    difference = (logits - ours["logits"]).abs().max().item()
    print(json.dumps({"difference": difference, "keys": found, "prompt": prompt}))
"""


def copied(name: str, folder: Path, **config: Any) -> Path:
    """A fixture that a test may change; dotted names reach into its config."""
    shutil.copytree(UPSTREAM / name, folder)
    edit(folder, **config)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *path, last = name.split("__")
        inner = config
        for part in path:
            inner = inner[part]
        inner[last] = value
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def fuse(tensors: dict[str, torch.Tensor]) -> None:
    """The layout of the old Phi: query, key and value head after head; here 4 heads of 20."""
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = [
                tensors.pop(f"model.layers.{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"
            ]
            rows = [part[20 * head : 20 * head + 20] for head in range(4) for part in parts]
            tensors[f"model.layers.{layer}.self_attn.query_key_value.{kind}"] = torch.cat(rows)


def widen(folder: Path, rows: int) -> None:
    """Give the vocabulary more rows, which say nothing."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in {
            "model.embed_tokens.weight",
            "lm_head.weight",
            "lm_head.bias",
        } & tensors.keys():
            more = torch.full((rows - len(tensors[name]), *tensors[name].shape[1:]), -0.01)
            tensors[name] = torch.cat([tensors[name], more])

    rewrite(folder, change)
    edit(folder, vocab_size=rows)


def released(name: str, folder: Path, tokenizer: Path, rows: int) -> Path:
    """A fixture with all the files of a release."""
    copied(name, folder, image_aspect_ratio="pad")
    widen(folder, rows)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "vocab", "merges", "added", "special")):
            shutil.copy(file, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    (folder / "training_args.bin").write_bytes(b"a pickle, never read")
    return folder


def expanded(ids: torch.Tensor, model: LlavaForConditionalGeneration) -> torch.Tensor:
    token, repeats = model.config.image_token_id, model.config.image_seq_length
    return torch.tensor(
        [
            [t for i in row for t in ([token] * repeats if i == -200 else [i])]
            for row in ids.tolist()
        ]
    )


def difference(
    model: LlavaForConditionalGeneration, name: str, pixels: str = "px", logits: str = "logits"
) -> float:
    reference = load_file(UPSTREAM / name / "ref.safetensors")
    with torch.no_grad():
        found = model(
            input_ids=expanded(reference["ids"], model), pixel_values=reference[pixels]
        ).logits
    assert found.shape == reference[logits].shape
    return (found - reference[logits]).abs().max().item()


@pytest.mark.parametrize(
    ("name", "pixels", "logits", "tolerance"),
    [
        ("up_phi_siglip", "px", "logits", 2e-6),
        ("up_phi_clip", "px", "logits", 2e-6),
        ("up_phi_dinov2", "px70", "l70", 2e-6),
        (
            "up_gemma_siglip",
            "px",
            "logits",
            1e-5,
        ),  # the Gemma of transformers is off by 2e-6 without an image
    ],
)
def test_logits_are_upstreams(name: str, pixels: str, logits: str, tolerance: float) -> None:
    model, report = load_upstream(UPSTREAM / name)
    assert difference(model, name, pixels, logits) < tolerance
    stored = load_file(UPSTREAM / name / "model.safetensors")
    told = [*report.renamed, *report.split, *report.dropped]
    assert sorted(told) == sorted(stored), "each tensor is told once"
    assert sorted(report.renamed.values()) == sorted(
        set(model.state_dict()) - ({"lm_head.weight"} if "gemma" in name else set())
    )
    scaled = (
        {"model.mm_projector.2.weight", "model.mm_projector.2.bias"} if "gemma" in name else set()
    )
    assert set(report.folded) == scaled
    # The tower has three layers and is read behind its second.
    assert all(
        any(part in key for part in (".layers.2.", ".layer.2.", ".head.", ".mask_token"))
        for key in report.dropped
    )
    assert (model.dtype, model.training, model.device.type) == (torch.float32, False, "cpu")


def test_positions_are_resized_by_upstreams_rule(tmp_path: Path) -> None:
    """The processor makes 28 pixels, the tower's table is for 70: upstream resized it."""
    folder = copied("up_phi_dinov2", tmp_path / "a")
    crop = {
        "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28},
        "size": {"shortest_edge": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS | crop))
    model, report = load_upstream(folder)
    assert model.config.image_seq_length == 4
    assert difference(model, "up_phi_dinov2", "px", "l28") < 2e-6
    assert set(report.folded) == {"model.vision_tower.dinov2.embeddings.position_embeddings"}


def test_a_fused_projection_is_split(tmp_path: Path) -> None:
    """The 1.6B release: type with a hyphen, no number of key-value heads, one fused projection."""
    folder = copied(
        "up_phi_siglip",
        tmp_path / "a",
        model_type="mipha-phi",
        architectures=["MiphaPhi15ForCausalLM"],
    )
    edit(folder, num_key_value_heads=None)
    rewrite(folder, fuse)
    model, report = load_upstream(folder)
    assert difference(model, "up_phi_siglip") < 2e-6
    assert report.split["model.layers.1.self_attn.query_key_value.bias"] == tuple(
        f"model.language_model.layers.1.self_attn.{part}_proj.bias" for part in "qkv"
    )
    assert len(report.split) == 4


def test_a_training_step_is_upstreams() -> None:
    """Text and image rows, padding, and an end of turn that later turns do not see."""
    model, _ = load_upstream(UPSTREAM / "up_phi_siglip")
    step = load_file(UPSTREAM / "up_phi_siglip" / "step.safetensors")
    ids = torch.where(step["ids"] == -200, model.config.image_token_id, step["ids"])
    loss = model.train()(
        input_ids=ids, pixel_values=step["px"], attention_mask=step["mask"], labels=step["labels"]
    ).loss
    loss.backward()
    inner = model.model
    assert abs(loss.item() - step["loss"].item()) < 1e-6
    for weight, name in (
        (inner.multi_modal_projector.linear_1.weight, "projector_gradient"),
        (inner.vision_tower.embeddings.patch_embedding.weight, "patch_gradient"),
        (model.lm_head.weight, "head_gradient"),
    ):
        assert (weight.grad - step[name]).abs().max() < 1e-6 < step[name].abs().max()


def test_end_of_turn_holes_are_upstreams() -> None:
    """What `collate` makes of upstream's rows with `eos_holes` is its mask, and so is the loss."""
    model, _ = load_upstream(UPSTREAM / "up_phi_siglip")
    step = load_file(UPSTREAM / "up_phi_siglip" / "step.safetensors")
    ids = torch.where(step["ids"] == -200, model.config.image_token_id, step["ids"])
    (end,) = set(ids[~step["mask"].bool()].tolist())  # its padding is the end of a turn
    rows = []
    for tokens, labels in zip(ids, step["labels"], strict=True):
        length = int((labels != IGNORE).nonzero().max()) + 1
        where = np.arange(length)
        parts = (tokens[:length].numpy(), labels[:length].numpy(), where, ((False, length),))
        rows.append(Row(("a",), *parts, images=(), shown_by=(), counts=()))
    tokenizer = SimpleNamespace(pad_token_id=end, eos_token_id=end)
    batch = collate(rows, SimpleNamespace(tokenizer=tokenizer), eos_holes=True)  # type: ignore[arg-type]
    assert torch.equal(batch["attention_mask"], step["mask"].bool())
    use_segments(model)
    loss = model.eval()(**batch, pixel_values=step["px"]).loss
    assert abs(loss.item() - step["loss"].item()) < 1e-6


@pytest.fixture(scope="module")
def imported(
    tiny_parts: Callable, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, bool], SimpleNamespace]:
    """Each family, without and with a full vocabulary, and what stock transformers says of it.

    It reads all of them in one process, because starting is slow.
    """
    root, made = tmp_path_factory.mktemp("imported"), {}
    for family, name in (("phi", "up_phi_siglip"), ("gemma", "up_gemma_siglip")):
        words = {
            "phi": UPSTREAM / "toy_codegen_tokenizer",
            "gemma": tiny_parts("gemma").language_model,
        }[family]
        size = len(AutoTokenizer.from_pretrained(words))
        for full in (False, True):
            folder = root / f"{family}-{full}"
            folder.mkdir()
            source = released(name, folder / "source", words, size if full else size + 40)
            report = import_upstream(str(source), folder / "out")

            model, processor = load_model(str(folder / "out")), load_processor(folder / "out")
            reference = load_file(UPSTREAM / name / "ref.safetensors")
            ids, pixels = expanded(reference["ids"], model), reference["px"]
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=pixels).logits
            bias = model.lm_head.bias.detach() if family == "phi" else torch.zeros(())
            ours = {"ids": ids, "pixels": pixels, "logits": logits, "bias": bias}
            torch.save(ours, folder / "ours.pt")
            made[family, full] = SimpleNamespace(
                size=size,
                source=source,
                folder=folder / "out",
                report=report,
                model=model,
                processor=processor,
                reference=reference["logits"],
                logits=logits,
            )

    folders = [str(one.folder.parent) for one in made.values()]
    done = subprocess.run(
        [sys.executable, "-c", STOCK_READER, *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for one, line in zip(made.values(), done.stdout.splitlines()[-len(made) :], strict=True):
        one.stock = json.loads(line)
    return made


@pytest.mark.parametrize("full", [False, True], ids=["unused-rows", "full-vocabulary"])
@pytest.mark.parametrize("family", ["phi", "gemma"])
def test_stock_transformers_reads_the_import(
    imported: dict[tuple[str, bool], SimpleNamespace], family: str, full: bool
) -> None:
    one = imported[family, full]
    model, processor, size = one.model, one.processor, one.size
    written = json.loads((one.folder / "import_report.json").read_text())
    assert written["renamed"] == one.report.renamed

    assert model.config.image_token_id == processor.image_token_id == size
    assert (
        model.config.text_config.vocab_size
        == len(model.lm_head.weight)
        == (-(-(size + 1) // 64) * 64 if full else size + 40)
    )
    end = processor.tokenizer.eos_token_id
    assert (model.generation_config.eos_token_id, model.config.text_config.eos_token_id) == (
        end,
        end,
    )
    assert json.loads((one.source / "config.json").read_text())["eos_token_id"] != end, (
        "as in the releases, it is wrong"
    )

    logits, known = one.logits, one.reference.shape[-1]
    assert (logits[..., :known] - one.reference).abs().max() < (2e-6 if family == "phi" else 1e-5)
    assert (logits[..., size:].amax(-1) < logits[..., :size].amax(-1)).all(), (
        "a row without a word is never the most likely"
    )

    stock = one.stock
    assert stock["difference"] < 1e-6
    assert stock["keys"] == ({"unexpected_keys": ["lm_head.bias"]} if family == "phi" else {})
    bos = "<bos>" if family == "gemma" else ""
    assert stock["prompt"].startswith(f"{bos}A chat between") and stock["prompt"].endswith(
        f"USER: {IMAGE}\nIs it? ASSISTANT:"
    )
    assert (
        Assistant(model, processor)
        .answer(Image.new("RGB", (9, 20)), "Is it?", max_new_tokens=3)
        .num_tokens
        > 0
    )


def test_an_import_keeps_the_slow_tokenizers_ids(tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_upstream(
        str(
            released("up_phi_siglip", tmp_path / "source", UPSTREAM / "toy_codegen_tokenizer", 3100)
        ),
        out,
    )
    processor = load_processor(out)
    golden = json.loads((UPSTREAM / "golden_tokens.json").read_text())["v0/single"]["input_ids"]
    assert (
        load_model(str(out)).config.text_config.eos_token_id
        == 3000
        == processor.tokenizer.pad_token_id
    )
    messages = [Message("user", f"{IMAGE}\nWhat is it?")]
    prompt = Assistant(load_model(str(out)), processor).prompt_ids(messages)
    # Up to the answer " A cat.<|endoftext|>", which is five tokens; an image is four.
    assert prompt == [
        token for one in golden[:-5] for token in ([3039] * 4 if one == -200 else [one])
    ]


def test_an_import_keeps_the_type_of_the_weights(tiny_parts: Callable, tmp_path: Path) -> None:
    source = released(
        "up_gemma_siglip", tmp_path / "source", tiny_parts("gemma").language_model, 448
    )
    rewrite(
        source,
        lambda tensors: tensors.update({name: value.bfloat16() for name, value in tensors.items()}),
    )
    import_upstream(str(source), tmp_path / "out")
    kinds = {
        name: value.dtype
        for name, value in load_file(tmp_path / "out" / "model.safetensors").items()
    }
    assert kinds.pop("multi_modal_projector.linear_2.weight") == torch.float32, (
        "a scaled weight would be rounded a second time"
    )
    assert kinds.pop("multi_modal_projector.linear_2.bias") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    ours, wanted = load_model(str(tmp_path / "out")), load_upstream(source)[0]
    assert all(
        torch.equal(value, wanted.state_dict()[name]) for name, value in ours.state_dict().items()
    )


@pytest.mark.parametrize("held", [False, True], ids=["tower-named", "tower-held"])
def test_an_original_llava_checkpoint(tiny_parts: Callable, tmp_path: Path, held: bool) -> None:
    """LLaVA 1.5: a Llama with the projector; its CLIP is only named, or has one more prefix."""
    parts = tiny_parts("llama", "clip")
    wanted, _ = build(parts.recipe())
    language_model = AutoModelForCausalLM.from_pretrained(parts.language_model)
    tensors = {name: value.clone() for name, value in language_model.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(
        4
    )  # older releases stored this buffer
    for index, layer in (
        (0, wanted.model.multi_modal_projector.linear_1),
        (2, wanted.model.multi_modal_projector.linear_2),
    ):
        tensors |= {
            f"model.mm_projector.{index}.{name}": value.detach().clone()
            for name, value in layer.named_parameters()
        }
    if held:
        tower = TOWERS["clip_vision_model"].from_pretrained(parts.vision_tower)
        tensors |= {
            f"model.vision_tower.vision_tower.vision_model.{name}": value.clone()
            for name, value in tower.state_dict().items()
        }
    folder = tmp_path / "llava"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = language_model.config.to_dict() | {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "clip",
    }
    config |= {
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }
    (folder / "config.json").write_text(json.dumps(config))

    model, report = load_upstream(folder, vision_tower=parts.vision_tower)
    state = wanted.state_dict()
    assert set(model.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in report.dropped
    ids = torch.tensor([[5, *[model.config.image_token_id] * 4, 7]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted.model.config.image_token_id = wanted.config.image_token_id = (
            model.config.image_token_id
        )
        assert torch.equal(
            model(input_ids=ids, pixel_values=pixels).logits,
            wanted(input_ids=ids, pixel_values=pixels).logits,
        )
    with pytest.raises(
        FileNotFoundError,
        match="was made with the vision tower 'clip': give its folder as vision_tower",
    ):
        load_upstream(folder)
    with pytest.raises(
        ValueError, match=r"mm_projector\.0\.weight is \(32, 24\) where \(32, 16\) is described"
    ):
        load_upstream(folder, vision_tower=narrow_tower(tmp_path / "narrow"))
    (parts_copy := tmp_path / "pickled").mkdir()
    shutil.copy(parts.vision_tower / "config.json", parts_copy)
    (parts_copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled holds pickled weights"):
        load_upstream(folder, vision_tower=parts_copy)


def narrow_tower(folder: Path) -> Path:
    """A CLIP of 16 channels, where the checkpoints here were made with 24."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    facts = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 32,
    }
    CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, **facts)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(PIXELS | {"image_processor_type": "CLIPImageProcessor"})
    )
    return folder


TOWER = "vision_config__vision_tower__"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "phi"}, "is a 'phi': released checkpoints are mipha_phi"),
        ({"model_type": None}, "is a None: released"),
        (
            {"architectures": ["MiphaGemmaForCausalLM"]},
            "names the class 'MiphaGemmaForCausalLM', not MiphaPhiForCausalLM",
        ),
        ({"model_type": "mipha_gemma", "architectures": None}, "tensors do not fit"),
        ({"text_config": {}}, "is already a standard mipha_phi checkpoint"),
        ({"vision_config__mm_projector": None}, r"lacks vision_config\.mm_projector"),
        (
            {"vision_config__mm_projector__mm_projector_type": "linear"},
            "has a 'linear' projector: only mlp2x_gelu",
        ),
        ({"mm_use_im_start_end": True}, "puts tokens around its images"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'"),
        (
            {"hidden_size": 96},
            r"embed_tokens\.weight is \(120, 80\) where \(120, 96\) is described",
        ),
        ({"hidden_size": "80"}, "is no PhiConfig"),
        ({"num_hidden_layers": 3}, r"missing: model\.language_model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"unexpected: model\.layers\.1"),
        (
            {f"{TOWER}image_size": 44},
            r"position_embedding\.weight is \(4, 24\) where \(9, 24\) is described",
        ),
        ({f"{TOWER}mm_vision_select_layer": -5}, "reads layer -5 of a tower with 3 layers"),
        ({f"{TOWER}hidden_act": None}, None),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    config: dict, message: str | None, tmp_path: Path
) -> None:
    folder = copied("up_phi_siglip", tmp_path / "a", **config)
    if message is None:  # not said at all
        said = json.loads((folder / "config.json").read_text())
        del said["vision_config"]["vision_tower"]["hidden_act"]
        (folder / "config.json").write_text(json.dumps(said))
        message = "lacks the tower's hidden_act"
    with pytest.raises(ValueError, match=message) as caught:
        load_upstream(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("up_phi_siglip", lambda held: held.update(stray=torch.zeros(1)), "unexpected: stray"),
        (
            "up_phi_siglip",
            lambda held: held.pop("model.mm_projector.2.bias"),
            "missing: model.multi_modal_projector.linear_2.bias",
        ),
        (
            "up_phi_siglip",
            lambda held: held.update({"lm_head.weight": torch.zeros(120, 80, dtype=torch.int8)}),
            "holds weights as I8",
        ),
        (
            "up_gemma_siglip",
            lambda held: held.update({"lm_head.weight": torch.zeros(60, 40)}),
            "lm_head.weight is not the embeddings",
        ),
    ],
)
def test_a_tensor_that_is_not_explained_is_refused(
    name: str, change: Callable, message: str, tmp_path: Path
) -> None:
    folder = copied(name, tmp_path / "a")
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_upstream(folder)


def test_a_tied_head_that_is_stored_too_is_dropped(tmp_path: Path) -> None:
    folder = copied("up_gemma_siglip", tmp_path / "a")
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        ),
    )
    model, report = load_upstream(folder)
    assert report.dropped["lm_head.weight"].startswith("tied")
    assert difference(model, "up_gemma_siglip") < 1e-5


def shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[:50], names[50:]), start=1):
        save_file(
            {name: tensors[name] for name in part},
            folder / f"model-0000{number}-of-00002.safetensors",
        )
    index = {
        name: f"model-0000{1 if name in names[:50] else 2}-of-00002.safetensors" for name in names
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()


def test_shards(tmp_path: Path) -> None:
    folder = copied("up_phi_siglip", tmp_path / "a")
    shards(folder)
    assert difference(load_upstream(folder)[0], "up_phi_siglip") < 2e-6
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"lacks 1 of 2 shards, such as model-00002-of-00002\.safetensors"
    ):
        load_upstream(folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../b.safetensors"}})
    )
    with pytest.raises(ValueError, match="does not name safetensors files beside it"):
        load_upstream(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has shards but no model\.safetensors\.index\.json"
    ):
        load_upstream(folder)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = copied("up_phi_siglip", tmp_path / "a")
    whole = (folder / "model.safetensors").read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"\x80\x04cos\nsystem\n"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"model\.safetensors is cut short or is no safetensors file"
        ):
            load_upstream(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json line 1 is not valid JSON"):
        load_upstream(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_upstream(folder)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    """The pickle would make a file when it is read."""
    folder, trace = copied("up_phi_siglip", tmp_path / "a"), tmp_path / "trace"
    content = f"cos\nsystem\n(S'touch {trace}'\ntR.".encode()
    (folder / "training_args.bin").write_bytes(content)
    load_upstream(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"holds pickled weights .*: convert them first, with python -c"
    ):
        load_upstream(folder)
    assert not trace.exists()


def test_pickled_weights_are_imported_after_the_command_of_the_message(tmp_path: Path) -> None:
    folder = copied("up_phi_siglip", tmp_path / "it's a folder")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[:50], names[50:]), start=1):
        torch.save(
            {name: weights[name] for name in part},
            folder / f"pytorch_model-0000{number}-of-00002.bin",
        )
    with pytest.raises(ValueError, match="holds pickled weights") as caught:
        load_upstream(folder)
    command = str(caught.value).partition("convert them first, with ")[2]
    assert command.startswith("python -c ")
    subprocess.run(
        command.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True
    )
    assert difference(load_upstream(folder)[0], "up_phi_siglip") < 2e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_imported(tmp_path: Path, value: float) -> None:
    folder = copied("up_phi_siglip", tmp_path / "a")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.mm_projector.0.weight"][0, 0] = value

    rewrite(folder, change)
    with pytest.raises(
        ValueError, match=r"model\.mm_projector\.0\.weight hold numbers that are not finite"
    ):
        load_upstream(folder)


def test_a_link_out_of_the_folder_is_not_imported(tmp_path: Path) -> None:
    folder = copied("up_phi_siglip", tmp_path / "a")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"model\.safetensors is a link out of the folder"):
        load_upstream(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": 5}, "sets architectures to 5: give a list"),
        ({"architectures": [None]}, "sets architectures to .*: give a list"),
        ({"vision_config": [1]}, "vision_config that is no object"),
        ({"num_hidden_layers": 10_000_000}, "sets num_hidden_layers to 10000000, but the weights"),
        ({"num_hidden_layers": "x"}, "config.json"),
        ({"hidden_size": "x"}, "config.json"),
        ({"hidden_size": 0}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"layer_norm_eps": float("nan")}, "sets layer_norm_eps to nan: give a finite number"),
    ],
)
def test_a_damaged_config_is_one_sentence(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = copied("up_phi_siglip", tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_upstream(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("patch_size", value) for value in (0, None, "x", 1.5)),
        *(("image_size", value) for value in (0, "x")),
        *(("num_hidden_layers", value) for value in (10_000_000, -1, "x")),
        ("mm_vision_select_layer", "x"),
        ("hidden_act", 5),
    ],
)
def test_a_damaged_tower_config_is_one_sentence(tmp_path: Path, name: str, value: Any) -> None:
    folder = copied("up_phi_siglip", tmp_path / "a")
    content = json.loads((folder / "config.json").read_text())
    content["vision_config"]["vision_tower"][name] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        load_upstream(folder)
    assert "\n" not in str(caught.value)


def test_what_an_import_lacks_is_named(tmp_path: Path) -> None:
    source, out = (
        released("up_phi_siglip", tmp_path / "a", UPSTREAM / "toy_codegen_tokenizer", 3100),
        tmp_path / "out",
    )
    (source / "preprocessor_config.json").write_text(
        json.dumps(PIXELS | {"size": {"height": 42, "width": 42}})
    )
    with pytest.raises(ValueError, match="makes images of 42 pixels, its tower takes 30"):
        import_upstream(source, out)
    (source / "preprocessor_config.json").write_text(
        json.dumps(PIXELS | {"size": {"height": 30, "width": 40}})
    )
    with pytest.raises(ValueError, match="does not give one size for square images"):
        import_upstream(source, out)
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json"):
        import_upstream(source, out)
    edit(source, vocab_size=3000)
    with pytest.raises(ValueError, match="its tokenizer has ids up to 3038, its model 3000 words"):
        import_upstream(source, out)
    for name in ("vocab.json", "merges.txt"):
        (source / name).unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        import_upstream(source, out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(ValueError, match="out exists: choose another folder"):
        import_upstream(source, out)


def test_a_tower_that_would_not_be_used_is_refused(tiny_parts: Callable) -> None:
    with pytest.raises(ValueError, match="holds its own vision tower"):
        load_upstream(UPSTREAM / "up_phi_siglip", vision_tower=tiny_parts().vision_tower)


def test_a_class_token_among_the_features_is_refused(tmp_path: Path) -> None:
    folder = copied(
        "up_phi_clip",
        tmp_path / "a",
        vision_config__vision_tower__mm_vision_select_feature="cls_patch",
    )
    with pytest.raises(ValueError, match="reads 'cls_patch'"):
        load_upstream(folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", r"no checkpoint folder \./nowhere"),
        ("nowhere", "no checkpoint folder"),
        ("nobody/nothing", "check name and network"),
    ],
)
def test_a_source_that_is_not_there(source: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load_upstream(source)
    assert "\n" not in str(caught.value)
