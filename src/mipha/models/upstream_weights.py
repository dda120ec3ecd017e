"""The weights of a released checkpoint into the standard model: split, resized and scaled where upstream computed otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.upstream_files import Stored, read_tensor
from mipha.models.upstream_keys import Move, Report


@torch.no_grad()
def copy_weights(
    model: LlavaForConditionalGeneration,
    moves: Sequence[Move],
    stored: Mapping[str, Stored],
    report: Report,
) -> None:
    """Fill a model by the plan, one tensor in memory at a time, and say in the report what became of each.

    Raises:
        ValueError: A head that should be the embeddings is not.
    """
    state, num_heads = model.state_dict(), model.config.text_config.num_attention_heads
    for move in moves:
        if move.reason:
            report.dropped[move.source] = move.reason
            continue
        value = read_tensor(move.source, stored[move.source])
        if len(move.targets) > 1:
            report.split[move.source] = move.targets
            for target, part in zip(move.targets, _unfused(value, num_heads), strict=True):
                state[target].copy_(part)
            continue
        target = state[move.targets[0]]
        report.renamed[move.source] = move.targets[0]
        if value.shape != target.shape:
            value = _resized(value, target.shape[1])
            report.folded[move.source] = (
                f"resized to {target.shape[1] - 1} patches by upstream's rule, which it applied to every image"
            )
        target.copy_(value)
    for move in moves:
        if move.tied_to and not torch.equal(
            read_tensor(move.source, stored[move.source]).to(model.dtype), state[move.tied_to]
        ):
            raise ValueError(
                f"{move.source} is not the embeddings that config.json ties it to: mend tie_word_embeddings in config.json"
            )


@torch.no_grad()
def fold_image_scale(model: LlavaForConditionalGeneration, report: Report) -> None:
    """Gemma's sqrt(width): upstream scaled images and words, the host's embedding layer scales words alone.

    The scaled layer stays in float32 whatever the other weights are, so that nothing is rounded twice.

    Source: GemmaModel of transformers 4.38.2, which multiplied `inputs_embeds`.
    """
    scale = getattr(model.get_input_embeddings(), "scalar_embed_scale", None)
    if scale is None:
        return
    last = model.model.multi_modal_projector.linear_2.float()
    for name, parameter in last.named_parameters():
        parameter.mul_(scale)
        report.folded[f"model.mm_projector.2.{name}"] = (
            f"times {scale:.6g}, the factor on image features that upstream applied later"
        )


@torch.no_grad()
def add_rows(model: LlavaForConditionalGeneration, report: Report) -> None:
    """Rows for the image token where the vocabulary is full: the mean of the others, which is never the most likely word."""
    old, wanted = model.get_input_embeddings().num_embeddings, model.config.image_token_id + 1
    if wanted <= old:
        return
    model.resize_token_embeddings(wanted, pad_to_multiple_of=64, mean_resizing=False)
    head = model.get_output_embeddings()
    tensors = [model.get_input_embeddings().weight, head.weight] + (
        [head.bias] if head.bias is not None else []
    )
    for tensor in tensors:
        tensor[old:] = tensor[:old].float().mean(0)
    report.notes.append(
        f"the vocabulary was full: {len(head.weight) - old} rows were added for the image token"
    )


def _unfused(value: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Query, key and value out of one projection whose rows are (heads, 3, head width).

    Source: Mipha 21dafbf, phi1_5/modeling_phi.py:287.
    """
    by_head = value.reshape(num_heads, 3, -1, *value.shape[1:])
    return tuple(by_head[:, part].flatten(0, 1) for part in range(3))


def _resized(table: Tensor, num_positions: int) -> Tensor:
    """DINOv2's positions for another size: bicubic, by a factor that is a tenth of a patch too large.

    Done once with upstream's rule, the numbers are upstream's; what the host does at run time is another rule.

    Args:
        table: `(1, 1 + patches, width)`, the class token first.
        num_positions: Wanted, class token included.

    Source: Dinov2Embeddings of transformers 4.38.2.
    """
    old, new = math.isqrt(table.shape[1] - 1), math.isqrt(num_positions - 1)
    grid = table[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(
        grid, scale_factor=((new + 0.1) / old,) * 2, mode="bicubic", align_corners=False
    )
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)
