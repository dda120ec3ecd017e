"""Memory is counted as it is taken: on tensors without numbers as on real ones."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mipha.data.batches import StepDataset
from mipha.data.mixture import Mixture
from mipha.models.memory import MicroBatch, kept_bytes, largest_batch, memory_of
from mipha.models.tuning import apply_tuning
from mipha.recipe import StageRecipe, TuningRecipe
from mipha.run import Run
from mipha.training.placement import place
from mipha.training.stage import Stage
from mipha.world import World

BATCH = MicroBatch(rows=2, tokens=24, images=3)


def stage(tuning: TuningRecipe, **changes) -> StageRecipe:
    return StageRecipe(
        data={"dataset": "messages"}, tuning=tuning, learning_rate=1e-3, batch_size=2, **changes
    )


def tuned(tower: str = "full", language_model: str = "full") -> TuningRecipe:
    return TuningRecipe(vision_tower=tower, projector="full", language_model=language_model)


def really_kept(model) -> int:
    """Bytes that autograd keeps in a real forward pass of the same shapes."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[torch.Tensor, int]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (
            tensor,
            storage.nbytes(),
        )  # held, so that no address is used twice
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        forward(model)
    return sum(size for storage, (_, size) in kept.items() if storage not in own)


def forward(model) -> torch.Tensor:
    """Run all parts on a batch of these shapes."""
    vision = model.config.vision_config
    embeddings = model.get_input_embeddings()(
        torch.zeros(BATCH.rows, BATCH.tokens, dtype=torch.long)
    )
    features = model.model.vision_tower(
        torch.zeros(BATCH.images, 3, vision.image_size, vision.image_size)
    ).last_hidden_state
    embeddings = embeddings + 0 * model.model.multi_modal_projector(features).mean()
    mask = torch.zeros(BATCH.rows, 1, BATCH.tokens, BATCH.tokens)
    positions = torch.arange(BATCH.tokens).expand(BATCH.rows, BATCH.tokens)
    return model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state


@pytest.mark.parametrize(
    ("tower", "language_model"), [("full", "full"), ("frozen", "full"), ("frozen", "frozen")]
)
def test_what_is_kept_is_what_a_real_forward_pass_keeps(
    tiny_model, tower: str, language_model: str
) -> None:
    model, _ = tiny_model()
    tuning = tuned(tower, language_model)
    apply_tuning(model, tuning)
    counted = kept_bytes(model.to("meta"), stage(tuning), BATCH, autocast=False)
    again, _ = tiny_model()
    apply_tuning(again, tuning)
    assert counted == pytest.approx(really_kept(again), rel=0.02)


def test_what_is_frozen_keeps_less_and_so_does_checkpointing(tiny_model) -> None:
    def kept(tuning: TuningRecipe, **changes) -> float:
        model, _ = tiny_model()
        apply_tuning(model, tuning)
        return kept_bytes(model.to("meta"), stage(tuning, **changes), BATCH, autocast=False)

    everything = kept(tuned())
    assert kept(tuned("frozen")) < everything
    assert kept(tuned(), activation_checkpointing=["language_model"]) < everything
    assert kept(tuned(), activation_checkpointing=True) < kept(
        tuned(), activation_checkpointing=["language_model"]
    )
    selective = kept(tuned(), activation_checkpointing="selective")
    assert kept(tuned(), activation_checkpointing=True) < selective < everything


def test_what_selective_checkpointing_keeps_is_what_is_alive_behind_a_forward_pass(
    tiny_model, tiny_run_recipe, tmp_path
) -> None:
    """But for one layer, which is whole only while it is computed again."""
    recipe = tiny_run_recipe("stages.finetune.activation_checkpointing=selective")
    settings = Stage(Run(tmp_path), recipe, "finetune", World(0, 1, torch.device("cpu")))
    model, _ = tiny_model()
    apply_tuning(model, settings.settings.tuning)
    counted = kept_bytes(copy.deepcopy(model).to("meta"), settings.settings, BATCH, autocast=False)
    whole = kept_bytes(copy.deepcopy(model).to("meta"), stage(tuned()), BATCH, autocast=False)

    place(model, settings)
    gc.collect()
    before = {id(one) for one in gc.get_objects() if isinstance(one, torch.Tensor)}
    held = forward(model)
    alive = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in gc.get_objects()
        if isinstance(one, torch.Tensor) and id(one) not in before
    }
    assert sum(alive.values()) == pytest.approx(counted, rel=0.3)
    assert sum(alive.values()) < 0.8 * whole
    del held


def test_shards_divide_what_they_hold(tiny_model) -> None:
    model, _ = tiny_model()
    apply_tuning(model, tuned())
    model = model.to("meta")
    one, four = (memory_of(model, stage(tuned()), BATCH, "gpu", True, shards) for shards in (1, 4))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (one["gradients"], one["optimizer"]) == (4 * trained, 8 * trained), (
        "float32, and two moments of it"
    )
    for component in ("weights", "gradients", "optimizer"):
        assert four[component] == one[component] / 4
    assert four["activations"] == one["activations"]


def test_a_process_that_holds_all_beside_others_computes_with_a_copy_of_it(tiny_model) -> None:
    model, _ = tiny_model()
    apply_tuning(model, tuned("frozen"))
    model = model.to("meta")
    alone, beside = (
        memory_of(model, stage(tuned("frozen")), BATCH, "gpu", True, 1, number) for number in (1, 8)
    )
    apart = {key: beside[key] - alone[key] for key in alone if beside[key] != alone[key]}
    assert apart == {"working copies": alone["weights"]}


def test_no_micro_batch_is_larger_than_the_largest(tiny_run_recipe, tiny_model) -> None:
    model, processor = tiny_model()
    for batching in ("padded", "packed", "shared-image"):
        finetune = tiny_run_recipe(
            f"stages.finetune.batching={batching}", "stages.finetune.micro_batch_rows=2"
        ).stages["finetune"]
        largest = largest_batch(model, finetune)
        for step in StepDataset(Mixture(finetune.data), processor, finetune, seed=0):
            for batch in step.micro_batches:
                rows, tokens = batch["input_ids"].shape
                assert rows <= largest.rows and tokens <= largest.tokens
                assert len(batch.get("pixel_values", ())) <= largest.images
