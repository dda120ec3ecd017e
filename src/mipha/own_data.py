"""`mipha tune`: a finished model, tuned further on somebody's own data, in one command.

model, data --prepare--> recipe, with every value derived and said
   check the data -> plan the memory -> answer questions -> train -> answer them again -> card

Two sets of questions are asked before and after: those of the held-out rows, which show what was
learned, and a small general set (evaluation/general.py), which shows what was forgotten.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from mipha.api import check_training, train
from mipha.files import read_json_object, write_whole
from mipha.preflight import check_parts, check_writable
from mipha.recipe import CheckpointRecipe, Recipe, load_recipe
from mipha.run import Run, check_run, create_run, is_first_process
from mipha.terminal import Console

if TYPE_CHECKING:
    from mipha.assistant import Assistant
    from mipha.data.check.linter import CheckResult
    from mipha.evaluation.general import GeneralQuestion
    from mipha.planning.plan import Device

STAGE = "tune"
HELD_OUT_FROM = 200
"""Rows from which some are held out by default; of fewer, each is worth more in training."""

MOST_QUESTIONS = 256
MOST_TRAINED = 24
"""Questions of rows that are trained on, where none are held out."""

MAX_NEW_TOKENS = 64
GENERAL_NEW_TOKENS = 24
_REPLAY_SHARE = 0.25
"""Old samples an epoch shows beside the own ones, as a share of the own."""

_SAVES_MEMORY = (
    "activation_checkpointing=selective",
    "activation_checkpointing=true",
    "micro_batch_rows=1",
)
"""Changes that a plan may make by itself: they cost time, and nothing else of what is learned."""

console = Console()


@dataclass(frozen=True)
class Prepared:
    """A recipe for own data.

    Args:
        recipe: Every value derived.
        notes: What was derived, and from what, a line each.
    """

    recipe: Recipe
    notes: tuple[str, ...]


def tune(
    model: str,
    data: str,
    folder: str | Path,
    *,
    full: bool = False,
    replay: str | None = None,
    image_root: Sequence[Path] = (),
    overrides: Sequence[str] = (),
) -> Run:
    """Tune a finished model on own data; the same command goes on where it stopped.

    Args:
        model: Run, model folder or hub id of a standard LLaVA.
        data: File or folder of own data, or the name of a data set.
        folder: Run folder.
        full: Train all weights of the language model, in place of adapters.
        replay: Old data to mix in, against forgetting: a path, or the name of a data set.
        image_root: Folders that images may lie in, beside the data's own.
        overrides: Recipe values in place of derived ones.

    Returns:
        The run, with a standard checkpoint, the questions' answers and the card.

    Raises:
        ValueError: The model cannot be trained, the data have errors, or the plan does not fit.
        FileNotFoundError: The model or the data are not there.
        OSError: The folder cannot be written to.
    """
    folder = Path(folder)
    start = CheckpointRecipe(checkpoint=model)
    check_parts(start)
    check_writable(folder)

    # Check the data, derive the recipe, and plan the memory.
    prepared = prepare(model, data, full, replay, image_root, overrides)
    for note in prepared.notes:
        console.print(f"  {note}", markup=False, soft_wrap=True)
    check_run(folder, prepared.recipe)
    recipe, notes = fit_memory(prepared.recipe, this_machine(prepared.recipe.precision))
    for note in notes:
        console.print(f"  {note}", markup=False, soft_wrap=True)
    check_training(recipe, folder)

    # Ask before, train, and ask after.
    run = create_run(folder, recipe)
    if is_first_process():
        ask(run, "before")
    run = train(recipe, folder)
    if is_first_process():
        ask(run, "after")
        write_whole(run.folder / "tuned.json", json.dumps(compare_answers(run), indent=2) + "\n")
        print_tuned(run)

        from mipha.deploy.model_card import write_model_card

        write_model_card(run.final_checkpoint(), run)
    return run


# ---- The recipe ----------------------------------------------------------------------------------


def prepare(
    model: str,
    data: str,
    full: bool = False,
    replay: str | None = None,
    image_root: Sequence[Path] = (),
    overrides: Sequence[str] = (),
) -> Prepared:
    """Check own data and derive a recipe from them; arguments and errors are those of `tune`."""
    from mipha.data.dataset import data_recipe, load_data

    # Read the data and the overrides, which takes no torch.
    recipe = load_recipe("tune").override(f"model.checkpoint={model}")
    recipe.override(*overrides)
    own = data_recipe(data, None, image_root)
    rows = load_data(own)

    from mipha.data.check.linter import check_data
    from mipha.geometry import geometry_of
    from mipha.models.build import load_start_processor, skeleton

    # Check the data with the model's own tokens; rows may be as long as the model reads.
    processor = load_start_processor(recipe.model)
    built = skeleton(recipe.model)
    context = getattr(built.config.text_config, "max_position_embeddings", None) or 2048
    loose = recipe.stage(STAGE).model_copy(update={"data": (own,), "row_tokens": context})
    result = check_data(rows, loose, processor, progress=True)
    _refuse_errors(result, data)

    # Derive the values from the number of rows, their lengths, and the size of the model.
    values, notes = derive(result, built.num_parameters(), context, full)
    notes += [_note_on_images(result, processor, geometry_of(processor).longest)]
    mixed = [own.model_dump(mode="json", exclude_unset=True)]
    if replay is not None:
        cap = max(1, round(_REPLAY_SHARE * result.num_samples))
        old = data_recipe(replay).model_dump(mode="json", exclude_unset=True)
        mixed.append(old | {"cap": cap})
        notes.append(f"replay: {cap} samples of {replay} an epoch, other ones in the next")

    stage = recipe.stage(STAGE).model_dump(mode="json", exclude_unset=True) | values
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    tree |= {"name": Path(data).stem or data, "stages": {STAGE: stage | {"data": mixed}}}
    return Prepared(Recipe.parse(tree, "tune").override(*overrides), tuple(n for n in notes if n))


def derive(
    result: CheckResult, num_parameters: int, context: int, full: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the stage that follow from the data and the model, and why.

    Args:
        result: Check of the data with the model's tokens.
        num_parameters: Size of the model.
        context: Tokens that the language model reads.
        full: Whether the language model trains whole.
    """
    rows = result.num_samples
    epochs = 3 if rows < 2_000 else 2 if rows < 20_000 else 1
    batch_size = 8 if rows < 500 else 16 if rows < 5_000 else 32 if rows < 50_000 else 64
    held_out = 0.0 if rows < HELD_OUT_FROM else 0.1 if rows < 5_000 else 0.02
    steps = max(1, math.ceil(rows * (1 - held_out) / batch_size) * epochs)

    # A row holds the longest sample, with some room for its neighbours.
    longest = max(
        (one.maximum for one in result.histograms if one.name == "sample length"), default=256
    )
    row_tokens = min(context, max(256, 64 * math.ceil(longest / 64)))
    shares = result.num_images >= 2 * result.num_distinct > 0

    # Small language models need larger steps: LOG.md, 2026-11-23, for the quickstart's 135M.
    is_small = num_parameters < 500e6
    if full:
        rates = {"learning_rate": 1e-4 if is_small else 2e-5, "part_learning_rates": {}}
        tuning = {"vision_tower": "frozen", "projector": "full", "language_model": "full"}
    else:
        rates = {
            "learning_rate": 1e-3 if is_small else 2e-4,
            "part_learning_rates": {"projector": 1e-4 if is_small else 2e-5},
        }
        tuning = {"vision_tower": "frozen", "projector": "full", "language_model": "lora"}

    values = {
        "tuning": tuning,
        **rates,
        "epochs": epochs,
        "batch_size": batch_size,
        "batching": "shared-image" if shares else "packed",
        "row_tokens": row_tokens,
        "checkpoint_every": max(10, min(200, steps // 5)),
        "held_out": held_out,
    }
    how = "all weights of the language model" if full else "adapters on the language model"
    size = f"{num_parameters / 1e6:,.0f} million weights"
    notes = [
        f"data: {rows:,} samples, {result.num_distinct:,} different images, no errors",
        f"trains: {how}, and the projector; the vision tower is frozen",
        f"length: {epochs} epochs of {batch_size} samples a step, about {steps:,} steps",
        f"rows: {row_tokens} tokens, because the longest sample has {longest:,.0f}",
        f"learning rate: {rates['learning_rate']:g}, for {size}",
        f"held out: {held_out:.0%} of the images, which are asked about before and after"
        if held_out
        else f"held out: nothing of {rows} samples; from {HELD_OUT_FROM} on, a tenth is",
    ]
    return values, notes


def _refuse_errors(result: CheckResult, data: str) -> None:
    """Refuse data with errors, or without a sample."""
    from mipha.data.check.findings import SEVERITIES
    from mipha.data.check.fix import is_fixable

    errors = [finding for finding in result.findings if finding.severity == SEVERITIES[0]]
    if errors:
        first = errors[0]
        fix = f"see all with `mipha check {data}`, and "
        can_fix = is_fixable(result)
        fix += (
            f"leave those rows out with `mipha check {data} --fix FILE`" if can_fix else "fix them"
        )
        raise ValueError(
            f"{data} has {len(errors)} {'errors' if len(errors) > 1 else 'error'}, the first in "
            f"{first.where or 'the whole set'}: {first.what}; {fix}"
        )
    if not result.num_samples:
        raise ValueError(f"{data} has no samples: give a file or folder with some")


def _note_on_images(result: CheckResult, processor: Any, tokens: int) -> str:
    """Say what becomes of the images: nobody's photographs are made small without a word."""
    sides = next((one for one in result.histograms if one.name == "longer side of an image"), None)
    if sides is None:
        return "images: none"
    image = processor.image_processor
    size = (image.crop_size if image.do_center_crop else image.size)["height"]
    how = (
        "padded to a square and scaled"
        if image.do_pad
        else "scaled and cropped"
        if image.do_center_crop
        else "squashed"
    )
    note = (
        f"images: {sides.median:,.0f} pixels on the longer side in the middle, {how} to "
        f"{size} x {size}, {tokens} tokens each"
    )
    if sides.median > 2 * size:
        lost = math.ceil(sides.median / size)
        note += (
            f"; WARNING: details below about {lost} pixels are lost, and the checkpoint decides "
            "that: for small details start from a model with a larger image"
        )
    return note


# ---- The plan ------------------------------------------------------------------------------------


def this_machine(precision: str) -> Device:
    """Return the device that training will run on, with its own memory."""
    import torch

    from mipha.planning.plan import Device, device_named

    if not torch.cuda.is_available():
        return device_named("cpu", precision)
    facts = torch.cuda.get_device_properties(0)
    native = torch.cuda.is_bf16_supported()
    autocast = precision == "bfloat16" or (precision == "auto" and native)
    return Device(facts.name, "gpu", None, float(facts.total_memory), autocast)


def fit_memory(recipe: Recipe, device: Device) -> tuple[Recipe, list[str]]:
    """Plan a recipe on a device, and save memory where that changes nothing of what is learned.

    Raises:
        ValueError: It does not fit; names the changes that would make it fit.
    """
    from mipha.planning.plan import plan_training

    (plan,) = plan_training(recipe, device)
    notes = []
    if plan.fixes:
        own = [f"stages.{STAGE}.{change}" for change in _SAVES_MEMORY]
        if not set(plan.fixes) <= set(own):
            raise ValueError(
                f"training takes {plan.total_memory / 1e9:.1f} GB, and this machine has "
                f"{device.memory / 1e9:.1f} GB: add {' '.join(plan.fixes)}, or use a machine with "
                "more memory"
            )
        recipe = recipe.override(*plan.fixes)
        notes.append(f"memory: too little for the usual way, so {', '.join(plan.fixes)}")
        (plan,) = plan_training(recipe, device)
    hours = "" if plan.hours is None else f", about {plan.hours:.1f} hours"
    notes.append(
        f"plan: {plan.total_memory / 1e9:.1f} GB of this machine's {device.memory / 1e9:.1f} GB"
        f"{hours}"
    )
    return recipe, notes


# ---- Questions before and after ------------------------------------------------------------------


def ask(run: Run, when: Literal["before", "after"]) -> None:
    """Ask the model before or after training what `tune` asks, unless its answers are there."""
    path = run.folder / f"answers-{when}.json"
    if path.is_file():
        return

    assistant = _load_start(run.recipe) if when == "before" else _load(run)
    own, skipped = own_questions(run.recipe)
    general = _general_questions(run.recipe)
    kind = "held_out" if run.recipe.stage(STAGE).held_out else "trained_on"
    console.print(f"asking {len(own)} own and {len(general)} general questions ({when})")
    # An untrained model rambles: an answer gets little more room than the longest expected one.
    tokens = assistant.processor.tokenizer
    longest = max((len(tokens(q["expected"]).input_ids) for q in own), default=0)
    room = min(MAX_NEW_TOKENS, longest + 8)
    answers = assistant.answer_many(
        [(q["image"], q["question"]) for q in own], max_new_tokens=room
    ) + assistant.answer_many(
        [(q.image, q.text) for q in general], max_new_tokens=GENERAL_NEW_TOKENS
    )
    texts = [answer.text for answer in answers]
    rows = [
        {
            "id": q["id"],
            "image": q["key"],
            "question": q["question"],
            "expected": q["expected"],
            "answer": text,
            "right": normalised(text) == normalised(q["expected"]),
        }
        for q, text in zip(own, texts, strict=False)
    ]
    general_rows = [
        {"id": q.id, "question": q.text, "answer": text, "right": q.is_right(text)}
        for q, text in zip(general, texts[len(own) :], strict=True)
    ]
    content = {"held_out": [], kind: rows, "not_asked": skipped, "general": general_rows}
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def own_questions(recipe: Recipe) -> tuple[list[dict[str, Any]], int]:
    """Return questions of the own held-out rows, and how many rows are not asked.

    Where nothing is held out, some rows that are trained on are asked, to show that they were
    learned. A row is asked where it begins with a question about one image at most, and its answer.
    """
    from mipha.data.images import image_key
    from mipha.data.mixture import Mixture
    from mipha.data.sample import IMAGE

    stage = recipe.stage(STAGE)
    samples, most = Mixture(stage.data[:1], stage.held_out), MOST_TRAINED
    if stage.held_out:
        samples, most = samples.on_side("validation"), MOST_QUESTIONS

    found: list[dict[str, Any]] = []
    for sample in samples:
        if len(found) == most:
            break
        roles = [message.role for message in sample.messages[:2]]
        if roles != ["user", "assistant"] or len(sample.images) > 1:
            continue
        found.append(
            {
                "id": sample.id,
                "image": sample.images[0] if sample.images else None,
                "key": image_key(sample.images[0]).hex()[:16] if sample.images else sample.id,
                "question": sample.messages[0].text.replace(IMAGE, "").strip(),
                "expected": sample.messages[1].text,
            }
        )
    return found, len(samples) - len(found) if stage.held_out else 0


def _general_questions(recipe: Recipe) -> list[GeneralQuestion]:
    """Return the general questions, without those that the own data ask in the same words."""
    from mipha.data.dataset import load_data
    from mipha.data.sample import IMAGE
    from mipha.evaluation.general import general_questions

    data = load_data(recipe.stage(STAGE).data[0])
    own = {
        normalised(message.text.replace(IMAGE, ""))
        for record in data.records
        for message in data.to_sample(record).messages
        if message.role == "user"
    }
    return [question for question in general_questions() if normalised(question.text) not in own]


def _load_start(recipe: Recipe) -> Assistant:
    import torch

    from mipha.assistant import Assistant
    from mipha.models.build import build

    model, processor = build(recipe.model)
    return Assistant(model.to("cuda" if torch.cuda.is_available() else "cpu"), processor)


def _load(run: Run) -> Assistant:
    from mipha.assistant import load

    return load(run)


def normalised(text: str) -> str:
    """Return a text without case, punctuation at its ends, and repeated white space."""
    return re.sub(r"\s+", " ", text.casefold()).strip(string.punctuation + string.whitespace)


def compare_answers(run: Run) -> dict[str, Any]:
    """Compare the answers before and after: what was learned, what was forgotten, with intervals.

    An answer to a held-out question is right where it is the expected one, case and punctuation
    aside. Intervals resample whole images (comparison/statistics.py).
    """
    before, after = (
        read_json_object(run.folder / f"answers-{when}.json") for when in ("before", "after")
    )
    found: dict[str, Any] = {"not_asked": before["not_asked"]}
    for part in ("held_out", "trained_on", "general"):
        if before.get(part):
            found[part] = _compared(before[part], after[part])
    return found


def _compared(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    from mipha.comparison.statistics import intervals, paired_differences, tally

    def measure(totals: Any) -> dict[str, Any]:
        return {"accuracy": 100 * totals.mean("right")}

    tallies = [
        tally((row.get("image", row["id"]), {"right": float(row["right"])}) for row in rows)
        for rows in (before, after)
    ]
    difference = paired_differences(tallies[1], tallies[0], measure)["accuracy"]
    pairs = list(zip(before, after, strict=True))
    return {
        "questions": len(before),
        **{
            when: {
                "right": sum(row["right"] for row in rows),
                "accuracy": 100 * sum(row["right"] for row in rows) / len(rows),
                "interval": list(intervals(one, measure)["accuracy"]),
            }
            for when, rows, one in zip(("before", "after"), (before, after), tallies, strict=True)
        },
        "difference": difference.difference,
        "difference_interval": [difference.low, difference.high],
        "same_answer": sum(old["answer"] == new["answer"] for old, new in pairs),
        "lost": [
            {"question": old["question"], "before": old["answer"], "after": new["answer"]}
            for old, new in pairs
            if old["right"] and not new["right"]
        ],
        "gained": sum(new["right"] and not old["right"] for old, new in pairs),
    }


def print_tuned(run: Run) -> None:
    """Print what was learned and what was forgotten."""
    found = read_json_object(run.folder / "tuned.json")
    table = Table(title="\nbefore and after", title_justify="left")
    table.add_column("")
    for column in ("questions", "before %", "after %", "change, 95 % interval", "same answer"):
        table.add_column(column, justify="right")
    titles = {"held_out": "own, held out", "trained_on": "own, trained on", "general": "general"}
    for part, title in titles.items():
        if part not in found:
            continue
        row = found[part]
        low, high = row["difference_interval"]
        table.add_row(
            title,
            str(row["questions"]),
            *(_with_interval(row[when]) for when in ("before", "after")),
            f"{row['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
            str(row["same_answer"]),
        )
    console.print(table)

    # Without held-out rows, the answers themselves say more than their number.
    for row in read_json_object(run.folder / "answers-after.json").get("trained_on", [])[:3]:
        said = f"{row['question']} {row['answer']!r}, expected {row['expected']!r}"
        console.print(said, markup=False, soft_wrap=True)
    if found["not_asked"]:
        console.print(f"{found['not_asked']} held-out rows were not asked", markup=False)
    lost = found.get("general", {}).get("lost", [])
    for one in lost[:5]:
        told = f"forgotten: {one['question']} {one['before']!r}, now {one['after']!r}"
        console.print(told, markup=False, soft_wrap=True)
    if lost:
        console.print("`--replay DATASET` mixes old data in", markup=False)
    console.print(f"all answers: {run.folder}/answers-before.json, answers-after.json")


def _with_interval(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['accuracy']:.1f} ({low:.0f} to {high:.0f})"
