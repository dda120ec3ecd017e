"""The freeze proof: its report before, its measurement after, and the runs that it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText

from mipha.assistant import load
from mipha.models.adapters import merge_adapter
from mipha.models.modeling import LlavaForConditionalGeneration, load_model
from mipha.models.tuning import apply_tuning, part_layers
from mipha.recipe import PARTS, TuningRecipe
from mipha.run import Run
from mipha.training.pipeline import train
from mipha.training.proof import measure_change, record_start

STAGES = ("pretrain", "finetune")

LORA = (
    "tuning={vision_tower: last-1, projector: full, language_model: lora, "
    "lora: {rank: 4, alpha: 16}}"
)
RATES = "part_learning_rates={vision_tower: 1e-4, language_model: 2e-3}"


@pytest.fixture(scope="module")
def run(tiny_run_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Pretrain adapts tower and projector; finetune uses all kinds, each part at its own rate."""
    pretrain = (
        "stages.pretrain.tuning={vision_tower: lora, projector: full, language_model: frozen, "
        "lora: {rank: 2, alpha: 4}}"
    )
    changes = (pretrain, f"stages.finetune.{LORA}", f"stages.finetune.{RATES}")
    return train(
        tiny_run_recipe(*changes, family="qwen2", tower="clip"),
        tmp_path_factory.mktemp("proof") / "run",
    )


def report(run: Run, stage: str) -> dict[str, dict]:
    return json.loads((run.stage(stage) / "tuning.json").read_text())["parts"]


def test_what_trains_is_written_with_its_rate_and_its_type(run: Run) -> None:
    said = report(run, "finetune")
    assert list(said) == list(PARTS)
    assert [said[part]["tuning"] for part in PARTS] == ["last-1", "full", "lora"]
    assert [said[part]["learning_rate"] for part in PARTS] == [1e-4, 5e-3, 2e-3]
    assert [said[part]["adapters"] for part in PARTS] == [0, 0, 14]
    assert [said[part]["dtypes"] for part in PARTS] == [["float32"]] * 3
    assert (
        said["projector"]["trained"]
        == said["projector"]["parameters"]
        == 24 * 32 + 32 + 32 * 32 + 32
    )
    assert "learning_rate" not in report(run, "pretrain")["language_model"], "nothing of it trains"


def test_what_moved_is_measured(run: Run, weights: Callable) -> None:
    """Return the relative change by hand, from two checkpoints, of the weights that could move."""
    before, after = weights(run.checkpoint("pretrain")), weights(run.checkpoint("finetune"))
    layers = [name for name in before if ".layers." in name and name.endswith("proj.weight")]
    could_move = {
        "vision_tower": [
            name for name in before if name.startswith("vision_tower") and "layers.1." in name
        ],
        "projector": [name for name in before if name.startswith("multi_modal_projector")],
        "language_model": [name for name in layers if name.startswith("language_model")],
    }
    for part, names in could_move.items():
        change = report(run, "finetune")[part]["change"]
        moved = sum((after[name] - before[name]).double().square().sum() for name in names) ** 0.5
        start = sum(before[name].double().square().sum() for name in names) ** 0.5
        assert change["relative"] == pytest.approx(float(moved / start), rel=1e-3), part
        assert change["largest"] == pytest.approx(
            max(float((after[name] - before[name]).abs().max()) for name in names), rel=1e-3
        )
        assert change["frozen_changed"] == change["idle"] == []
    rest = before.keys() - {name for names in could_move.values() for name in names}
    assert rest and all(torch.equal(before[name], after[name]) for name in rest), (
        "the head, embeddings, norms, earlier layers"
    )


def test_the_frozen_language_model_is_bit_equal_and_its_head_too(
    run: Run, weights: Callable
) -> None:
    before, after = weights(run.stage("pretrain") / "base"), weights(run.checkpoint("pretrain"))
    assert all(
        torch.equal(before[name], after[name])
        for name in before
        if name.startswith("language_model")
    )
    change = report(run, "pretrain")["language_model"]["change"]
    assert (change["trained"], change["relative"], change["frozen_changed"]) == (0, 0.0, [])
    assert change["frozen"] == sum(name.startswith("language_model") for name in before)


@pytest.mark.parametrize("stage", STAGES)
def test_stock_peft_loads_the_adapter_onto_its_base(run: Run, tmp_path: Path, stage: str) -> None:
    adapter = run.stage(stage) / "adapter"
    base = AutoModelForImageTextToText.from_pretrained(
        json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    theirs, merged = (
        PeftModel.from_pretrained(base, adapter).eval(),
        load_model(str(run.checkpoint(stage))),
    )
    merge_adapter(adapter, tmp_path / "merged")
    size = base.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.cat(
        [
            torch.full((1, base.config.image_seq_length), base.config.image_token_index),
            torch.arange(1, 60)[None],
        ],
        dim=1,
    )
    with torch.no_grad():
        answers = [
            model(input_ids=ids, pixel_values=pixels).logits
            for model in (merged, theirs, load_model(str(tmp_path / "merged")))
        ]
    assert torch.allclose(answers[0], answers[1], atol=1e-4)
    assert torch.allclose(answers[0], answers[2], atol=1e-4)


def test_a_run_with_adapters_leaves_a_standard_model(run: Run, tiny_data: Path) -> None:
    assert (
        load(run).answer(tiny_data.parent / "0.png", "Which colour?", max_new_tokens=4).num_tokens
        > 0
    )
    _, info = AutoModelForImageTextToText.from_pretrained(
        run.final_checkpoint(), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not any(
        "partial" in path.name or path.name == "states" for path in run.folder.rglob("*")
    )
    assert not (run.stage("finetune") / "base").exists(), "pretrain's checkpoint is the base"


def plant(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[LlavaForConditionalGeneration], object]
) -> None:
    """Let finetune begin with a model that something is wrong with."""

    def load_planted(folder: str) -> LlavaForConditionalGeneration:
        model = load_model(folder)
        change(model)
        return model

    monkeypatch.setattr("mipha.training.pipeline.load_model", load_planted)


def without_gradient(module: nn.Module) -> None:
    module.forward = torch.no_grad()(module.forward)


def stop(module: nn.Module) -> None:
    """Gradients are there, and zero."""
    for parameter in module.parameters():
        parameter.register_hook(torch.zeros_like)


def test_a_tower_whose_gradient_is_cut_fails_before_the_first_step(
    tiny_run_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda model: without_gradient(model.model.vision_tower))
    with pytest.raises(ValueError, match=r"vision_tower: no gradient reaches \d+ of its tensors"):
        train(tiny_run_recipe(), tmp_path / "run")
    assert not Run(tmp_path / "run").stage("finetune").exists()


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_adapters_whose_gradient_is_cut_fail_at_the_first_step(
    part: str, tiny_run_recipe: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda model: without_gradient(part_layers(model, part)[0]))
    recipe = tiny_run_recipe(
        f"stages.finetune.tuning.{part}=lora",
        "stages.finetune.tuning.lora.rank=2",
        "stages.pretrain.max_steps=1",
    )
    with pytest.raises(
        ValueError, match=r"\d+ of \d+ tensors that are to train get no gradient, model\.vision"
    ):
        train(recipe, tmp_path / "run")
    assert not Run(tmp_path / "run").metrics("finetune").exists()


@pytest.mark.parametrize(
    ("planted", "tuning", "said"),
    [
        (
            lambda model: stop(model.model.vision_tower),
            "full",
            r"vision_tower \(full\): nothing moved in layer 0, layer 1, outside",
        ),
        (
            lambda model: stop(part_layers(model, "language_model")[1]),
            "full",
            r"language_model \(full\): nothing moved in layer 1",
        ),
        (
            lambda model: nudge_head(model),
            "frozen",
            r"language_model \(frozen\): frozen tensors changed, lm_head\.weight",
        ),
        (
            lambda model: nudge_head(model),
            "lora",
            r"language_model \(lora\): frozen tensors changed, lm_head\.weight",
        ),
    ],
    ids=[
        "a tower that stays",
        "a layer that stays",
        "a head that moves",
        "a head that moves beside adapters",
    ],
)
def test_a_run_that_did_something_else_fails_at_its_end(
    planted: Callable,
    tuning: str,
    said: str,
    tiny_run_recipe: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, planted)
    short = [f"stages.{stage}.max_steps=1" for stage in STAGES]
    recipe, run = (
        tiny_run_recipe(f"stages.finetune.tuning.language_model={tuning}", *short),
        Run(tmp_path / "run"),
    )
    for _ in range(2):  # and again, when the same command is given again
        with pytest.raises(
            ValueError,
            match=rf"finetune did not train what its recipe asks for.*: {said}.* "
            r"delete .*finetune to train",
        ):
            train(recipe, run.folder)
        assert not run.is_finished("finetune")
    assert any(
        row["change"]["frozen_changed"] or row["change"]["idle"]
        for row in report(run, "finetune").values()
    )


def nudge_head(model: LlavaForConditionalGeneration) -> None:
    """As upstream, whose frozen language model had a head that trained."""

    def nudge(*_: object) -> None:
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1e-3

    model.model.vision_tower.register_forward_hook(nudge)


QLORA = ("stages.finetune.tuning.language_model=qlora", "stages.finetune.tuning.lora.rank=4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is not refused")
def test_4_bits_without_a_gpu_are_refused_before_anything_is_built(
    tiny_run_recipe: Callable, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"language_model=qlora .* needs a GPU: set tuning\.language_model to lora"
    ):
        train(tiny_run_recipe(*QLORA, "model.vision_tower=nothing/there"), tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("bitsandbytes") is None,
    reason="needs a GPU and the extra qlora",
)
def test_4_bits_train_on_a_gpu(
    tiny_run_recipe: Callable, tmp_path: Path, weights: Callable
) -> None:
    run = train(tiny_run_recipe(*QLORA), tmp_path / "run")
    language_model = report(run, "finetune")["language_model"]
    assert (
        language_model["dtypes"] == ["float32", "nf4"]
        and not language_model["change"]["frozen_changed"]
    )
    assert {weight.dtype for weight in weights(run.final_checkpoint()).values()} == {torch.float32}


def test_a_stage_that_was_begun_with_other_weights_is_refused(
    tiny_model: Callable, tmp_path: Path
) -> None:
    start = tmp_path / "states" / "start.safetensors"
    wish = TuningRecipe(vision_tower="frozen", projector="full", language_model="frozen")
    for other in (False, False, True):
        model, _ = tiny_model()
        apply_tuning(model, wish)
        if not other:
            record_start(model, start)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-6
    with pytest.raises(
        ValueError,
        match=r"states was begun with other weights \(lm_head\.weight\): delete that folder",
    ):
        record_start(model, start)

    # The same weights under adapters are other tensors.
    adapted, _ = tiny_model()
    lora = TuningRecipe(vision_tower="frozen", projector="full", language_model="lora")
    apply_tuning(adapted, lora)
    with pytest.raises(ValueError, match=r"states was begun with other weights \(.*base_layer"):
        record_start(adapted, start)


def test_the_smallest_change_counts(tiny_model: Callable, tmp_path: Path) -> None:
    model, _ = tiny_model()
    apply_tuning(
        model, TuningRecipe(vision_tower="last-1", projector="full", language_model="frozen")
    )
    record_start(model, tmp_path / "start.safetensors")
    tower, projector, language_model = measure_change(
        model, dict(model.named_parameters()), tmp_path / "start.safetensors"
    )
    assert (tower.moved, tower.relative, tower.largest, tower.idle) == (0, 0.0, 0.0, ("layer 1",))
    assert (projector.moved, projector.idle, projector.frozen) == (0, ("all of it",), 0)
    assert (language_model.trained, language_model.idle, language_model.frozen_changed) == (
        0,
        (),
        (),
    )
    with torch.no_grad():
        bias = model.model.multi_modal_projector.linear_1.bias
        bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))
        norm = model.model.language_model.norm.weight
        norm[0] = torch.nextafter(norm[0], torch.tensor(9.0))
    _, projector, language_model = measure_change(
        model, dict(model.named_parameters()), tmp_path / "start.safetensors"
    )
    assert (projector.moved, projector.trained, projector.idle) == (1, 4, ())
    assert 0 < projector.largest < 1e-6
    assert language_model.frozen_changed == ("model.language_model.norm.weight",)


@pytest.mark.parametrize("damage", ["a bit", "shorter"])
def test_a_damaged_record_of_the_start_is_named(
    damage: str, tiny_model: Callable, tmp_path: Path
) -> None:
    start = tmp_path / "states" / "start.safetensors"
    model, _ = tiny_model()
    wish = TuningRecipe(vision_tower="frozen", projector="full", language_model="frozen")
    apply_tuning(model, wish)
    record_start(model, start)
    content = bytearray(start.read_bytes())
    content[-1] ^= 1
    start.write_bytes(content if damage == "a bit" else content[:-10])
    with pytest.raises(
        ValueError, match=r"start\.safetensors is damaged .*to start the stage anew"
    ):
        record_start(model, start)
