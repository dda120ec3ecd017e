"""Write the model card: README.md of a checkpoint's folder, with metadata for the hub.

The card names the pretrained parts of the model and their licences, as far as they are known.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from mipha.catalog.language_models import LANGUAGE_MODELS
from mipha.catalog.vision_towers import VISION_TOWERS
from mipha.checkpoint_files import read_checkpoint, read_config, read_processor
from mipha.deploy.runtimes import has_tiles, runtimes
from mipha.files import read_json_object, whole_folder, write_whole
from mipha.geometry import read_geometry
from mipha.preflight import check_new_folder
from mipha.recipe import PARTS, CheckpointRecipe, DpoStageRecipe, Recipe
from mipha.run import Run, model_folder, open_run

_HUB_LICENCES = {"MIT": "mit", "Apache-2.0": "apache-2.0"}
"""The hub's names of licences that both a tower and a language model of the catalog have."""


@dataclass(frozen=True)
class PretrainedPart:
    """A pretrained model that a model was made of.

    Args:
        role: `vision tower` or `language model`.
        name: Name in the recipe; of a local folder, its last name.
        hub_id: Id on the hub; None where it is not there, or nothing is known.
        licence: Licence of its weights; None where nothing is known.
        source: Publisher; empty where nothing is known.
    """

    role: str
    name: str
    hub_id: str | None
    licence: str | None
    source: str


def pretrained_parts(config: dict[str, Any], recipe: Recipe | None) -> list[PretrainedPart]:
    """Return the parts that a recipe names; without a recipe, the kinds that the config names.

    Of a model that was tuned from a run, these are the parts of that run; from any other
    checkpoint, the checkpoint itself.
    """
    while recipe is not None and isinstance(recipe.model, CheckpointRecipe):
        name = recipe.model.checkpoint
        if not (Path(name) / "recipe.yaml").is_file():
            hub_id = None if Path(name).is_dir() else name
            return [PretrainedPart("checkpoint", hub_id or Path(name).name, hub_id, None, "")]
        recipe = open_run(name).recipe
    if recipe is None:
        kinds = {"vision tower": config["vision_config"], "language model": config["text_config"]}
        return [
            PretrainedPart(role, f"a {kind.get('model_type')}", None, None, "")
            for role, kind in kinds.items()
        ]

    found = []
    for role, name, catalog in (
        ("vision tower", recipe.model.vision_tower, VISION_TOWERS),
        ("language model", recipe.model.language_model, LANGUAGE_MODELS),
    ):
        entry = catalog.get(name)
        path = entry.path if entry else name
        hub_id = (
            path
            if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).is_dir()
            else None
        )
        known = (entry.licence, entry.source) if entry else (None, "")
        shown = without_folders(name) if hub_id is None else name
        found.append(PretrainedPart(role, shown, hub_id, *known))
    return found


def hub_licence(parts: Sequence[PretrainedPart]) -> str:
    """Return the hub's licence name for a model of these parts; `other` where theirs differ."""
    licences = {part.licence for part in parts}
    if None in licences:
        return "unknown"
    (one, *more) = licences
    return "other" if more else _HUB_LICENCES.get(str(one), "other")


def without_folders(value: Any) -> Any:
    """Return a tree of plain values with every path cut to its last name: cards are public."""
    if isinstance(value, dict):
        short: dict[Any, Any] = {}
        for key, inner in value.items():
            name = without_folders(key)
            while name in short:  # files of one name in two folders
                name += "'"
            short[name] = without_folders(inner)
        return short
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    return (
        Path(value).name if isinstance(value, str) and re.match(r"(/|~|\.\.?/)", value) else value
    )


def write_model_card(checkpoint: Path, run: Run | None = None) -> Path:
    """Write README.md into a model folder.

    Args:
        checkpoint: A model folder.
        run: Run whose final model it is; its recipe, provenance and scores go into the card.

    Returns:
        The file.
    """
    path = checkpoint / "README.md"
    write_whole(path, model_card(checkpoint, run))
    return path


def export_for_hub(model: str | Path, out: Path) -> Path:
    """Copy a model folder with a fresh card, ready for `hf upload`: whole or not at all.

    Args:
        model: A run, or a model folder.
        out: New folder.

    Raises:
        FileNotFoundError: No such model, or the run is not finished.
        ValueError: Neither a run nor a model, `out` exists, or the folder is not safe to publish.
    """
    checkpoint = model_folder(model)
    run = None if checkpoint == Path(model) else open_run(model)
    check_new_folder(out)

    # Refuse pickles, code, links out of the folder and broken weights: the copy will be public.
    from mipha.models.checkpoint_folder import check_finite_folder  # loads torch

    read_checkpoint(checkpoint)
    check_finite_folder(checkpoint)

    with whole_folder(out) as partial:
        for path in sorted(checkpoint.rglob("*")):
            if path.is_file():
                target = partial / path.relative_to(checkpoint)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
        write_whole(partial / "README.md", model_card(checkpoint, run, name=out.name))
    return out


def model_card(checkpoint: Path, run: Run | None = None, name: str | None = None) -> str:
    """Return the text of the card.

    Args:
        checkpoint: A model folder.
        run: Run whose final model it is.
        name: Name of the model, where no recipe names it; None for the folder's.
    """
    config = read_config(checkpoint)
    processor = read_processor(checkpoint)

    recipe = run.recipe if run else None
    parts = pretrained_parts(config, recipe)
    results = list(_results(run)) if run else []
    name = recipe.name if recipe else name or checkpoint.resolve().name

    sections = [
        f"# {plain(name)}",
        _about(parts, recipe),
        "## Use",
        _use(config, processor),
        _where(config, processor),
        "## Parts",
        _parts_table(parts),
    ]
    if run and recipe:
        sections += [
            "## Training",
            _training(recipe),
            "## Scores",
            _scores(results),
            "## How it was made",
            _made(run, recipe),
        ]
    sections += ["## Limits", _limits(config, processor)]

    return (
        f"---\n{_metadata(name, parts, results)}\n---\n\n"
        + "\n\n".join(section for section in sections if section)
        + "\n"
    )


def _metadata(name: str, parts: Sequence[PretrainedPart], results: Sequence[dict[str, Any]]) -> str:
    licence = hub_licence(parts)
    data = ModelCardData(
        model_name=name,
        license=licence,
        license_name="licences-of-the-parts" if licence == "other" else None,
        base_model=[part.hub_id for part in parts if part.hub_id] or None,
        pipeline_tag="image-text-to-text",
        library_name="transformers",
        tags=["mipha", "llava"],
        eval_results=[_eval_result(result) for result in results if _comparable(result)] or None,
    )
    return data.to_yaml()


def _eval_result(result: dict[str, Any]) -> EvalResult:
    score = result["scores"][0]
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=result["benchmark"],
        dataset_name=result["benchmark"],
        dataset_split=result["split"],
        metric_type=score["metric"],
        metric_name=f"{score['metric']}, {score['unit']}{_interval(score)}",
        metric_value=round(score["value"], 2),
    )


def _results(run: Run) -> Iterator[dict[str, Any]]:
    """Yield the content of every scores.json of a run that has scores."""
    for path in sorted((run.folder / "evaluation").glob("*/scores.json")):
        result = read_json_object(path)
        if result["scores"]:
            yield result


def _comparable(result: dict[str, Any]) -> bool:
    if result["blind"] or result.get("all_empty"):
        return False
    return result["complete"] and result["scores"][0]["value"] is not None


def _about(parts: Sequence[PretrainedPart], recipe: Recipe | None) -> str:
    made = "A multimodal small language model that answers questions about an image: "
    if len(parts) == 1:
        made += f"{plain(parts[0].name)}, tuned further."
    else:
        names = " and ".join(plain(part.name) for part in parts)
        made += f"{names}, joined by a two-layer MLP."
    if recipe is not None and isinstance(recipe.model, CheckpointRecipe) and len(parts) == 2:
        made += f" It was tuned from {plain(without_folders(recipe.model.checkpoint))}."
    if recipe is None or not recipe.description:
        return made
    return f"{made}\n\n{plain(recipe.description)}"


def _use(config: dict[str, Any], processor: dict[str, Any]) -> str:
    found = {row.name: row.status for row in runtimes(config, processor)}
    if found["transformers"] != "exact" or has_tiles(config, processor):
        return """```python
import mipha

print(mipha.load("FOLDER").answer("image.jpg", "What is in the image?").text)
```"""
    return """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER OR HUB ID")
processor = AutoProcessor.from_pretrained("FOLDER OR HUB ID")
content = [
    {"type": "image", "path": "image.jpg"},
    {"type": "text", "text": "What is in the image?"},
]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
new = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(new, skip_special_tokens=True))
```"""


def _where(config: dict[str, Any], processor: dict[str, Any]) -> str:
    rows = [(row.name, row.status, row.reason) for row in runtimes(config, processor)]
    return _table(("program", "", "why"), rows)


def _parts_table(parts: Sequence[PretrainedPart]) -> str:
    rows = [
        (part.role, _code(part.hub_id or part.name), part.licence or "unknown", part.source)
        for part in parts
    ]
    return (
        _table(("part", "which", "licence", "source"), rows)
        + "\n\nThe licences of all of these apply to the weights."
    )


def _training(recipe: Recipe) -> str:
    rows = []
    for name, stage in recipe.stages.items():
        if isinstance(stage, DpoStageRecipe):
            parts = f"projector full, language model {stage.tuning}, by preferences"
            length = f"{stage.max_steps} steps" if stage.max_steps else f"{stage.epochs:g} epochs"
            shape = (f"{stage.learning_rate:g}", str(stage.batch_size), length)
            rows.append((name, stage.data.name, parts, *shape))
            continue
        data = ", ".join(
            entry.dataset + (f" ({plain(entry.root_name)})" if entry.root else "")
            for entry in stage.data
        )
        tuned = ", ".join(f"{part.replace('_', ' ')} {stage.tuning.of(part)}" for part in PARTS)
        length = (
            f"at most {stage.max_steps} steps" if stage.max_steps else f"{stage.epochs:g} epochs"
        )
        rows.append((name, data, tuned, f"{stage.learning_rate:g}", str(stage.batch_size), length))
    return _table(("stage", "data", "trained", "learning rate", "batch", "length"), rows)


def _scores(results: Sequence[dict[str, Any]]) -> str:
    if not results:
        return "The model was not evaluated."

    rows = []
    for result in results:
        notes = ["shown grey instead of every image"] if result["blind"] else []
        if not result["complete"]:
            answered = result["n_asked"] - result["n_failed"]
            notes.append(f"{answered:,} of {result['num_questions']:,} questions: not comparable")

        if num_empty := result.get("n_empty"):
            notes.append("all answers are empty" if result["all_empty"] else f"{num_empty:,} empty")

        # Take the headline, and further sums: MME is published as two.
        headline, *others = result["scores"]
        sums = [
            score for score in others if score["unit"] == "points" and "." not in score["metric"]
        ]
        for score in (headline, *sums):
            value = (
                "undefined" if score["value"] is None else f"{score['value']:.2f} {score['unit']}"
            )
            what = tuple(map(plain, (result["benchmark"], result["split"], score["metric"])))
            rows.append((*what, value, _interval(score, ""), str(score["n"]), "; ".join(notes)))
    return _table(("benchmark", "split", "metric", "value", "95 % interval", "questions", ""), rows)


def _interval(score: dict[str, Any], form: str = ", 95 % interval ") -> str:
    return (
        ""
        if score["low"] is None or score["high"] is None
        else f"{form}{score['low']:.2f} to {score['high']:.2f}"
    )


def _made(run: Run, recipe: Recipe) -> str:
    """Write recipe and provenance in full, without the folders of the machine."""
    path = run.folder / "provenance.json"
    made_with = read_json_object(path) if path.is_file() else {}
    blocks = {f"recipe {recipe.digest()}": recipe.model_dump(mode="json"), "provenance": made_with}
    texts = {
        title: yaml.safe_dump(without_folders(tree), sort_keys=False, width=120)
        for title, tree in blocks.items()
        if tree
    }
    return "\n\n".join(
        f"<details><summary>{title}</summary>\n\n{_fenced(text, 'yaml')}\n\n</details>"
        for title, text in texts.items()
    )


def _limits(config: dict[str, Any], processor: dict[str, Any]) -> str:
    geometry = read_geometry(processor)
    shape = "padded" if processor["image_processor"].get("do_pad") else "squashed"
    seen = {
        "square": f"is {shape} to a square of {geometry.side} x {geometry.side} pixels, "
        f"{geometry.longest} tokens",
        "native": f"keeps its shape and takes up to {geometry.longest} tokens",
    }.get(
        geometry.kind,
        f"is cut into up to {geometry.most_tiles - 1} tiles of {geometry.side} x {geometry.side} "
        f"pixels beside the whole, up to {geometry.longest} tokens",
    )
    lines = [f"An image {seen}: details that are too small there are not seen."]

    if longest := config["text_config"].get("max_position_embeddings"):
        lines.append(f"Images, questions and answers together are at most {longest:,} tokens.")

    lines.append(
        "It can name things that are not in the image, with confidence: "
        "do not rely on it where a wrong answer does harm."
    )
    lines.append("It repeats the errors and prejudices of its parts and of its training data.")
    return "\n".join(f"- {line}" for line in lines)


def plain(text: str) -> str:
    """Return text that Markdown shows as it is, in one paragraph: no HTML, links or fences."""
    text = re.sub(r"[\\`<>\[\]&*]", r"\\\g<0>", " ".join(text.split()))
    return re.sub(r"^[#+=~-]", r"\\\g<0>", text)


def _code(text: str) -> str:
    """Return text as a code span."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _fenced(text: str, language: str) -> str:
    """Return lines of text as a code block, whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )
