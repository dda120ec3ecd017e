"""Frozen parts stay bit-equal in a step; in tuned parts every tensor that is used changes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import yaml

from mipha.models.adapters import adapter_layers
from mipha.models.tuning import (
    apply_tuning,
    check_tuning,
    part_layers,
    part_parameters,
    unread_parameters,
)
from mipha.recipe import PARTS, Recipe, TuningRecipe

COMBINATIONS = [
    dict(zip(PARTS, chosen, strict=True))
    for chosen in product(("frozen", "full"), repeat=3)
    if "full" in chosen
]
FROZEN = dict.fromkeys(PARTS, "frozen")


def full_step(model: torch.nn.Module, image_token: int, images: int = 1) -> None:
    """A forward pass with an image, and a plain step of gradient descent."""
    size, per_image = model.config.vision_config.image_size, model.config.image_seq_length
    generator = torch.Generator().manual_seed(0)
    text = torch.arange(1, 400)[None]
    ids = torch.cat([torch.full((1, per_image * images), image_token), text], dim=1)
    pixels = torch.randn(images, 3, size, size, generator=generator)
    model.zero_grad()
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained, lr=10.0).step()


@pytest.mark.parametrize(
    "wanted",
    COMBINATIONS,
    ids=lambda wanted: " ".join(part for part in PARTS if wanted[part] == "full"),
)
def test_frozen_stays_and_tuned_moves(
    tiny_model: Callable, family: str, wanted: dict[str, str]
) -> None:
    tower = {"phi": "siglip", "qwen2": "clip", "gpt_neox": "dinov2", "stablelm": "vit"}.get(
        family, "siglip"
    )
    model, processor = tiny_model(family, tower)
    report = apply_tuning(model, TuningRecipe(**wanted))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    full_step(model, processor.image_token_id)
    unread = unread_parameters(model)
    for part in report:
        assert (part.trained > 0) == (wanted[part.part] == "full")
        for name, parameter in part_parameters(model, part.part).items():
            moves = (
                wanted[part.part] == "full" and name not in unread and not no_true_gradient(name)
            )
            if moves:
                assert not torch.equal(parameter, before[name]), name
            elif wanted[part.part] == "frozen" or name in unread:
                assert torch.equal(parameter, before[name]), name
                assert not parameter.requires_grad


def no_true_gradient(name: str) -> bool:
    """A key's bias adds the same to every score of a query: softmax does not see it."""
    return name.endswith(("k_proj.bias", "key.bias"))


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_the_last_layers_train_and_nothing_else(
    tiny_model: Callable, family: str, part: str
) -> None:
    """Not the layers before them, nor what is outside of the stack: embeddings, norms, head."""
    model, processor = tiny_model(
        family,
        {"phi": "siglip", "qwen2": "clip", "gpt_neox": "dinov2", "stablelm": "vit"}.get(
            family, "clip"
        ),
    )
    reports = {
        report.part: report
        for report in apply_tuning(model, TuningRecipe(**FROZEN | {part: "last-1"}))
    }
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    last = {id(parameter) for parameter in part_layers(model, part)[-1].parameters()}
    assert reports[part].trained == sum(
        parameter.numel() for parameter in part_layers(model, part)[-1].parameters()
    )
    assert [report.trained for report in reports.values() if report.part != part] == [0, 0]
    full_step(model, processor.image_token_id)
    for name, parameter in model.named_parameters():
        moves = id(parameter) in last
        assert parameter.requires_grad == moves
        if not (moves and no_true_gradient(name)):
            assert torch.equal(parameter, before[name]) != moves, name


def test_adapters_train_and_what_they_stand_beside_does_not(
    tiny_model: Callable, family: str
) -> None:
    model, processor = tiny_model(family, "dinov2")
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0}
    apply_tuning(
        model, TuningRecipe(vision_tower="lora", projector="full", language_model="lora", lora=lora)
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    projector = {id(parameter) for parameter in model.model.multi_modal_projector.parameters()}
    second = {id(layer.lora_B["default"].weight) for layer in adapter_layers(model).values()}
    for _ in range(2):  # the first factor has a gradient once the second is no longer zero
        full_step(model, processor.image_token_id)
    moved = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert (
        projector | second
        <= moved
        <= {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    )
    assert len(moved) == len(projector) + 2 * len(second)


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_more_layers_than_there_are_is_refused(tiny_model: Callable, part: str) -> None:
    model, _ = tiny_model()
    check_tuning(model, TuningRecipe(**FROZEN | {part: "last-2"}))
    with pytest.raises(
        ValueError,
        match=rf"{part}: last-3 asks for more than its 2 layers: take last-2 at most, or full",
    ):
        check_tuning(model, TuningRecipe(**FROZEN | {part: "last-3"}))


@pytest.mark.parametrize("where", ["tower", "first layer", "embeddings"])
def test_a_tower_whose_gradient_is_cut_is_not_taken_for_unread(
    tiny_model: Callable, tower: str, where: str
) -> None:
    model, _ = tiny_model("llama", tower)
    vision = model.model.vision_tower
    cut = {
        "tower": vision,
        "first layer": part_layers(model, "vision_tower")[0],
        "embeddings": vision.embeddings,
    }[where]
    cut.forward = torch.no_grad()(cut.forward)
    with pytest.raises(
        ValueError,
        match=r"vision_tower: no gradient reaches \d+ of its tensors, "
        r"but its features depend on them",
    ):
        apply_tuning(model, TuningRecipe(**FROZEN | {"vision_tower": "full"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "language_model=last-0",
            r"language_model: a part is frozen, full, lora, qlora or last-N .* "
            r"for example last-4 \(got 'last-0'\)",
        ),
        ("vision_tower=lorra", r"vision_tower: a part is frozen, full, lora, qlora or last-N"),
        ("vision_tower=4", r"vision_tower: a part is frozen, full, lora, qlora or last-N"),
        ("projector=lora", r"projector: must be 'frozen' or 'full'"),
        (
            "lora.rank=8",
            r"lora: no part is lora or qlora, so this would have no effect: "
            r"remove it \(lora=null\) or set a part to lora",
        ),
        ("lora.rnk=8", r"lora\.rnk: unknown key; did you mean rank\?"),
    ],
)
def test_a_wish_that_cannot_be_or_does_nothing_is_refused(
    tiny_run_recipe: Callable, change: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_run_recipe(f"stages.finetune.tuning.{change}")


def test_adapters_have_the_shape_of_the_paper_unless_told(tiny_run_recipe: Callable) -> None:
    """A recipe with adapters is read back, also with an override that removes the adapters."""
    recipe = tiny_run_recipe("stages.finetune.tuning.language_model=lora")
    lora = recipe.stages["finetune"].tuning.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (128, 256, 0.05)
    assert recipe.stages["pretrain"].tuning.lora is None
    assert Recipe.parse(yaml.safe_load(recipe.dump()), source="dump").digest() == recipe.digest()
    assert (
        recipe.override("stages.finetune.tuning.language_model=full").stages["finetune"].tuning.lora
        is None
    )
    smaller = (
        recipe.override(
            "stages.finetune.tuning.lora.rank=8", "stages.finetune.tuning.vision_tower=last-2"
        )
        .stages["finetune"]
        .tuning
    )
    assert (smaller.lora.rank, smaller.lora.alpha, smaller.vision_tower, smaller.adapted) == (
        8,
        256,
        "last-2",
        ("language_model",),
    )


def test_everything_is_counted_once(tiny_model: Callable, family: str) -> None:
    model, _ = tiny_model(family)
    report = apply_tuning(
        model, TuningRecipe(vision_tower="full", projector="full", language_model="full")
    )
    assert [part.part for part in report] == list(PARTS)
    assert sum(part.parameters for part in report) == sum(
        parameter.numel() for parameter in model.parameters()
    )
    names = [name for part in PARTS for name in part_parameters(model, part)]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    by_part = {part.part: part for part in report}
    assert by_part["language_model"].trained == by_part["language_model"].parameters
    assert by_part["projector"].parameters == 24 * 32 + 32 + 32 * 32 + 32


@pytest.mark.parametrize(
    ("family", "tied"), [("qwen2", True), ("gemma", True), ("llama", False), ("phi", False)]
)
def test_a_tied_head_counts_once(tiny_model: Callable, family: str, tied: bool) -> None:
    model, _ = tiny_model(family)
    vocabulary = model.get_input_embeddings().weight.numel()
    counted = [
        parameter
        for parameter in part_parameters(model, "language_model").values()
        if parameter.numel() == vocabulary
    ]
    assert len(counted) == (1 if tied else 2)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_unread_parameters_are_those_the_features_do_not_depend_on(
    tiny_model: Callable, tower: str
) -> None:
    model, _ = tiny_model("llama", tower)
    size = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = torch.cat(model.get_image_features(pixels).pooler_output)
        unread = unread_parameters(model)
        assert unread, "every tower has a norm behind its last layer"
        for name, parameter in part_parameters(model, "vision_tower").items():
            kept = parameter.clone()
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
            changed = not torch.allclose(
                torch.cat(model.get_image_features(pixels).pooler_output), before, atol=1e-6
            )
            parameter.copy_(kept)
            if not no_true_gradient(name):
                assert changed == (name not in unread), name


def test_measuring_leaves_the_model_as_it_was(tiny_model: Callable) -> None:
    model, _ = tiny_model()
    apply_tuning(
        model, TuningRecipe(vision_tower="frozen", projector="full", language_model="frozen")
    )
    before = {
        name: (parameter.requires_grad, parameter.detach().clone())
        for name, parameter in model.named_parameters()
    }
    unread_parameters(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0] and torch.equal(
            parameter, before[name][1]
        ), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tuning_can_be_applied_again(tiny_model: Callable) -> None:
    """The second stage unfreezes what the first froze."""
    model, _ = tiny_model()
    first = apply_tuning(
        model, TuningRecipe(vision_tower="frozen", projector="full", language_model="frozen")
    )
    second = apply_tuning(
        model, TuningRecipe(vision_tower="full", projector="full", language_model="full")
    )
    assert sum(part.trained for part in first) < sum(part.trained for part in second)
    assert (
        apply_tuning(
            model, TuningRecipe(vision_tower="frozen", projector="full", language_model="frozen")
        )
        == first
    )


def test_the_head_trains_alone_and_a_tied_one_is_refused(tiny_model: Callable) -> None:
    """Upstream's first stage: the projector, and weight and bias of Phi's head."""
    tuning = TuningRecipe(vision_tower="frozen", projector="frozen", language_model="head")
    model, _ = tiny_model("phi")
    apply_tuning(model, tuning)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"lm_head.weight", "lm_head.bias"}
    tied, _ = tiny_model("qwen2")
    with pytest.raises(ValueError, match=r"its head is tied to the embeddings.* set it to frozen"):
        apply_tuning(tied, tuning)
    with pytest.raises(ValueError, match="a part is frozen, full"):
        TuningRecipe(vision_tower="head", projector="full", language_model="frozen")
