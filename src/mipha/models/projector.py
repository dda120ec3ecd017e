"""The projector's initial weights: two linear layers with a GELU; in Idefics3 one without bias."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mipha.models.modeling import LlavaForConditionalGeneration, parts


def new_projector(meta: nn.Module, language_model: PreTrainedModel) -> nn.Module:
    """Return a projector with torch's default initial weights, as in LLaVA and Mipha.

    Args:
        meta: Projector of transformers on the meta device.
        language_model: Language model that the projector feeds: gives device, type of the weights,
            and the scale of its text embeddings, where they have one.
    """
    device = language_model.device
    projector = meta.to_empty(device=device).to(language_model.dtype)
    layers = [layer for layer in projector.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        layer.reset_parameters()

    # Gemma's text embeddings are scaled by sqrt(width) inside the embedding layer, which image
    # features do not pass.
    scale = getattr(language_model.get_input_embeddings(), "embed_scale", None)
    if scale is not None and device.type != "meta":
        _scale(layers[-1], float(scale))
    return projector


def new_end_of_row(language_model: PreTrainedModel) -> nn.Parameter:
    """Return what stands behind each row of a grid of tiles, `(width,)`.

    Source: transformers 5.23 `LlavaNextModel`, normal with deviation 1 / sqrt(width).
    """
    width, device = language_model.config.hidden_size, language_model.device
    values = torch.randn(width, dtype=language_model.dtype, device=device) / width**0.5
    scale = getattr(language_model.get_input_embeddings(), "embed_scale", None)
    if scale is not None and device.type != "meta":
        values *= float(scale)
    return nn.Parameter(values)


@torch.no_grad()
def calibrate_projector(model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor]) -> None:
    """Fit the projector's initial weights to the tower's features and the text embeddings.

    The first layer gets features that are centred and have deviation 1 in every channel. This is
    folded into its weights, so the model stays the stock one; the projector of Idefics3 has no
    bias, so there it is folded into the norm before it, which nothing else reads. The last layer's
    outputs get the deviation of the text embeddings. Channels of a tower differ by orders of
    magnitude, and with the default weights the largest ones hide the others.

    Args:
        model: Model whose projector is changed.
        inputs: A few dozen training images, as `read_pixels` makes them.
    """
    own = parts(model)
    (tower,), (projector,) = own.vision_tower, own.projector
    layers = [layer for layer in projector.modules() if isinstance(layer, nn.Linear)]
    if layers[0].bias is None:
        norm = tower.post_layernorm
        made = [outputs for _, outputs in _passing(norm, model, inputs)]
        features = torch.cat(made).float()  # (tiles, patches, width of the tower)
        mean, deviation = _spread(features.flatten(0, 1))
        norm.weight.div_(deviation)
        norm.bias.sub_(mean).div_(deviation)
        outputs = projector((features - mean) / deviation)
    else:
        first, last = layers
        given = [entering.flatten(0, -2) for entering, _ in _passing(first, model, inputs)]
        features = torch.cat(given).float()  # (tokens, width)
        mean, deviation = _spread(features)
        weight = first.weight / deviation
        first.weight.copy_(weight)
        first.bias.sub_(weight @ mean)
        outputs = last(projector.act(first(features)))

    # Give the output the deviation of the text embeddings, measured on about 4,096 of them.
    embeddings = model.get_input_embeddings()
    stride = max(1, embeddings.num_embeddings // 4096)
    text = embeddings(torch.arange(0, embeddings.num_embeddings, stride))
    _scale(layers[-1], float(text.float().std() / outputs.std()))


def _spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each channel of `(tokens, width)`."""
    return features.mean(0), features.std(0).clamp(min=1e-6)


def _passing(
    layer: nn.Module, model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return what a layer gets of some images and what it makes of it, of each of its calls."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    model.get_image_features(**inputs)
    hook.remove()
    return seen


@torch.no_grad()
def _scale(layer: nn.Linear, factor: float) -> None:
    layer.weight.mul_(factor)
    if layer.bias is not None:
        layer.bias.mul_(factor)
