"""The projector's initial weights: of LLaVA, two linear layers with an exact GELU between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mipha.models.modeling import LlavaForConditionalGeneration


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
def calibrate_projector(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> None:
    """Fit the projector's initial weights to the tower's features and the text embeddings.

    The first layer gets features that are centred and have deviation 1 in every channel. This is
    folded into its weights, so the model stays the stock one. The last layer's outputs get the
    deviation of the text embeddings. Channels of a tower differ by orders of magnitude, and with
    the default weights the largest ones hide the others.

    Args:
        model: Model whose projector is changed.
        pixel_values: Tiles of a few dozen training images, `(tiles, 3, height, width)`.
    """
    # Measure the tower's features.
    projector = model.model.multi_modal_projector
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[
        model.config.vision_feature_layer
    ]
    features = hidden[:, 1:] if model.config.vision_feature_select_strategy == "default" else hidden
    features = features.flatten(0, 1).float()  # (tokens, width of the tower)
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)

    # Fold centring and scaling into the first layer.
    first = projector.linear_1
    weight = first.weight / deviation
    first.weight.copy_(weight)
    first.bias.sub_(weight @ mean)

    # Give the output the deviation of the text embeddings, measured on about 4,096 of them.
    embeddings = model.get_input_embeddings()
    stride = max(1, embeddings.num_embeddings // 4096)
    text = embeddings(torch.arange(0, embeddings.num_embeddings, stride))
    _scale(projector.linear_2, float(text.float().std() / projector(features).std()))


@torch.no_grad()
def _scale(layer: nn.Linear, factor: float) -> None:
    layer.weight.mul_(factor)
    if layer.bias is not None:
        layer.bias.mul_(factor)
