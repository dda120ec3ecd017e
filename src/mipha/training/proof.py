"""Report and proof of what trains: frozen weights equal their start, tuned layers have moved.

start   record_start    -> states/start.safetensors: weights that train, digests of all weights
end     measure_change  -> tuning.json: how far each part moved, and what contradicts the recipe

The first process measures, on weights that were gathered whole, so that the proof need not trust
sharding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mipha.files import read_json_object, whole_file, write_whole
from mipha.lookup import list_some
from mipha.models.adapters import adapter_deltas, adapter_layers, adapter_parameters
from mipha.models.fingerprint import tensor_digest
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.tuning import TunedPart, part_layers, part_parameters
from mipha.recipe import PARTS, Part, StageRecipe


@dataclass(frozen=True)
class Change:
    """How far one part is from where its stage began.

    Args:
        part: Name of the part.
        frozen: Number of its tensors that must stay.
        frozen_changed: Names of those that did not stay.
        trained: Number of its tensors that train.
        moved: Number of those that differ from their start in any bit.
        idle: Layers in which something trains and nothing moved; what is outside of layers is one.
        relative: Norm of the change of what trains, over its norm at the start. An adapter counts
            as what it adds to the weight beside it.
        largest: Largest change of a single weight.
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
    """Keep what the stage begins with; where it was kept before, check that it is the same.

    Args:
        model: Model with its tuning applied, not yet sharded, before a state is loaded.
        path: File that the end of the stage is measured against.

    Raises:
        ValueError: The stage was begun with other weights: its states do not fit these. Or the
            file is damaged.
    """
    parameters = dict(model.named_parameters())
    trained = {name: weight for name, weight in parameters.items() if weight.requires_grad}
    digests = {name: tensor_digest(weight) for name, weight in parameters.items()}

    if path.is_file():
        frozen = {name: digest for name, digest in digests.items() if name not in trained}
        _check_start(path, frozen)
        return

    tensors = {name: weight.detach().cpu().contiguous() for name, weight in trained.items()}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=digests)


def _check_start(path: Path, frozen: Mapping[str, str]) -> None:
    """Refuse the record of a start that is damaged, or of other frozen weights than these.

    Args:
        frozen: Digests of the frozen weights of this start, by name.
    """
    # Read it whole: the end of the stage is measured against every bit.
    try:
        with safe_open(path, framework="pt") as file:
            before = file.metadata() or {}
            kept = {name: tensor_digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete {path.parent} to start the stage anew"
        ) from error
    if changed := sorted(name for name, digest in kept.items() if before.get(name) != digest):
        raise ValueError(
            f"{path} is damaged or of an older version: {list_some(changed, 3)} differs from its "
            f"checksum; delete {path.parent} to start the stage anew"
        )

    # Compare what must not move. What trains may differ in its last bits on another machine.
    names = sorted((before.keys() - kept.keys()) | frozen.keys())
    differ = [name for name in names if before.get(name) != frozen.get(name)]
    if differ:
        raise ValueError(
            f"{path.parent} was begun with other weights ({list_some(differ, 3)}): "
            "delete that folder to start the stage anew"
        )


def measure_change(
    model: LlavaForConditionalGeneration, weights: Mapping[str, Tensor], start: Path
) -> list[Change]:
    """Compare weights with the start of the stage.

    Args:
        model: Model; may be sharded, because only its structure is read.
        weights: All of its weights by name, whole.
        start: File of `record_start`.

    Returns:
        One change for each part.
    """
    with safe_open(start, framework="pt") as file:
        return [_measure_part(model, part, weights, file) for part in PARTS]


def _measure_part(
    model: LlavaForConditionalGeneration, part: Part, weights: Mapping[str, Tensor], start: Any
) -> Change:
    """Compare one part.

    Args:
        start: Open file of `record_start`: weights that train, and digests of all.
    """
    parameters, trains = part_parameters(model, part), set(start.keys())
    digests = start.metadata() or {}
    frozen = [name for name in parameters if name not in trains]
    trained = [name for name in parameters if name in trains]

    # Any bit counts as moved.
    moved = {
        name for name in trained if not torch.equal(start.get_tensor(name), weights[name].cpu())
    }
    idle = [
        unit
        for unit, names in _units(model, part).items()
        if names & set(trained) and not names & moved
    ]

    # Sizes of the change: of own weights, and of what adapters add to the weights beside them.
    factors = {
        id(parameter)
        for layer in adapter_layers(model).values()
        for parameter in adapter_parameters(layer)
    }
    sizes = []
    for name in trained:
        if id(parameters[name]) not in factors:
            before = start.get_tensor(name)
            sizes.append(_sizes(before, weights[name].cpu() - before))
    for name, own, delta in adapter_deltas(model, weights):
        if f"{name}.base_layer.weight" in parameters:
            sizes.append(_sizes(own, delta))
    norm = sum(size[0] ** 2 for size in sizes) ** 0.5
    change = sum(size[1] ** 2 for size in sizes) ** 0.5

    return Change(
        part=part,
        frozen=len(frozen),
        frozen_changed=tuple(
            name for name in frozen if tensor_digest(weights[name]) != digests[name]
        ),
        trained=len(trained),
        moved=len(moved),
        idle=tuple(idle),
        relative=change / norm if norm else float(change > 0),
        largest=max((size[2] for size in sizes), default=0.0),
    )


def contradictions(changes: Sequence[Change], tuned: Sequence[TunedPart], images: int) -> list[str]:
    """Return what contradicts the recipe: a frozen tensor that changed, a tuned layer that did not.

    Args:
        images: Images that the stage was trained on; without any, only the language model can move.
    """
    found = []
    for change, wish in zip(changes, tuned, strict=True):
        name = f"{change.part} ({wish.tuning})"
        if change.frozen_changed:
            found.append(f"{name}: frozen tensors changed, {list_some(change.frozen_changed, 3)}")
        if change.idle and (images or change.part == "language_model"):
            found.append(f"{name}: nothing moved in {list_some(change.idle, 3)}")
    return found


def write_report(
    path: Path,
    tuned: Sequence[TunedPart],
    stage: StageRecipe,
    changes: Sequence[Change] = (),
    found: Sequence[str] = (),
) -> None:
    """Write as JSON what trains; at the end also how far it moved, and the contradictions."""
    measured = {change.part: {"change": asdict(change)} for change in changes}
    rows = {}
    for wish in tuned:
        rate = {"learning_rate": stage.peak_learning_rate(wish.part)} if wish.trained else {}
        rows[wish.part] = asdict(wish) | rate | measured.get(wish.part, {})
    write_whole(path, json.dumps({"parts": rows, "contradictions": list(found)}, indent=2) + "\n")


def refuse_contradictions(path: Path) -> None:
    """Refuse a stage whose report names contradictions, also those that an earlier process found.

    Raises:
        ValueError: It does; they stand until the stage is trained anew.
    """
    found = read_json_object(path).get("contradictions") if path.is_file() else []
    if found:
        raise ValueError(
            f"{path.parent} did not train what its recipe asks for, so no checkpoint was exported: "
            f"{'; '.join(found)}. Look for code that cuts gradients or writes weights (no_grad, "
            "detach, a hook) and for a learning rate too small to move them, then delete "
            f"{path.parent} to train the stage anew"
        )


def tuning_table(title: str, tuned: Sequence[TunedPart], stage: StageRecipe) -> Table:
    """Return a table of what will train, part by part."""
    table = _table(title, "part", "tuning", "parameters", "trained", "learning rate", "kept in")
    for wish in tuned:
        rate = f"{stage.peak_learning_rate(wish.part):g}" if wish.trained else "-"
        numbers = (f"{wish.parameters:,}", f"{wish.trained:,}", rate)
        table.add_row(wish.part, wish.tuning, *numbers, ", ".join(wish.dtypes))
    return table


def change_table(title: str, changes: Sequence[Change]) -> Table:
    """Return a table of what has moved, part by part."""
    columns = ("tensors moved", "relative change", "largest change", "frozen, bit-equal")
    table = _table(title, "part", *columns)
    for change in changes:
        moved, still = ["-"] * 3, "-"
        if change.trained:
            moved = [f"{change.moved} of {change.trained}"]
            moved += [f"{change.relative:.2%}", f"{change.largest:.2g}"]
        if change.frozen:
            still = f"{change.frozen - len(change.frozen_changed)} of {change.frozen}"
        table.add_row(change.part, *moved, still)
    return table


def _units(model: LlavaForConditionalGeneration, part: Part) -> dict[str, set[str]]:
    """Return the tensor names of a part by layer, the smallest unit that a gradient reaches whole.

    A single tensor can stay for good reason: the bias of an attention key has no gradient, and a
    low-rank factor has none in the first step.
    """
    names = {id(parameter): name for name, parameter in part_parameters(model, part).items()}
    layers = part_layers(model, part) if part != "projector" else []
    units = {
        f"layer {index}": {names.pop(id(p)) for p in layer.parameters()}
        for index, layer in enumerate(layers)
    }
    return units | {"outside its layers" if layers else "all of it": set(names.values())}


def _sizes(before: Tensor, change: Tensor) -> tuple[float, float, float]:
    """Return the norm of a tensor, the norm of its change, and the largest change."""
    norms = [
        torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64).item()
        for tensor in (before, change)
    ]
    return norms[0], norms[1], change.detach().abs().max().item()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        justify = "left" if column in ("part", "tuning") else "right"
        table.add_column(column, justify=justify, no_wrap=column == "part")
    return table
