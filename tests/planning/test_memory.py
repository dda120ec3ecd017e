"""Memory is counted as it is taken: on tensors without numbers as on real ones."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mipha.models.tuning import apply_tuning
from mipha.planning.memory import MicroBatch, kept_bytes, memory_of
from mipha.recipe import StageRecipe, TuningRecipe

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

    vision = model.config.vision_config
    with saved_tensors_hooks(note, lambda tensor: tensor):
        embeddings = model.get_input_embeddings()(
            torch.zeros(BATCH.rows, BATCH.tokens, dtype=torch.long)
        )
        features = model.model.vision_tower(
            torch.zeros(BATCH.images, 3, vision.image_size, vision.image_size)
        ).last_hidden_state
        embeddings = embeddings + 0 * model.model.multi_modal_projector(features).mean()
        mask = torch.zeros(BATCH.rows, 1, BATCH.tokens, BATCH.tokens)
        positions = torch.arange(BATCH.tokens).expand(BATCH.rows, BATCH.tokens)
        model.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        )
    return sum(size for storage, (_, size) in kept.items() if storage not in own)


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
