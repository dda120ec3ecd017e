"""What trains, said before and measured after: what is frozen is bit-equal to its start, what is tuned has moved.

first start   record_start    -> states/start.safetensors: the weights that train, and a digest of each that does not
end           measure_change  -> tuning.json: how far each part moved, and the contradictions that fail the run

With several processes the first one measures, on weights that were gathered whole: sharding is nothing that the proof has to trust.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mipha.files import write_whole
from mipha.models.adapters import adapter_deltas, adapter_layers, adapter_parameters
from mipha.models.fingerprint import tensor_digest
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.tuning import TunedPart, part_layers, part_parameters
from mipha.recipe import PARTS, Part, StageRecipe


@dataclass(frozen=True)
class Change:
    """How far one part is from where its stage began.

    Args:
        part: Its name.
        frozen: Its tensors that must stay.
        frozen_changed: Names of those that did not.
        trained: Its tensors that train.
        moved: How many of those differ from their start in any bit.
        idle: Its layers, and what is outside of them as one, in which something trains and nothing moved.
        relative: Norm of the change of what trains, over its norm at the start; an adapter counts as what it adds to the weight
            beside it.
        largest: Change of a single weight.
    """

    part: Part
    frozen: int
    frozen_changed: tuple[str, ...]
    trained: int
    moved: int
    idle: tuple[str, ...]
    relative: float
    largest: float


def record_start(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Keep what the stage begins with; where that was kept before, look whether it is the same.

    Args:
        model: With its tuning applied, not yet sharded, before a state is loaded.
        path: The file that the stage's end is measured against.

    Raises:
        ValueError: The stage was begun with other weights: its states do not fit these.
    """
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    digests = {
        name: tensor_digest(parameter)
        for name, parameter in model.named_parameters()
        if name not in trained
    }
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            before = file.metadata() or {}
        differ = sorted(
            name for name in before.keys() | digests.keys() if before.get(name) != digests.get(name)
        )
        if differ:
            raise ValueError(
                f"{path.parent} was begun with other weights ({_some(differ)}): delete that folder to start the stage anew"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    save_file(
        {name: parameter.detach().cpu().contiguous() for name, parameter in trained.items()},
        beside,
        metadata=digests,
    )
    os.replace(beside, path)


def measure_change(
    model: LlavaForConditionalGeneration, weights: Mapping[str, Tensor], start: Path
) -> list[Change]:
    """Compare weights with the stage's start.

    Args:
        model: May be sharded, for only its structure is read.
        weights: All of its weights by name, whole.
        start: The file of `record_start`.

    Returns:
        One for each part.
    """
    factors = {
        id(parameter)
        for layer in adapter_layers(model).values()
        for parameter in adapter_parameters(layer)
    }
    changes = []
    with safe_open(start, framework="pt") as file:
        trains, digests = set(file.keys()), file.metadata() or {}
        for part in PARTS:
            parameters = part_parameters(model, part)
            frozen = [name for name in parameters if name not in trains]
            trained = [name for name in parameters if name in trains]
            moved = {
                name
                for name in trained
                if not torch.equal(file.get_tensor(name), weights[name].cpu())
            }
            pairs = (
                (file.get_tensor(name), weights[name].cpu())
                for name in trained
                if id(parameters[name]) not in factors
            )
            sizes = [_sizes(before, after - before) for before, after in pairs]
            deltas = adapter_deltas(model, weights)
            sizes += [
                _sizes(own, delta)
                for name, own, delta in deltas
                if f"{name}.base_layer.weight" in parameters
            ]
            before, change = (
                sum(size[0] ** 2 for size in sizes) ** 0.5,
                sum(size[1] ** 2 for size in sizes) ** 0.5,
            )
            changes.append(
                Change(
                    part=part,
                    frozen=len(frozen),
                    frozen_changed=tuple(
                        name for name in frozen if tensor_digest(weights[name]) != digests[name]
                    ),
                    trained=len(trained),
                    moved=len(moved),
                    idle=tuple(
                        unit
                        for unit, names in _units(model, part).items()
                        if names & set(trained) and not names & moved
                    ),
                    relative=change / before if before else float(change > 0),
                    largest=max((size[2] for size in sizes), default=0.0),
                )
            )
    return changes


def contradictions(changes: Sequence[Change], tuned: Sequence[TunedPart], images: int) -> list[str]:
    """What was measured but not asked for: a frozen tensor that changed, a tuned layer that did not.

    Args:
        images: That the stage was trained on, in all; without any, only the language model can move.
    """
    found = []
    for change, wish in zip(changes, tuned, strict=True):
        if change.frozen_changed:
            found.append(
                f"{change.part} ({wish.tuning}): frozen tensors changed, {_some(change.frozen_changed)}"
            )
        if change.idle and (images or change.part == "language_model"):
            found.append(f"{change.part} ({wish.tuning}): nothing moved in {_some(change.idle)}")
    return found


def write_report(
    path: Path,
    tuned: Sequence[TunedPart],
    stage: StageRecipe,
    changes: Sequence[Change] = (),
    found: Sequence[str] = (),
) -> None:
    """Write what trains, and once it is known how far it moved and what contradicts the recipe, as JSON."""
    measured = {change.part: {"change": asdict(change)} for change in changes}
    rates = {
        wish.part: {"learning_rate": stage.peak_learning_rate(wish.part)}
        for wish in tuned
        if wish.trained
    }
    rows = {
        wish.part: asdict(wish) | rates.get(wish.part, {}) | measured.get(wish.part, {})
        for wish in tuned
    }
    write_whole(path, json.dumps({"parts": rows, "contradictions": list(found)}, indent=2) + "\n")


def refuse_contradictions(path: Path) -> None:
    """Fail where a stage's report names a contradiction; one that an earlier process found stands until the stage is trained anew.

    Raises:
        ValueError: It does.
    """
    found = json.loads(path.read_text(encoding="utf-8"))["contradictions"] if path.is_file() else []
    if found:
        raise ValueError(
            f"{path.parent} did not train what its recipe asks for, so no checkpoint was exported: {'; '.join(found)}. Look for code that "
            f"cuts gradients or writes weights (no_grad, detach, a hook) and for a learning rate too small to move them, then delete "
            f"{path.parent} to train the stage anew"
        )


def tuning_table(title: str, tuned: Sequence[TunedPart], stage: StageRecipe) -> Table:
    """What will train, part by part."""
    table = _table(title, "part", "tuning", "parameters", "trained", "learning rate", "kept in")
    for wish in tuned:
        rate = f"{stage.peak_learning_rate(wish.part):g}" if wish.trained else "-"
        table.add_row(
            wish.part,
            wish.tuning,
            f"{wish.parameters:,}",
            f"{wish.trained:,}",
            rate,
            ", ".join(wish.dtypes),
        )
    return table


def change_table(title: str, changes: Sequence[Change]) -> Table:
    """What has moved, part by part."""
    table = _table(
        title, "part", "tensors moved", "relative change", "largest change", "frozen, bit-equal"
    )
    for change in changes:
        moved = (
            (
                f"{change.moved} of {change.trained}",
                f"{change.relative:.2%}",
                f"{change.largest:.2g}",
            )
            if change.trained
            else ("-",) * 3
        )
        still = (
            f"{change.frozen - len(change.frozen_changed)} of {change.frozen}"
            if change.frozen
            else "-"
        )
        table.add_row(change.part, *moved, still)
    return table


def _units(model: LlavaForConditionalGeneration, part: Part) -> dict[str, set[str]]:
    """Names of a part's tensors by layer: the smallest piece that a gradient reaches whole or not at all.

    A single tensor can stay for good reason: the bias of an attention key has no gradient, a low-rank factor has none in the first step.
    """
    names = {id(parameter): name for name, parameter in part_parameters(model, part).items()}
    layers = part_layers(model, part) if part != "projector" else []
    units = {
        f"layer {index}": {names.pop(id(p)) for p in layer.parameters()}
        for index, layer in enumerate(layers)
    }
    return units | {"outside its layers" if layers else "all of it": set(names.values())}


def _sizes(before: Tensor, change: Tensor) -> tuple[float, float, float]:
    """Norm of a tensor, norm of its change, and the largest change."""
    norms = [
        torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64).item()
        for tensor in (before, change)
    ]
    return norms[0], norms[1], change.detach().abs().max().item()


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(
            column,
            justify="left" if column in ("part", "tuning") else "right",
            no_wrap=column == "part",
        )
    return table
