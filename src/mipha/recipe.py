"""A recipe: everything that decides a training run, in one strict YAML file.

    load_recipe("quickstart") -> Recipe -> .override("seed=7", "data.finetune=mine.jsonl")

An unknown key, a value of the wrong type and a setting that would be ignored are errors here,
before a model is built. `RecipeBase` is the part that alignment recipes and studies share.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from math import ceil, isqrt
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import parse_qsl, urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mipha.lookup import did_you_mean, files_in, read_named, read_yaml
from mipha.validation import validated

RECIPES = Path(__file__).parent / "catalog" / "recipes"

Part = Literal["vision_tower", "projector", "language_model"]
PARTS: tuple[Part, ...] = ("vision_tower", "projector", "language_model")
Layered = Literal["vision_tower", "language_model"]
"""The parts that are a stack of repeated layers."""


class Strict(BaseModel):
    """A schema that refuses unknown keys, and whose objects cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RecipeBase(Strict):
    """The content of one YAML file, which is overridden, dumped, compared, named by a digest."""

    kind: ClassVar[str] = "recipe"
    """Its name in messages."""
    uncounted: ClassVar[frozenset[str]] = frozenset({"name", "description"})
    """Keys that the digest leaves out, because they do not change the result."""

    name: str

    @classmethod
    def parse(cls, tree: Any, source: str) -> Self:
        """Check a tree of plain values against the schema.

        Args:
            tree: Content of the YAML file.
            source: Origin of the tree, for the message.

        Raises:
            ValueError: Names the source and, a line each, the key, the value and the fix.
        """
        return validated(cls, tree, source, cls.kind)

    def override(self, *assignments: str) -> Self:
        """Return a copy with some values replaced.

        Args:
            assignments: `key.path=value`. The value is read as YAML, so `[1, 2]`, `null` and
                `{a: 1}` work. A number in a path is the place in a list; a list of one needs none.

        Raises:
            ValueError: An assignment has no `=`, names an unknown key, or its value does not fit.
        """
        tree = self.model_dump(mode="json", exclude_unset=True)
        self._drop_replaced(tree, [text.partition("=")[0].strip() for text in assignments])
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise ValueError(
                    f"override {assignment!r} has no `=`: write key.path=value, for example seed=7"
                )
            value = read_yaml(text, f"override {assignment!r}: the value")
            _assign(tree, *self._expand(tree, key.strip().split("."), value))

        changes = f" with {', '.join(assignments)}" if assignments else ""
        return self.parse(tree, f"{self.kind} {self.name!r}{changes}")

    def dump(self) -> str:
        """Return the file as YAML, with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)

    def digest(self) -> str:
        """Return twelve hex digits that name everything that the file decides."""
        return digest_of(self.content())

    def content(self) -> dict[str, Any]:
        """Return the plain values that count for the digest."""
        return self.model_dump(mode="json", exclude=set(self.uncounted))

    def differences(self, other: RecipeBase) -> dict[str, tuple[Any, Any]]:
        """Return each dotted key whose value counts and differs, with this value and the other."""
        mine, theirs = flatten(self.content()), flatten(other.content())
        return {
            key: (mine.get(key), theirs.get(key))
            for key in dict.fromkeys([*mine, *theirs])
            if mine.get(key) != theirs.get(key)
        }

    def _drop_replaced(self, tree: dict[str, Any], keys: Sequence[str]) -> None:
        """Remove values that assignments to these keys stand in place of."""

    def _expand(self, tree: dict[str, Any], path: list[str], value: Any) -> tuple[list[str], Any]:
        """Return the path and the value that an assignment to a tree stands for."""
        return path, value


def digest_of(content: Any) -> str:
    """Return twelve hex digits that name plain values; the order of keys does not count."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a tree of plain values as one level: dotted key to value."""
    if not isinstance(tree, (dict, list)) or not tree:
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        key: value
        for name, node in items
        for key, value in flatten(node, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _assign(tree: dict[str, Any], path: list[str], value: Any) -> None:
    """Set the value at a path; groups on the way are made."""
    node: Any = tree
    for depth, key in enumerate(path[:-1]):
        child = node[_index(node, key, path)] if isinstance(node, list) else node.get(key)

        # A group that is missing or None starts empty.
        if child is None:
            child = {}
            node[int(key) if isinstance(node, list) else key] = child

        # `data.finetune.limit=5` means the one data set, where there is one.
        if isinstance(child, list) and len(child) == 1 and not path[depth + 1].isdigit():
            child = child[0]
        if not isinstance(child, (dict, list)):
            raise ValueError(
                f"override {'.'.join(path)}: {'.'.join(path[: depth + 1])} is a value, "
                "not a group of keys"
            )
        node = child
    node[_index(node, path[-1], path) if isinstance(node, list) else path[-1]] = value


def _index(entries: list[Any], key: str, path: list[str]) -> int:
    if not key.isdigit() or int(key) >= len(entries):
        raise ValueError(
            f"override {'.'.join(path)}: a list of {len(entries)} has no entry {key!r}"
        )
    return int(key)


Image = Literal["square", "tiles", "anyres", "native"]
"""What an image becomes."""

_LATER: dict[str, Any] = {
    "pad_to_square": None,
    "boxes": None,
    "config": None,
    "revision": None,
    "min_ratings": {},
    "answer_form": "letter",
    "columns": {},
    "bbox_format": None,
    "bbox_scale": None,
    "bbox_frame": "upright",
    "point_scale": None,
    "unreadable_shards": "fail",
    "upstream": [],
    "image": "square",
    "max_tiles": None,
    "shuffle": None,
    "min_image_tokens": None,
    "max_image_tokens": None,
    "max_images": None,
    "cache_gb": None,
    "window_rows": None,
}
"""Keys that are younger than the digests of runs, with their defaults."""


def _without_later(tree: Any) -> Any:
    """Return plain values without younger keys at their defaults, so that old digests stay."""
    if isinstance(tree, list):
        return [_without_later(value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: _without_later(value)
        for key, value in tree.items()
        if key not in _LATER or value != _LATER[key]
    }


RegionForm = Literal["thousand", "unit3", "square2", "bbox_2d", "loc", "molmo", "molmo2"]
"""How boxes and points are written as text; `data/region_text.py` describes each."""


class ModelRecipe(Strict):
    """Which parts are joined, and how the image enters."""

    vision_tower: str = Field(description="catalog name, folder or hub id")
    language_model: str = Field(description="catalog name, folder or hub id")
    chat_template: str | None = Field(
        None,
        description="name in catalog/chat_templates or a .jinja file; "
        "None: the language model's own",
    )
    image_size: int | None = Field(None, ge=1, description="pixels a side; None: the tower's own")
    feature_layer: int = Field(
        -2, description="which hidden state of the tower is read; -1 the last, -2 the one before"
    )
    post_layernorm: bool = Field(
        False,
        description="norm it as the tower norms its output; "
        "only transformers reads such a checkpoint",
    )
    pad_to_square: bool = Field(True, description="true: pad with the mean colour; false: squash")
    calibrate_projector: bool = Field(
        False,
        description="start the projector at the scales of features and text, "
        "from the first training images",
    )
    boxes: RegionForm | None = Field(
        None,
        description="how boxes and points are written as text, in training and by the checkpoint: "
        "thousand [228, 320, 961, 970], unit3, square2 (LLaVA-1.5's), bbox_2d (Qwen3-VL's), "
        "loc (PaliGemma's), molmo or molmo2 (points only); None: thousand",
    )
    image: Image = Field(
        "square",
        description="square: one square an image; tiles: crops, then the whole; anyres: the "
        "whole, then its crops as one grid (LLaVA-NeXT); native: its own shape (LFM2-VL)",
    )
    max_tiles: int | None = Field(
        None,
        ge=1,
        description="tiles, anyres: most crops of an image; None: 4; "
        "1, with shuffle: the whole image alone, squashed",
    )
    shuffle: int | None = Field(
        None,
        ge=2,
        description="tiles, native: so many patches a side become one token; "
        "tiles, None: none do, and crops are images of one LLaVA; native, None: 2",
    )
    min_image_tokens: int | None = Field(
        None, ge=1, description="native only: fewest tokens of an image; None: 64"
    )
    max_image_tokens: int | None = Field(
        None, ge=1, description="native only: most tokens of an image; None: 256"
    )

    @model_validator(mode="before")
    @classmethod
    def _normed_by_its_class(cls, tree: Any) -> Any:
        """Switch the norm on for the classes that always have it."""
        if not isinstance(tree, dict):
            return tree
        if "token_cap" in tree:
            raise ValueError(
                f"model.token_cap={tree['token_cap']} is not supported: LLaVA-OneVision, the class "
                "that has it, answers here and is not built; lower model.max_tiles"
            )
        image, shuffle = tree.get("image"), tree.get("shuffle")
        if image != "native" and not (image == "tiles" and shuffle is not None):
            return tree
        if tree.get("post_layernorm") is False:
            raise ValueError(
                f"model.post_layernorm=false cannot be had with model.image={image}: "
                "its class norms what it reads; leave it out"
            )
        return tree | {"post_layernorm": True}

    @model_validator(mode="after")
    def _nothing_ignored(self) -> ModelRecipe:
        belongs = {
            "max_tiles": ("tiles", "anyres"),
            "shuffle": ("tiles", "native"),
            "min_image_tokens": ("native",),
            "max_image_tokens": ("native",),
        }
        for key, images in belongs.items():
            value = getattr(self, key)
            if value is not None and self.image not in images:
                raise ValueError(
                    f"model.{key}={value} means nothing with model.image={self.image}: "
                    f"use model.image={images[0]}, or leave it out"
                )
        if not self.pad_to_square and self.image != "square":
            raise ValueError(
                "model.pad_to_square=false is for model.image=square, and "
                f"model.image={self.image} cuts the image or keeps its shape: set it to true"
            )

        # The class of shuffled tiles takes as many rows as columns, and has marks for six; with one
        # tile it sees the whole image alone.
        if self.image == "tiles" and self.shuffle is not None:
            side = isqrt(self.tiles)
            if side**2 != self.tiles:
                raise ValueError(
                    f"model.max_tiles={self.tiles} is no square: with model.shuffle an image has "
                    f"up to k x k tiles; use {max(2, side) ** 2} or {(max(2, side) + 1) ** 2}"
                )
            if side > 6:
                raise ValueError(
                    f"model.max_tiles={self.tiles}: the format knows rows and columns 1 to 6; "
                    "use 36 or fewer"
                )
        least, most = self.image_tokens
        if least > most:
            raise ValueError(
                f"model.min_image_tokens={least} is more than model.max_image_tokens={most}: "
                "lower it"
            )
        return self

    @property
    def tiles(self) -> int:
        """Most crops of an image."""
        if self.image in ("square", "native"):
            return 1
        return 4 if self.max_tiles is None else self.max_tiles

    @property
    def image_tokens(self) -> tuple[int, int]:
        """Fewest and most tokens of a native image."""
        return (
            64 if self.min_image_tokens is None else self.min_image_tokens,
            256 if self.max_image_tokens is None else self.max_image_tokens,
        )


class CheckpointRecipe(Strict):
    """A finished model that the first stage starts from, in place of the parts.

    What the checkpoint says stays: tokenizer, template, image settings, feature layer, image token,
    the bias of the head and tied heads.
    """

    checkpoint: str = Field(description="run, model folder or hub id of a standard LLaVA")
    chat_template: str | None = Field(
        None,
        description="name in catalog/chat_templates or a .jinja file, "
        "where the checkpoint has no template that can be trained on",
    )
    boxes: RegionForm | None = Field(
        None,
        description="how boxes and points are written as text, where the checkpoint does not say "
        "it: names as in a model of parts; None: as it says, else thousand",
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_contradicts(cls, tree: Any) -> Any:
        said = sorted(set(ModelRecipe.model_fields) - set(cls.model_fields))
        if isinstance(tree, dict) and (named := [key for key in said if key in tree]):
            raise ValueError(
                f"checkpoint is given beside {', '.join(named)}, which the checkpoint decides: "
                "remove those keys, or the checkpoint"
            )
        return tree


def _kind_of_start(tree: Any) -> str:
    has_checkpoint = isinstance(tree, dict) and "checkpoint" in tree
    return "[checkpoint]" if has_checkpoint or isinstance(tree, CheckpointRecipe) else "[parts]"


StartRecipe = Annotated[
    Annotated[ModelRecipe, Tag("[parts]")] | Annotated[CheckpointRecipe, Tag("[checkpoint]")],
    Discriminator(_kind_of_start),
]
"""The model that the first stage starts from: parts, or a checkpoint."""


def _as_list(value: Any) -> Any:
    """Return a list; one mapping or path stands for a list of one."""
    return value if isinstance(value, list | tuple) else [value]


Scale = Annotated[
    Literal["pixels", "unit", "hundred", "thousand", "square"],
    BeforeValidator(
        lambda value: (
            {1: "unit", 100: "hundred", 1000: "thousand"}.get(value, value)
            if isinstance(value, int | float)
            else value
        )
    ),
]


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SECRET = re.compile(
    r"(?:.*[-_])?(?:token|key|signature|sig|secret|password|credential|auth)", re.IGNORECASE
)


def _as_place(value: Any) -> Any:
    """Return an address as text, anything else as a path.

    Raises:
        PydanticCustomError: The address holds a credential; the message does not repeat it.
    """
    if not isinstance(value, str) or not _ADDRESS.match(value):
        return Path(value) if isinstance(value, str) else value
    parts = urlsplit(value)
    names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if "@" in parts.netloc or any(_SECRET.fullmatch(name) for name in names):
        raise PydanticCustomError(
            "credential",
            "the address holds a credential, which would be written into run folders: remove it; "
            "libraries read credentials from the environment",
        )
    return value


class ReadingRecipe(Strict):
    """What the records of own data do not say themselves."""

    config: str | None = Field(
        None, description="part of a set of the hub, or of a copy of one, by the name in its README"
    )
    revision: str | None = Field(
        None, description="commit, branch or tag of a set at hf://; None: its newest commit"
    )
    min_ratings: dict[str, int] = Field(
        {},
        description="lowest rating of a turn that is kept, by the rating's name, such as "
        "{relevance: 2} for the column relevance_ratings; unrated turns stay",
    )
    answer_form: Literal["letter", "text", "letter-text"] = Field(
        "letter", description="how a question with options is answered: A, a cat, or A. a cat"
    )
    columns: dict[Literal["image", "question", "answer", "options"], str] = Field(
        {}, description="columns of a table by what they hold; None: found by their usual names"
    )
    bbox_format: Literal["xyxy", "xywh", "cxcywh"] | None = Field(
        None, description="numbers of a box: two corners, corner and size, or centre and size"
    )
    bbox_scale: Scale | None = Field(
        None,
        description="unit of the numbers of a box: pixels, unit (0 to 1), hundred, thousand, "
        "or square (0 to 1 of the image padded to a square); None: pixels",
    )
    bbox_frame: Literal["upright", "stored"] = Field(
        "upright", description="stored: numbers of the image as stored, before EXIF turns it"
    )
    point_scale: Scale | None = Field(
        None, description="unit of the numbers of a point, as bbox_scale; 100 is hundred"
    )
    unreadable_shards: Literal["fail", "skip"] = Field(
        "fail",
        description="parquet files and tars that cannot be read: stop and name all of them, "
        "or train on the others and count them",
    )

    cache_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="read parquet files and tars a block at a time (a row group, or 64 MiB) "
        "through a cache of N gigabytes on this machine's disk, in windows of shuffled blocks; "
        "None: files behind an address are copied whole, and all samples shuffled",
    )
    window_rows: int | None = Field(
        None,
        ge=1,
        description="cache_gb only: samples that are shuffled together, from whole blocks "
        "that were drawn; None: 16,384",
    )

    @field_validator("window_rows")
    @classmethod
    def _only_with_cache(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("cache_gb") is None:
            raise ValueError("it has no effect without cache_gb: set that, or remove it")
        return value

    def set_keys(self) -> list[str]:
        """Name the keys about reading that are set."""
        fields = ReadingRecipe.model_fields
        return [name for name in fields if getattr(self, name) != fields[name].get_default()]


class DataRecipe(ReadingRecipe):
    """One data set of a stage."""

    dataset: str = Field(description="module name in data/datasets; auto: told from the data")
    root: Annotated[Path | str | None, BeforeValidator(_as_place)] = Field(
        None,
        description="file or folder the data set reads, or the address of one (https://, s3://, "
        "hf://datasets/OWNER/NAME), which is copied first; "
        "None: the packaged copy, where there is one",
    )
    split: str = "train"
    image_root: Annotated[tuple[Path, ...], BeforeValidator(_as_list)] = Field(
        (),
        description="folders that images may lie in, beside the data file's own; "
        "a relative path starts from the first",
    )
    limit: int | None = Field(None, ge=1, description="use the first N samples only")
    weight: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="how often an epoch shows each sample; "
        "0.5: one half of them, and the other half in the next epoch",
    )
    cap: int | None = Field(
        None, ge=1, description="at most N samples an epoch, others in the next"
    )
    max_images: int | None = Field(
        None,
        ge=1,
        description="leave out samples that show more images, and say how many; None: none are",
    )
    images: Literal["own", "grey", "shuffled"] = Field(
        "own",
        description="images that samples show: own images, grey, or images of other samples; "
        "with the last two a model learns from the texts alone",
    )

    @property
    def root_name(self) -> str:
        """The last part of the root; empty for the packaged copy."""
        return str(self.root or "").rstrip("/").rpartition("/")[2]


class LoraRecipe(Strict):
    """The shape of low-rank adapters.

    Source: section 4.3 of the paper for rank 128 and alpha 256; it gives no dropout,
    0.05 is that of upstream's code.
    """

    rank: int = Field(128, ge=1)
    alpha: int = Field(256, ge=1, description="the output of an adapter is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="of the input of an adapter, in training")


def _known_tuning(value: Any) -> Any:
    if not re.fullmatch("frozen|full|lora|qlora|last-[1-9][0-9]*", str(value)):
        raise ValueError(
            "a part is frozen, full, lora, qlora or last-N (its last N layers), for example last-4"
        )
    return value


def _known_language_tuning(value: Any) -> Any:
    return value if value == "head" else _known_tuning(value)


def _checkpointed_parts(value: Any) -> Any:
    """Return true, false, selective, or a tuple of parts; one part stands for a list of one."""
    if value == "selective":
        return value
    listed = [value] if isinstance(value, str) else value
    if isinstance(listed, list | tuple) and all(
        part in ("vision_tower", "language_model") for part in listed
    ):
        return tuple(dict.fromkeys(listed))
    if isinstance(value, bool):
        return value
    raise ValueError("write true, false, selective, or a list of vision_tower and language_model")


LayeredTuning = Annotated[str, BeforeValidator(_known_tuning)]
LanguageTuning = Annotated[str, BeforeValidator(_known_language_tuning)]

UpstreamHabit = Literal["eos_holes", "text_limit", "mean_of_means", "frozen_dropout"]
"""What Mipha's own training code does and this one does not, unless a stage asks for it."""


class TuningRecipe(Strict):
    """The weights of each part that are trained.

    frozen: nothing, nor the head. full: all that the features or the answer depend on. lora:
    adapters in every linear layer of its stack, over frozen weights. qlora: the same, over weights
    in 4 bits (one GPU only). last-N: its last N layers, nothing before or behind them. head: the
    language model's head alone, which upstream's first stage trains beside the projector.

    A stage with adapters exports its model with them merged in, so that any stage can follow it.
    """

    vision_tower: LayeredTuning = Field(description="frozen, full, lora, qlora or last-N")
    projector: Literal["frozen", "full"]
    language_model: LanguageTuning = Field(description="frozen, full, lora, qlora, last-N or head")
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
                "no part is lora or qlora, so this would have no effect: "
                "remove it (lora=null) or set a part to lora"
            )
        return (value or LoraRecipe()) if adapted else None

    def of(self, part: Part) -> str:
        """Return how a part is tuned: frozen, full, lora, qlora, last-N or head."""
        return getattr(self, part)

    @property
    def adapted(self) -> tuple[Part, ...]:
        """The parts that are trained through adapters."""
        return tuple(part for part in PARTS if self.of(part) in ("lora", "qlora"))


class StageRecipe(Strict):
    """One training stage."""

    data: Annotated[tuple[DataRecipe, ...], BeforeValidator(_as_list)] = Field(min_length=1)
    tuning: TuningRecipe
    learning_rate: float = Field(gt=0)
    part_learning_rates: dict[Part, Annotated[float, Field(gt=0)]] = Field(
        {}, description="a learning rate of its own for a trained part"
    )
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many optimizer steps; None: all epochs"
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
        description="shared-image only: samples of one image kept together in the order; None: 8",
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
        description="padded only: steps of samples with images and steps of text alone, "
        "as upstream trains",
    )
    activation_checkpointing: Annotated[
        bool | Literal["selective"] | tuple[Layered, ...], BeforeValidator(_checkpointed_parts)
    ] = Field(
        False,
        description="keep only the input of each layer and compute the rest again in the backward "
        "pass: true, or a list of parts; selective: keep products of matrices and attention too",
    )
    pad_to_square: bool | None = Field(
        None, description="as `model.pad_to_square`, for this stage; None: the model's"
    )
    upstream: tuple[UpstreamHabit, ...] = Field(
        (),
        description="habits of upstream's training code to repeat: eos_holes, text_limit, "
        "mean_of_means, frozen_dropout",
    )
    unreadable_images: Literal["fail", "substitute"] = Field(
        "fail",
        description="an image that cannot be read: stop, "
        "or train on a grey image and count it in the metrics",
    )
    checkpoint_every: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of the images kept out of training, for validation"
    )
    validate_every: int | None = Field(
        None, ge=1, description="optimizer steps between validations; None: at the stage's end only"
    )

    @model_validator(mode="after")
    def _nothing_ignored(self) -> StageRecipe:
        trained = [part for part in PARTS if self.tuning.of(part) != "frozen"]
        if not trained:
            raise ValueError(
                "every part is frozen, so nothing would be trained: "
                "set one part of `tuning` to full"
            )

        # Settings that would have no effect.
        in_windows = [data.root_name for data in self.data if data.cache_gb is not None]
        if in_windows and (self.bundle or self.group_by_modality_length):
            raise ValueError(
                f"cache_gb of {in_windows[0]} is not possible with batching=shared-image or "
                "group_by_modality_length, which look for samples all over the set: use packed"
            )
        if idle := sorted(set(self.part_learning_rates) - set(trained)):
            raise ValueError(
                f"part_learning_rates names {', '.join(idle)}, which `tuning` keeps frozen: "
                "remove it or tune the part"
            )
        if self.validate_every is not None and not self.held_out:
            raise ValueError(
                f"validate_every={self.validate_every} has no effect without held_out: "
                "set that to 0.05, say, or remove it"
            )
        if self.samples_per_image is not None and self.batching != "shared-image":
            raise ValueError(
                f"samples_per_image has no effect with batching={self.batching}: "
                "remove it or use shared-image"
            )
        if self.group_by_modality_length and self.batching != "padded":
            raise ValueError(
                f"group_by_modality_length has no effect with batching={self.batching}: "
                "remove it or use padded"
            )
        if self.batching != "padded" and {"eos_holes", "text_limit"} & set(self.upstream):
            raise ValueError(
                f"upstream's eos_holes and text_limit are not possible with batching="
                f"{self.batching}: remove them or use padded"
            )
        if "frozen_dropout" in self.upstream and self.tuning.language_model in ("full", "lora"):
            raise ValueError(
                "upstream's frozen_dropout has no effect, because the language model trains: "
                "remove it"
            )
        listed = self.activation_checkpointing
        is_listed = isinstance(listed, tuple) and "vision_tower" in listed
        if is_listed and self.tuning.vision_tower == "frozen":
            raise ValueError(
                "activation_checkpointing of a frozen vision_tower has no effect, "
                "because no gradient passes it: remove it there"
            )
        return self

    def peak_learning_rate(self, part: Part) -> float:
        """Return the highest learning rate of a part that trains."""
        return self.part_learning_rates.get(part, self.learning_rate)

    @property
    def checkpointed(self) -> tuple[Layered, ...]:
        """The parts whose layers are computed again in the backward pass."""
        if isinstance(self.activation_checkpointing, tuple):
            return self.activation_checkpointing
        return ("vision_tower", "language_model") if self.activation_checkpointing else ()

    @property
    def keeps_products(self) -> bool:
        """Whether layers that are computed again keep their products of matrices and attention."""
        return self.activation_checkpointing == "selective"

    @property
    def bundle(self) -> int | None:
        """Samples of one image that stay side by side; None where each is shuffled alone."""
        return (self.samples_per_image or 8) if self.batching == "shared-image" else None


class TrlRecipe(Strict):
    """The settings that a dpo stage shares with the steps of `mipha align`, which TRL trains."""

    data: Path = Field(description="the published file")
    skip_empty: bool = Field(
        False,
        description="leave out, and count, rows with an empty text or the same response twice; "
        "false: refuse them",
    )
    held_out: float = Field(
        0.05, ge=0, lt=1, description="share of the prompts kept out of training, for validation"
    )
    max_tokens: int = Field(
        512, ge=8, description="longest conversation; a longer one is an error, never cut"
    )
    tuning: Literal["full", "lora"] = "full"
    lora: LoraRecipe | None = Field(
        None, description="shape of the adapters, of every linear layer but the head"
    )
    learning_rate: float = Field(gt=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many optimizer steps; None: all epochs"
    )
    batch_size: int = Field(ge=1, description="rows per optimizer step")
    micro_batch: int = Field(1, ge=1, description="rows per forward pass; a divisor of batch_size")
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    activation_checkpointing: bool = False
    checkpoint_every: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    validate_every: int | None = Field(
        None, ge=1, description="optimizer steps between validations; None: at the end only"
    )

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        if self.lora is not None and self.tuning != "lora":
            raise ValueError(
                f"lora has no effect with tuning={self.tuning}: remove it, or set tuning=lora"
            )
        if self.validate_every is not None and not self.holds_out:
            raise ValueError(
                f"validate_every={self.validate_every} has no effect with nothing held out: "
                "set held_out=0.05, or remove it"
            )
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch={self.micro_batch} does not divide batch_size={self.batch_size}: "
                "change one of them"
            )
        return self

    @property
    def holds_out(self) -> bool:
        """Whether rows are kept out of training."""
        return self.held_out > 0


class DpoStageRecipe(TrlRecipe):
    """A stage of direct preference optimization on pairs of answers about images, through TRL.

    The projector and the language model train whole (full), or adapters of the language model
    alone (lora); the vision tower never does. It is the step `dpo` of `mipha align` inside a run.
    """

    kind: Literal["dpo"] = Field(description="dpo; a stage without this key learns from answers")
    data: Path = Field(description="file of rows with image, prompt, chosen and rejected")
    max_tokens: int = Field(
        2048, ge=8, description="longest conversation, image tokens included; never cut"
    )
    beta: float = Field(
        0.1, gt=0, description="how dear it is to leave the model that it starts from"
    )

    def num_steps(self, num_pairs: int) -> int:
        """Return the optimizer steps on so many pairs, as transformers' Trainer counts them."""
        return self.max_steps or ceil(self.epochs * ceil(num_pairs / self.batch_size))

    @property
    def as_answers(self) -> StageRecipe:
        """The stage that would learn the chosen answers alone, for checks and plans."""
        is_full = self.tuning == "full"
        tuning = TuningRecipe(
            vision_tower="frozen",
            projector="full" if is_full else "frozen",
            language_model=self.tuning,
            lora=self.lora,
        )
        shared = set(StageRecipe.model_fields) & set(TrlRecipe.model_fields)
        settings = self.model_dump(include=shared - {"data", "tuning", "validate_every"})
        return StageRecipe(
            data=(DataRecipe(dataset="auto", root=self.data),),
            tuning=tuning,
            batching="padded",
            row_tokens=self.max_tokens,
            micro_batch_rows=2 * self.micro_batch,
            **settings,
        )


def _kind_of_stage(tree: Any) -> str:
    is_dpo = isinstance(tree, DpoStageRecipe) or (isinstance(tree, dict) and "kind" in tree)
    return "[dpo]" if is_dpo else "[stage]"


AnyStageRecipe = Annotated[
    Annotated[StageRecipe, Tag("[stage]")] | Annotated[DpoStageRecipe, Tag("[dpo]")],
    Discriminator(_kind_of_stage),
]
"""A stage that learns from answers, or one that learns from preferences."""


_TAKEN = ("evaluation",)
"""Folders of a run that are no stage."""


def _known_stage_name(name: str) -> str:
    if not re.fullmatch("[a-z][a-z0-9_-]*", name):
        raise ValueError(
            "a stage's name begins with a small letter and has small letters, digits, - and _, "
            "for example finetune-2"
        )
    if name in _TAKEN:
        raise ValueError("a run has a folder of that name for something else: rename the stage")
    return name


StageName = Annotated[str, AfterValidator(_known_stage_name)]


class Recipe(RecipeBase):
    """A whole training run: parts, data, stages."""

    uncounted: ClassVar[frozenset[str]] = RecipeBase.uncounted | {
        "attention",
        "sharding",
        "keep_states",
        "async_checkpoints",
    }

    description: str = ""
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the device computes in it, else float32"
    )
    compile: bool = Field(
        False, description="compile each layer of the tower and the language model (torch.compile)"
    )
    attention: Literal["auto", "flex", "varlen", "segments"] = Field(
        "auto",
        description="attention of packed rows, segments: sample by sample; flex, varlen: "
        "one kernel of a CUDA GPU; auto: flex on such a GPU, else segments",
    )
    sharding: Literal["auto", "ddp", "fsdp", "hsdp"] = Field(
        "auto",
        description="with several processes, ddp: each holds all; fsdp: each holds a part; "
        "hsdp: each machine holds all; auto: ddp where the predicted memory fits, else fsdp; "
        "hsdp on several machines",
    )
    keep_states: int = Field(
        2,
        ge=1,
        description="training states kept to resume from; "
        "2: also the one before, in case the newest is damaged",
    )
    async_checkpoints: bool = Field(False, description="write training states in the background")
    model: StartRecipe
    stages: dict[StageName, AnyStageRecipe] = Field(
        min_length=1,
        description="in the order of training: the first starts from `model`, "
        "each later one from the model of the stage before",
    )

    @field_validator("stages")
    @classmethod
    def _pretrain_first(cls, stages: dict[str, StageRecipe]) -> dict[str, StageRecipe]:
        # A program that sorts keys turns the two around, and so would train them in that order.
        names = [name for name in stages if name in ("pretrain", "finetune")]
        if names == ["finetune", "pretrain"]:
            raise ValueError(
                "stages are trained in the order of the file, and pretrain stands after finetune: "
                "put pretrain first, or rename it"
            )
        return stages

    @model_validator(mode="after")
    def _squares_to_pad(self) -> Recipe:
        model = self.model
        if isinstance(model, CheckpointRecipe) or (
            model.image in ("square", "tiles") and model.shuffle is None
        ):
            return self
        for name, stage in self.supervised_stages.items():
            if stage.pad_to_square is not None:
                raise ValueError(
                    f"stages.{name}.pad_to_square={str(stage.pad_to_square).lower()} is for images "
                    f"as squares, and model.image={model.image} cuts them or keeps their shape: "
                    "leave it out"
                )
        return self

    @model_validator(mode="after")
    def _something_to_prefer_with(self) -> Recipe:
        dpo = [name for name, stage in self.stages.items() if isinstance(stage, DpoStageRecipe)]
        if not dpo or isinstance(self.model, CheckpointRecipe):
            return self
        if dpo[0] == next(iter(self.stages)):
            raise ValueError(
                f"stages.{dpo[0]} is a dpo stage, and the projector of a model from parts has not "
                "learned anything before it: put another stage first, or give model.checkpoint"
            )
        if self.model.image in ("anyres", "native") or self.model.shuffle is not None:
            raise ValueError(
                f"stages.{dpo[0]} is a dpo stage, which trains the class 'llava' alone, and "
                f"model.image={self.model.image} makes another: use model.image=square"
            )
        return self

    @model_validator(mode="after")
    def _products_are_seen(self) -> Recipe:
        selective = [name for name, one in self.supervised_stages.items() if one.keeps_products]
        if self.compile and selective:
            raise ValueError(
                f"stages.{selective[0]}.activation_checkpointing=selective cannot be had with "
                "compile=true: a compiled layer does not show its products, so all of it would be "
                "computed again; use one of the two, or activation_checkpointing=true"
            )
        return self

    def stage(self, name: str) -> StageRecipe:
        """Return one stage that learns from answers.

        Raises:
            ValueError: The recipe has no stage of that name, or it is a dpo stage.
        """
        self.check_has_stage(name)
        found = self.stages[name]
        if isinstance(found, DpoStageRecipe):
            raise ValueError(
                f"stage {name!r} of recipe {self.name!r} is a dpo stage, which has no answers but "
                "pairs of them: name another stage"
            )
        return found

    def check_has_stage(self, name: str) -> None:
        """Raise a ValueError where the recipe has no stage of this name."""
        _check_has_stage(self.name, self.stages, name)

    @property
    def supervised_stages(self) -> dict[str, StageRecipe]:
        """The stages that learn from answers, by name; dpo stages are left out."""
        return {
            name: stage for name, stage in self.stages.items() if isinstance(stage, StageRecipe)
        }

    @property
    def last_stage(self) -> str:
        """The stage that makes the final model."""
        return list(self.stages)[-1]

    def stage_before(self, name: str) -> str | None:
        """Return the stage whose model a stage starts from; None for the first stage."""
        names = list(self.stages)
        place = names.index(name)
        return names[place - 1] if place else None

    def stage_digest(self, name: str) -> str:
        """Return twelve hex digits that name the model of a stage and everything that decides it.

        Two recipes that agree in these share the stage's model.
        """
        names = list(self.stages)
        content = self.model_dump(mode="json", include={"seed", "precision", "model"})
        content["stages"] = [
            (made, self.stages[made].model_dump(mode="json"))
            for made in names[: names.index(name) + 1]
        ]
        content["model"] = _without_later(content["model"])
        content["stages"] = [(made, _without_later(tree)) for made, tree in content["stages"]]
        return digest_of(content)

    def content(self) -> dict[str, Any]:
        """Return the plain values that count for the digest."""
        content = super().content()
        content |= {key: _without_later(content[key]) for key in ("stages", "model")}

        # A digest sorts keys, so any order but that of the paper's two stages is written down.
        if list(self.stages) != ["pretrain", "finetune"]:
            content["order"] = list(self.stages)
        return content

    def _drop_replaced(self, tree: dict[str, Any], keys: Sequence[str]) -> None:
        """Remove the parts where a checkpoint is given, and the checkpoint where a part is."""
        given = {key.removeprefix("model.") for key in keys if key.startswith("model.")}
        parts = {"vision_tower", "language_model"}
        if given & (parts if "checkpoint" in tree["model"] else {"checkpoint"}):
            tree["model"] = {}

    def _expand(self, tree: dict[str, Any], path: list[str], value: Any) -> tuple[list[str], Any]:
        """Expand `data.STAGE` to `stages.STAGE.data`, and a path or a name to a data set."""
        if path[0] == "data" and len(path) > 1:
            path = ["stages", path[1], "data", *path[2:]]

        # A new stage cannot be made this way, so that a mistyped one is an error.
        stages = tree["stages"]
        if path[0] == "stages" and len(path) > 1 and isinstance(stages, dict):
            _check_has_stage(self.name, stages, path[1])

        named = stages.get(path[1]) if isinstance(stages, dict) and len(path) > 1 else None
        is_dpo = isinstance(named, dict) and "kind" in named
        if path[-1] == "data" and isinstance(value, str) and not is_dpo:
            is_path = "/" in value or "." in value
            value = {"dataset": "auto", "root": value} if is_path else {"dataset": value}
        return path, value


def _check_has_stage(recipe: str, stages: Iterable[str], name: str) -> None:
    if name not in stages:
        near = did_you_mean(name, stages)
        raise ValueError(f"recipe {recipe!r} has no stage {name!r}: {near}")


def list_recipes() -> list[str]:
    """Return the names of the catalog's recipes."""
    return files_in(RECIPES, ".yaml")


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe of the catalog, or a YAML file.

    Raises:
        FileNotFoundError: Neither a catalog name nor a file.
        ValueError: The file is not a valid recipe; the message names each key.
    """
    tree, path = read_named(name, RECIPES, "recipe")
    return Recipe.parse(tree, source=str(path))
