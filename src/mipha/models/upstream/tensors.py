"""Move every tensor of a released checkpoint into the standard model, or drop it for a reason.

`plan` decides by tables of names, before a weight is loaded:

    model.mm_projector.0.weight           -> model.multi_modal_projector.linear_1.weight
    ...self_attn.query_key_value.weight   -> ...q_proj.weight, ...k_proj.weight, ...v_proj.weight
    model.vision_tower.vision_model.head. -> dropped, with the reason

Every name is accounted for, or the whole checkpoint is refused. `copy_weights` follows the plan;
`fold_image_scale` and `add_rows` change numbers where upstream computed otherwise.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from mipha.checkpoint_files import StoredTensor
from mipha.lookup import list_some
from mipha.models.checkpoint_folder import read_tensor
from mipha.models.modeling import LlavaForConditionalGeneration

Shape = tuple[int, ...]

_TOWER, _TEXT, _PROJECTOR = (
    "model.vision_tower.",
    "model.language_model.",
    "model.multi_modal_projector.",
)

RENAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"model\.mm_projector\.0\.(weight|bias)", (_PROJECTOR + r"linear_1.\1",)),
    (r"model\.mm_projector\.2\.(weight|bias)", (_PROJECTOR + r"linear_2.\1",)),
    # SigLIP and CLIP; LLaVA wraps the tower once more.
    (r"model\.vision_tower\.(?:vision_tower\.)?vision_model\.(.+)", (_TOWER + r"\1",)),
    (
        r"model\.vision_tower\.dinov2\.(.+\.attention)\.attention\.query\.(weight|bias)",
        (_TOWER + r"\1.q_proj.\2",),
    ),
    (
        r"model\.vision_tower\.dinov2\.(.+\.attention)\.attention\.key\.(weight|bias)",
        (_TOWER + r"\1.k_proj.\2",),
    ),
    (
        r"model\.vision_tower\.dinov2\.(.+\.attention)\.attention\.value\.(weight|bias)",
        (_TOWER + r"\1.v_proj.\2",),
    ),
    (
        r"model\.vision_tower\.dinov2\.(.+\.attention)\.output\.dense\.(weight|bias)",
        (_TOWER + r"\1.o_proj.\2",),
    ),
    (r"model\.vision_tower\.dinov2\.(.+)", (_TOWER + r"\1",)),
    (
        r"model\.(layers\.\d+\.self_attn)\.query_key_value\.(weight|bias)",
        tuple(_TEXT + rf"\1.{part}_proj.\2" for part in "qkv"),
    ),
    (r"model\.((?:embed_tokens|layers|norm|final_layernorm)\..+)", (_TEXT + r"\1",)),
    (r"lm_head\.(weight|bias)", (r"lm_head.\1",)),
)
"""A pattern for a whole name, and the new names; the first pattern that fits counts.

Three new names mean a fused tensor: heads, each with q, k and v, side by side. One table serves
every family, because a new name counts only where the model of the config has such a tensor.

Source: the key map that was checked by strict loading against Mipha 21dafbf (transformers 4.38.2),
    and LLaVA 1.5 for the projector.
"""

_NEVER_READ: tuple[tuple[str, str], ...] = (
    (
        r"model\.vision_tower\.(?:vision_tower\.)?vision_model\.head\..+",
        "the pooling head, which is never read",
    ),
    (
        r"model\.vision_tower\.dinov2\.embeddings\.mask_token",
        "the mask token, which only its own training read",
    ),
    (r".+\.rotary_emb\.inv_freq", "a buffer that is computed from the config"),
    (r"model\.vision_tower\..+\.position_ids", "a buffer that is computed from the config"),
)
_TOWER_LAYER = re.compile(r"model\.vision_tower\.encoder\.layers?\.(\d+)\..+")


@dataclass(frozen=True)
class Move:
    """The fate of one tensor.

    Args:
        source: Name in the released checkpoint.
        targets: Name in the model, or three names for a fused projection; empty where the tensor
            is dropped.
        reason: Reason why it is dropped.
        tied_to: Tensor of the model that it must equal, where it is dropped for that.
    """

    source: str
    targets: tuple[str, ...] = ()
    reason: str = ""
    tied_to: str = ""


@dataclass
class Report:
    """The fate of every tensor of a released checkpoint; keys are the released names.

    Args:
        source: Folder or hub id.
        renamed: Tensors with one new name, and the same numbers unless they are also in `folded`.
        split: Fused tensors, and the tensors that they became.
        folded: Tensors whose numbers were changed so that the standard model computes the same.
        dropped: Tensors that are left out, and the reasons.
        notes: Other differences.
    """

    source: str
    renamed: dict[str, str] = field(default_factory=dict)
    split: dict[str, tuple[str, ...]] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {
            kind: len(getattr(self, kind)) for kind in ("renamed", "split", "folded", "dropped")
        }
        lines = [
            f"{self.source}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items())
        ]
        reasons = list(self.dropped.values())
        lines += [f"dropped {reasons.count(reason)}: {reason}" for reason in dict.fromkeys(reasons)]
        lines += [f"folded {name}: {how}" for name, how in self.folded.items()]
        return "\n  ".join(lines + self.notes)


def plan(
    stored: Mapping[str, Shape],
    wanted: Mapping[str, Shape],
    tower_layers: int,
    tied: Mapping[str, str] | None = None,
    given: Collection[str] = (),
) -> list[Move]:
    """Account for every tensor of a checkpoint and every tensor of the model.

    Args:
        stored: Shapes of the checkpoint's tensors by name.
        wanted: Shapes of the model's tensors by name; tied ones included.
        tower_layers: Layers of the vision tower that are kept.
        tied: Tensors of the model that share the numbers of another, such as a tied head, with the
            name of that other.
        given: Tensors of the model that come from elsewhere, such as a tower that the checkpoint
            only names.

    Returns:
        One move for every tensor of the checkpoint.

    Raises:
        ValueError: A tensor is unknown, missing or of another shape; the first few are named.
    """
    tied = tied or {}
    moves = [_move(name, wanted, tower_layers, tied) for name in sorted(stored)]
    reached = [target for move in moves for target in move.targets]

    problems = {
        "unexpected": [move.source for move in moves if not move.targets and not move.reason],
        "missing": sorted(set(wanted) - set(reached) - set(tied) - set(given)),
        "of another shape": [
            problem for move in moves for problem in _misshapen(move, stored, wanted)
        ],
        "there twice": sorted(name for name, count in Counter(reached).items() if count > 1),
    }
    if any(problems.values()):
        found = "; ".join(
            f"{kind}: {list_some(names)}" for kind, names in problems.items() if names
        )
        raise ValueError(
            f"the tensors do not fit the model that config.json describes ({found}): "
            "give a whole, unchanged checkpoint"
        )
    return moves


@torch.no_grad()
def copy_weights(
    model: LlavaForConditionalGeneration,
    moves: Sequence[Move],
    stored: Mapping[str, StoredTensor],
    report: Report,
) -> None:
    """Fill a model by the plan, one tensor in memory at a time, and write the report.

    Args:
        model: Model to fill.
        moves: Plan.
        stored: Tensors of the checkpoint by name.
        report: Report to fill.

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
                f"resized to {target.shape[1] - 1} patches by upstream's rule, "
                "which it applied to every image"
            )
        target.copy_(value)

    # Tied tensors can be compared only when the tensors they are tied to are there.
    for move in moves:
        if move.tied_to and not torch.equal(
            read_tensor(move.source, stored[move.source]).to(model.dtype), state[move.tied_to]
        ):
            raise ValueError(
                f"{move.source} is not the embeddings that config.json ties it to: "
                "fix tie_word_embeddings in config.json"
            )


@torch.no_grad()
def fold_image_scale(model: LlavaForConditionalGeneration, report: Report) -> None:
    """Fold Gemma's factor sqrt(width) on image features into the projector.

    Upstream scaled images and words; the embedding layer of transformers scales words alone. The
    scaled layer stays in float32 whatever the other weights are, so that nothing is rounded twice.

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
    """Add rows for the image token where the vocabulary is full.

    They are the mean of the others, which is never the most likely word.
    """
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


def _move(
    name: str, wanted: Mapping[str, Shape], tower_layers: int, tied: Mapping[str, str]
) -> Move:
    for pattern, reason in _NEVER_READ:
        if re.fullmatch(pattern, name):
            return Move(name, reason=reason)

    targets = _targets(name)
    if targets and targets[0] in tied:
        return Move(
            name, reason="tied: the same numbers as the embeddings", tied_to=tied[targets[0]]
        )
    if targets and all(target in wanted for target in targets):
        return Move(name, targets)

    layer = _TOWER_LAYER.fullmatch(targets[0]) if targets else None
    if layer and int(layer[1]) >= tower_layers:
        return Move(name, reason=f"above the tower's layer {tower_layers}, the one that is read")
    return Move(name)


def _targets(name: str) -> tuple[str, ...]:
    for pattern, templates in RENAMES:
        if match := re.fullmatch(pattern, name):
            return tuple(match.expand(template) for template in templates)
    return ()


def _misshapen(
    move: Move, stored: Mapping[str, Shape], wanted: Mapping[str, Shape]
) -> Iterable[str]:
    if not move.targets:
        return
    first, *rest = wanted[move.targets[0]]
    expected = (first * len(move.targets), *rest)
    if tuple(stored[move.source]) != expected:
        yield f"{move.source} is {tuple(stored[move.source])} where {expected} is described"


def _unfused(value: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return query, key and value of one projection whose rows are (heads, 3, head width).

    Source: Mipha 21dafbf, phi1_5/modeling_phi.py:287.
    """
    by_head = value.reshape(num_heads, 3, -1, *value.shape[1:])
    return tuple(by_head[:, part].flatten(0, 1) for part in range(3))


def _resized(table: Tensor, num_positions: int) -> Tensor:
    """Resize DINOv2's positions: bicubic, by a factor that is a tenth of a patch too large.

    This is upstream's rule, applied once; transformers resizes by another one at run time.

    Args:
        table: `(1, 1 + patches, width)`, the class token first.
        num_positions: Positions of the new table, class token included.

    Source: Dinov2Embeddings of transformers 4.38.2.
    """
    old, new = math.isqrt(table.shape[1] - 1), math.isqrt(num_positions - 1)
    grid = table[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(
        grid, scale_factor=((new + 0.1) / old,) * 2, mode="bicubic", align_corners=False
    )
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)
