"""Which tensor of a released checkpoint becomes which tensor of the standard model: tables of names; nothing is loaded.

    model.mm_projector.0.weight           -> model.multi_modal_projector.linear_1.weight
    ...self_attn.query_key_value.weight   -> ...q_proj.weight, ...k_proj.weight, ...v_proj.weight
    model.vision_tower.vision_model.head. -> dropped, with the reason

Every name is accounted for, or the whole checkpoint is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

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
"""A pattern for a whole name, and what it becomes; the first that fits counts. Three names: heads, each with q, k and v, side by side.

One table serves every family, because a new name counts only where the model of the config has such a tensor.

Source: the key map that was checked by strict loading against Mipha 21dafbf (transformers 4.38.2), and LLaVA 1.5 for the projector.
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
    """What becomes of one tensor.

    Args:
        source: Its name in the released checkpoint.
        targets: Its name in the model, or three names for a fused projection; none where it is dropped.
        reason: Why it is dropped.
        tied_to: The tensor of the model that it must equal, where it is dropped for that.
    """

    source: str
    targets: tuple[str, ...] = ()
    reason: str = ""
    tied_to: str = ""


@dataclass
class Report:
    """What became of every tensor of a released checkpoint; names on the left are the released ones.

    Args:
        source: Folder or hub id.
        renamed: One tensor, one new name, the same numbers unless it is also under `folded`.
        split: A fused tensor and the tensors it became.
        folded: Tensors whose numbers were changed so that the standard model computes the same, and how.
        dropped: Tensors that are not taken over, and why.
        notes: What else is not as it was.
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
        stored: Shapes by name, of the checkpoint.
        wanted: Shapes by name, of the model; tied ones included.
        tower_layers: Layers of the vision tower that are kept.
        tied: Tensors of the model that are another tensor of it, such as a tied head, and that other.
        given: Tensors of the model that come from elsewhere, such as a tower that the checkpoint only names.

    Raises:
        ValueError: A tensor is unknown, missing or of another shape; the first few are named.
    """
    tied = tied or {}
    moves = [_move(name, wanted, tower_layers, tied) for name in sorted(stored)]
    unexpected = [move.source for move in moves if not move.targets and not move.reason]
    reached = [target for move in moves for target in move.targets]
    missing = sorted(set(wanted) - set(reached) - set(tied) - set(given))
    misshapen = [problem for move in moves for problem in _misshapen(move, stored, wanted)]
    twice = (
        sorted({target for target in reached if reached.count(target) > 1})
        if len(reached) > len(set(reached))
        else []
    )
    problems = {
        "unexpected": unexpected,
        "missing": missing,
        "of another shape": misshapen,
        "there twice": twice,
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {_first(names)}" for kind, names in problems.items() if names)
        raise ValueError(
            f"the tensors do not fit the model that config.json describes ({told}): give a whole, unchanged checkpoint"
        )
    return moves


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


def _first(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
