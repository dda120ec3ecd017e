"""Where the projector starts from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mipha.data.pixels import read_pixels
from mipha.models.modeling import parts
from mipha.models.projector import calibrate_projector, new_projector


@pytest.fixture
def pixels() -> Callable[[int], Tensor]:
    return lambda size: torch.randn(12, 3, size, size, generator=torch.Generator().manual_seed(0))


def features(model: torch.nn.Module, pixel_values: Tensor) -> Tensor:
    """What the projector is given, `(images * tokens, width)`."""
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        model.get_image_features(pixel_values)
    hook.remove()
    return seen[0].flatten(0, 1)


def test_calibrated_the_first_layer_sees_unit_variance(
    tiny_model: Callable, tower: str, pixels: Callable
) -> None:
    """Its output for raw features is the output that it had for centred and scaled ones."""
    model, _ = tiny_model("llama", tower)
    batch = pixels(model.config.vision_config.image_size)
    raw = features(model, batch)
    first = model.model.multi_modal_projector.linear_1
    with torch.no_grad():
        normal = (raw - raw.mean(0)) / raw.std(0)
        wanted = first(normal)
        assert not torch.allclose(first(raw), wanted, atol=1e-2)
        calibrate_projector(model, {"pixel_values": batch})
        assert torch.allclose(first(raw), wanted, atol=1e-4)


def test_calibrated_the_outputs_have_the_scale_of_words(
    tiny_model: Callable, family: str, tower: str, pixels: Callable
) -> None:
    model, _ = tiny_model(family, tower)
    batch = pixels(model.config.vision_config.image_size)
    calibrate_projector(model, {"pixel_values": batch})
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        words = embeddings(torch.arange(embeddings.num_embeddings)).std()
        images = torch.cat(model.get_image_features(batch).pooler_output).std()
    assert images.item() == pytest.approx(words.item(), rel=1e-3)
    if family == "gemma":
        assert words > 2 * embeddings.weight.std(), (
            "the scale that Gemma's embedding layer adds is in it"
        )


@pytest.mark.parametrize(
    "changes",
    [{"image": "tiles", "shuffle": 2}, {"image": "native"}, {"image": "anyres"}],
    ids=["shuffled", "native", "anyres"],
)
def test_pictures_of_other_shapes_are_calibrated_too(
    tiny_model: Callable, changes: dict[str, object]
) -> None:
    model, processor = tiny_model("gemma", "siglip", **changes)
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (height, 60, 3), dtype=np.uint8))
        for height in (30, 60, 90)
    ]
    inputs, own = read_pixels(pictures, processor), parts(model)
    (layer,) = [layer for layer in own.projector[0].modules() if isinstance(layer, nn.Linear)][:1]
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        model.get_image_features(**inputs)
        raw = torch.cat(seen)
        wanted = layer((raw - raw.mean(0)) / raw.std(0))
        calibrate_projector(model, inputs)
        seen.clear()
        made = torch.cat(list(model.get_image_features(**inputs).pooler_output)).std()
        words = model.get_input_embeddings()(torch.arange(400)).std()
        given = torch.cat(seen)
        found = layer(given)
    if layer.bias is None:  # each channel of the tower is normal over all patches
        channels = given.view(-1, 24)
        assert channels.mean(0).abs().max() < 1e-3 and channels.std(0).sub(1).abs().max() < 1e-3
    else:
        assert torch.allclose(found, wanted, atol=1e-3)
    assert made.item() == pytest.approx(words.item(), rel=0.15)


def test_a_channel_that_never_changes_does_not_blow_up(
    tiny_model: Callable, pixels: Callable
) -> None:
    model, _ = tiny_model()
    model.model.vision_tower.post_layernorm = torch.nn.Identity()
    with torch.no_grad():
        calibrate_projector(model, {"pixel_values": pixels(28)[:1].expand(4, -1, -1, -1)})
    assert all(
        parameter.isfinite().all() for parameter in model.model.multi_modal_projector.parameters()
    )


def test_calibration_leaves_the_other_parts_alone(tiny_model: Callable, pixels: Callable) -> None:
    model, _ = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    calibrate_projector(model, {"pixel_values": pixels(28)})
    changed = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert changed == {
        f"model.multi_modal_projector.linear_{number}.{kind}"
        for number in (1, 2)
        for kind in ("weight", "bias")
    }


def test_a_new_projector_starts_as_torch_starts_a_layer(
    tiny_model: Callable, tiny_parts: Callable
) -> None:
    model, _ = tiny_model()
    bare = AutoModelForCausalLM.from_pretrained(tiny_parts().language_model)
    torch.manual_seed(5)
    made = new_projector(model.model.multi_modal_projector.to("meta"), bare)
    torch.manual_seed(5)
    wanted = [torch.nn.Linear(24, 32), torch.nn.Linear(32, 32)]
    for layer, other in zip((made.linear_1, made.linear_2), wanted, strict=True):
        assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)
