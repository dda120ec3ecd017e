"""A recipe: everything that decides a training run, in one strict YAML file.

    load_recipe("quickstart") -> Recipe -> .override("seed=7", "stages.finetune.learning_rate=1e-4") -> .save(path)

An unknown key, a value of the wrong type and a setting that would be ignored are errors here, before a model is built.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mipha.lookup import files_in, read_named, read_yaml
from mipha.validation import validated

RECIPES = Path(__file__).parent / "catalog" / "recipes"

Part = Literal["vision_tower", "projector", "language_model"]
PARTS: tuple[Part, ...] = ("vision_tower", "projector", "language_model")
Layered = Literal["vision_tower", "language_model"]
"""The parts that are a stack of repeated layers."""
StageName = Literal["pretrain", "finetune"]
STAGES: tuple[StageName, ...] = ("pretrain", "finetune")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRecipe(_Strict):
    """Which parts are joined, and how the image enters."""

    vision_tower: str = Field(description="catalog name, folder or hub id")
    language_model: str = Field(description="catalog name, folder or hub id")
    chat_template: str | None = Field(
        None,
        description="name in catalog/chat_templates or a .jinja file; null: the language model's own",
    )
    image_size: int | None = Field(None, ge=1, description="pixels a side; null: the tower's own")
    feature_layer: int = Field(
        -2, description="which hidden state of the tower is read; -1 the last, -2 the one before"
    )
    post_layernorm: bool = Field(
        False,
        description="norm it as the tower norms its output; only transformers reads such a checkpoint",
    )
    pad_to_square: bool = Field(True, description="true: pad with the mean colour; false: squash")
    calibrate_projector: bool = Field(
        False,
        description="start the projector at the scales of features and text, from the first training images",
    )


def _as_list(value: Any) -> Any:
    """One mapping or path stands for a list of one."""
    return value if isinstance(value, list | tuple) else [value]


class DataRecipe(_Strict):
    """One data set of a stage."""

    dataset: str = Field(description="module name in data/datasets; auto: told from the data")
    root: Path | None = Field(
        None,
        description="file or folder the data set reads; null: the packaged copy, where there is one",
    )
    split: str = "train"
    image_root: Annotated[tuple[Path, ...], BeforeValidator(_as_list)] = Field(
        (),
        description="folders that images may lie in, beside the data file's own; a relative path starts from the first",
    )
    limit: int | None = Field(None, ge=1, description="use the first N samples only")
    weight: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="how often an epoch shows each sample; 0.5: a half of them, the other half in the next",
    )
    cap: int | None = Field(
        None, ge=1, description="at most N samples an epoch, others in the next"
    )
    images: Literal["own", "grey", "shuffled"] = Field(
        "own",
        description="what samples show; grey, or the images of other samples: what a model learns from the texts alone",
    )


class LoraRecipe(_Strict):
    """The shape of low-rank adapters.

    Source: section 4.3 of the paper for rank 128 and alpha 256; it gives no dropout, 0.05 is that of upstream's code.
    """

    rank: int = Field(128, ge=1)
    alpha: int = Field(256, ge=1, description="what an adapter adds is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="of what enters an adapter, in training")


def _known_tuning(value: Any) -> Any:
    if not re.fullmatch("frozen|full|lora|qlora|last-[1-9][0-9]*", str(value)):
        raise ValueError(
            "a part is frozen, full, lora, qlora or last-N (its last N layers), for example last-4"
        )
    return value


def _layered_parts(value: Any) -> Any:
    """`true`, `false`, or a list of parts; one part stands for a list of one."""
    listed = [value] if isinstance(value, str) else value
    if isinstance(listed, list | tuple) and all(
        part in ("vision_tower", "language_model") for part in listed
    ):
        return tuple(dict.fromkeys(listed))
    if isinstance(value, bool):
        return value
    raise ValueError("write true, false, or a list of vision_tower and language_model")


LayeredTuning = Annotated[str, BeforeValidator(_known_tuning)]


class TuningRecipe(_Strict):
    """What is trained of each part.

    frozen: nothing, the head neither. full: all that the features or the answer depend on. lora: adapters in every linear layer of
    its stack, the part's own weights frozen. qlora: the same, over weights kept in 4 bits (one GPU only). last-N: its last N layers,
    nothing before or behind them. A stage with adapters exports its model with them merged in, so that any stage can follow it.
    """

    vision_tower: LayeredTuning = Field(description="frozen, full, lora, qlora or last-N")
    projector: Literal["frozen", "full"]
    language_model: LayeredTuning = Field(description="frozen, full, lora, qlora or last-N")
    lora: LoraRecipe | None = Field(
        None,
        validate_default=True,
        description="shape of the adapters of every part that is lora or qlora",
    )

    @field_validator("lora")
    @classmethod
    def _only_where_used(cls, value: LoraRecipe | None, info: ValidationInfo) -> LoraRecipe | None:
        adapted = any(info.data.get(part) in ("lora", "qlora") for part in PARTS)
        if value is not None and not adapted:
            raise ValueError(
                "no part is lora or qlora, so this would have no effect: remove it (lora=null) or set a part to lora"
            )
        return (value or LoraRecipe()) if adapted else None

    @property
    def adapted(self) -> tuple[Part, ...]:
        """The parts that are trained through adapters."""
        return tuple(part for part in PARTS if getattr(self, part) in ("lora", "qlora"))


class StageRecipe(_Strict):
    """One training stage."""

    data: Annotated[tuple[DataRecipe, ...], BeforeValidator(_as_list)] = Field(min_length=1)
    tuning: TuningRecipe
    learning_rate: float = Field(gt=0)
    part_learning_rates: dict[Part, Annotated[float, Field(gt=0)]] = Field(
        {}, description="a learning rate of its own for a trained part"
    )
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many optimizer steps; null: all epochs"
    )
    batch_size: int = Field(ge=1, description="samples per optimizer step, over all processes")
    batching: Literal["padded", "packed", "shared-image"] = Field(
        "packed",
        description="padded: one sample a row; packed: several isolated samples a row; "
        "shared-image: packed, and samples about one image share its tokens",
    )
    row_tokens: int = Field(
        2048,
        ge=1,
        description="longest row after image expansion, in tokens; a longer sample is an error",
    )
    samples_per_image: int | None = Field(
        None,
        ge=1,
        description="shared-image only: samples of one image kept together in the order; null: 8",
    )
    micro_batch_rows: int = Field(1, ge=1, description="rows per forward pass and process")
    prompt: Literal["chat", "plain"] = Field(
        "chat", description="plain: image and caption only, as in LLaVA's first stage"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    adam_betas: tuple[float, float] = (0.9, 0.98)
    adam_eps: float = Field(1e-7, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    group_by_modality_length: bool = Field(
        False,
        description="padded only: steps of samples with images and steps of text alone, as upstream trains",
    )
    activation_checkpointing: Annotated[
        bool | tuple[Layered, ...], BeforeValidator(_layered_parts)
    ] = Field(
        False,
        description="keep only what enters a layer and compute it again in the backward pass: true, or a list of parts",
    )
    unreadable_images: Literal["fail", "substitute"] = Field(
        "fail",
        description="an image that cannot be read: stop, or train on a grey picture and count it in the metrics",
    )
    checkpoint_every: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of the images kept out of training, for validation"
    )
    validate_every: int | None = Field(
        None, ge=1, description="optimizer steps between validations; null: at the stage's end only"
    )

    @model_validator(mode="after")
    def _nothing_ignored(self) -> StageRecipe:
        trained = [part for part in PARTS if getattr(self.tuning, part) != "frozen"]
        if not trained:
            raise ValueError(
                "every part is frozen, so nothing would be trained: set one part of `tuning` to full"
            )
        if idle := sorted(set(self.part_learning_rates) - set(trained)):
            raise ValueError(
                f"part_learning_rates names {', '.join(idle)}, which `tuning` keeps frozen: remove it or tune the part"
            )
        if self.validate_every is not None and not self.held_out:
            raise ValueError(
                f"validate_every={self.validate_every} has no effect without held_out: set that to 0.05, say, or remove it"
            )
        if self.samples_per_image is not None and self.batching != "shared-image":
            raise ValueError(
                f"samples_per_image has no effect with batching={self.batching}: remove it or use shared-image"
            )
        if self.group_by_modality_length and self.batching != "padded":
            raise ValueError(
                f"group_by_modality_length has no effect with batching={self.batching}: remove it or use padded"
            )
        listed = (
            self.activation_checkpointing
            if isinstance(self.activation_checkpointing, tuple)
            else ()
        )
        if "vision_tower" in listed and self.tuning.vision_tower == "frozen":
            raise ValueError(
                "activation_checkpointing of a frozen vision_tower has no effect, for no gradient passes it: remove it there"
            )
        return self

    def peak_learning_rate(self, part: Part) -> float:
        """The highest learning rate of a part that trains."""
        return self.part_learning_rates.get(part, self.learning_rate)

    @property
    def checkpointed(self) -> tuple[Layered, ...]:
        """The parts whose layers are computed again in the backward pass."""
        if isinstance(self.activation_checkpointing, tuple):
            return self.activation_checkpointing
        return ("vision_tower", "language_model") if self.activation_checkpointing else ()

    @property
    def bundle(self) -> int | None:
        """Samples of one image that stay side by side in the order; null where samples are shuffled one by one."""
        return (self.samples_per_image or 8) if self.batching == "shared-image" else None


class StagesRecipe(_Strict):
    pretrain: StageRecipe
    finetune: StageRecipe


class Recipe(_Strict):
    """A whole training run: parts, data, two stages."""

    name: str
    description: str = ""
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the device computes in it, else float32"
    )
    compile: bool = Field(
        False, description="compile each layer of the tower and the language model (torch.compile)"
    )
    sharding: Literal["auto", "ddp", "fsdp", "hsdp"] = Field(
        "auto",
        description="with several processes, ddp: each holds all; fsdp: each holds a part; hsdp: each machine holds all; "
        "auto: fsdp on one machine, hsdp on several",
    )
    keep_states: int = Field(
        2,
        ge=1,
        description="training states kept to resume from; 2: the one before, should the newest be damaged",
    )
    async_checkpoints: bool = Field(False, description="write training states in the background")
    model: ModelRecipe
    stages: StagesRecipe

    def override(self, *assignments: str) -> Recipe:
        """This recipe with some values replaced.

        Args:
            assignments: `key.path=value`; the value is read as YAML, so `[1, 2]`, `null` and `{a: 1}` work.
                `data.finetune=PATH` is short for `stages.finetune.data=PATH`.

        Raises:
            ValueError: An assignment has no `=`, names an unknown key, or its value does not fit.
        """
        tree = self.model_dump(mode="json", exclude_unset=True)
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise ValueError(
                    f"override {assignment!r} has no `=`: write key.path=value, for example seed=7"
                )
            _assign(
                tree, key.strip().split("."), read_yaml(text, f"override {assignment!r}: the value")
            )
        return parse_recipe(
            tree,
            source=f"recipe {self.name!r} with {', '.join(assignments)}"
            if assignments
            else self.name,
        )

    def dump(self) -> str:
        """This recipe as YAML with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)

    def digest(self) -> str:
        """Twelve hex digits that name what this recipe trains; names, and how states are kept and weights spread, do not count."""
        content = self.model_dump(
            mode="json",
            exclude={"name", "description", "sharding", "keep_states", "async_checkpoints"},
        )
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def list_recipes() -> list[str]:
    """Names of the catalog's recipes."""
    return files_in(RECIPES, ".yaml")


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe of the catalog, or a YAML file.

    Raises:
        FileNotFoundError: Neither a catalog name nor a file.
        ValueError: The file is not a valid recipe; the message names each key.
    """
    tree, path = read_named(name, RECIPES, "recipe")
    return parse_recipe(tree, source=str(path))


def parse_recipe(tree: Any, source: str) -> Recipe:
    """Check a tree of plain values against the schema.

    Raises:
        ValueError: Names the source and, a line each, the key, the value and the mend.
    """
    return validated(Recipe, tree, source, "recipe")


def _assign(tree: dict[str, Any], path: list[str], value: Any) -> None:
    if path[0] == "data" and len(path) > 1:
        path = ["stages", path[1], "data", *path[2:]]
    if path[-1] == "data" and isinstance(value, str):
        value = (
            {"dataset": "auto", "root": value}
            if "/" in value or "." in value
            else {"dataset": value}
        )
    node: Any = tree
    for depth, key in enumerate(path[:-1]):
        node = node[_index(node, key, path)] if isinstance(node, list) else node.setdefault(key, {})
        # `data.finetune.limit=5` means the one data set, where there is one.
        if isinstance(node, list) and len(node) == 1 and not path[depth + 1].isdigit():
            node = node[0]
        if not isinstance(node, (dict, list)):
            raise ValueError(
                f"override {'.'.join(path)}: {'.'.join(path[: depth + 1])} is a value, not a group of keys"
            )
    node[_index(node, path[-1], path) if isinstance(node, list) else path[-1]] = value


def _index(entries: list[Any], key: str, path: list[str]) -> int:
    if not key.isdigit() or int(key) >= len(entries):
        raise ValueError(
            f"override {'.'.join(path)}: a list of {len(entries)} has no entry {key!r}"
        )
    return int(key)
