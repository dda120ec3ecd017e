"""Finished models that learn with `mipha tune` what they cannot do: where a shape is.

    python benchmarks/tuning.py quickstart=runs/quickstart imported=./imported [--stock] \
        [--replay] [KEY=VALUE ...] [--out benchmarks/results]

Images as easy-VQA's are drawn here, each with one question: is the shape left, right, top or
bottom? A quarter of the images is held out and asked about before and after. What is forgotten is
told by the general questions of `tune`, and by the first `--old` of easy-VQA's test questions.

`--stock` makes a LLaVA with transformers alone: packaged weights, a tokenizer with one more token,
a chat template without marks, and a projector that learned to name shapes in `STOCK_STEPS` steps.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mipha.files import append_line, read_json_object, write_whole
from mipha.run import provenance

SIDE = 64
PLACES = {"left": (14, 32), "right": (50, 32), "top": (32, 14), "bottom": (32, 50)}
COLOURS = ("red", "green", "blue", "black", "yellow", "brown", "gray", "teal")
SHAPES = ("circle", "rectangle", "triangle")
NUM_ROWS = 480
HELD_OUT = 0.25
STOCK_STEPS = 200


def draw(numbers: random.Random, place: str | None = None) -> tuple[Image.Image, str, str]:
    """Draw a shape.

    Args:
        numbers: Source of what is drawn.
        place: Key of `PLACES`; None for any point of the image.

    Returns:
        The image, its colour and its shape.
    """
    shade = numbers.randrange(225, 256)
    image = Image.new("RGB", (SIDE, SIDE), (shade, shade, numbers.randrange(225, 256)))
    x, y = PLACES[place] if place else (numbers.randrange(14, 51), numbers.randrange(14, 51))
    x, y = x + numbers.randrange(-4, 5), y + numbers.randrange(-4, 5)
    colour, shape, half = numbers.choice(COLOURS), numbers.choice(SHAPES), numbers.randrange(7, 11)

    canvas, box = ImageDraw.Draw(image), (x - half, y - half, x + half, y + half)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "rectangle":
        canvas.rectangle(box, fill=colour)
    else:
        corners = [(x, y - half), (x - half, y + half), (x + half, y + half)]
        canvas.polygon(corners, fill=colour)
    return image, colour, shape


def write_rows(folder: Path, num_rows: int = NUM_ROWS) -> Path:
    """Write images, and a file with a question about each; every place comes equally often."""
    numbers = random.Random(0)
    for number in range(num_rows):
        place = list(PLACES)[number % len(PLACES)]
        image, _, shape = draw(numbers, place)
        image.save(folder / f"{number}.png")
        row = {"image": f"{number}.png", "question": f"where is the {shape}?", "answer": place}
        append_line(folder / "places.jsonl", row)
    return folder / "places.jsonl"


# ---- A LLaVA that this package never touched -----------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, without marks of what the assistant says."""


def stock_llava(folder: Path, side: int = 70, steps: int = STOCK_STEPS) -> None:
    """Save a LLaVA of packaged weights, made and barely trained with transformers and torch alone.

    Args:
        folder: Folder that `save_pretrained` writes.
        side: Pixels a side that the tower reads.
        steps: Steps of the projector on eight captions each, such as "a red circle".
    """
    import torch
    import transformers
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    from mipha.models.packaged import packaged_folder

    # Put the parts together. The tokenizer gets one more token, for the image.
    torch.manual_seed(0)
    language, tower = packaged_folder("smollm2-135m"), packaged_folder("dinov2-small")
    tokenizer = transformers.AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    vision = transformers.AutoModel.from_pretrained(tower)
    _shrink(vision, side)
    text = transformers.AutoModelForCausalLM.from_pretrained(language)
    text.resize_token_embeddings(len(tokenizer))
    config = transformers.LlavaConfig(
        vision_config=vision.config,
        text_config=text.config,
        image_token_index=image_token,
        vision_feature_layer=-3,
        image_seq_length=(side // 14) ** 2,
        tie_word_embeddings=True,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    square = {"height": side, "width": side}
    processor = transformers.LlavaProcessor(
        LlavaImageProcessorPil(
            size={"shortest_edge": side},
            crop_size=square,
            do_pad=False,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )

    # Train the projector on captions of shapes that stand anywhere.
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    optimizer, numbers = torch.optim.AdamW(projector.parameters(), lr=2e-3), random.Random(1)
    for step in range(steps):
        drawn = [draw(numbers) for _ in range(8)]
        ask = "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
        texts = [f"{ask}a {colour} {shape}<|im_end|>" for _, colour, shape in drawn]
        images = [image for image, _, _ in drawn]
        batch = processor(images, texts, padding=True, padding_side="right", return_tensors="pt")
        begin = processor(images[:1], [ask], return_tensors="pt")["input_ids"].shape[1]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :begin] = -100
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"stock: step {step + 1}, caption loss {loss.item():.3f}", flush=True)

    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _shrink(vision: Any, side: int) -> None:
    """Let a DINOv2 read squares of a side: resize its positions once, and say so in its config."""
    import torch

    embeddings = vision.embeddings
    patches = torch.zeros(1, 1 + (side // 14) ** 2, vision.config.hidden_size)
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(patches, side, side)
    embeddings.position_embeddings = torch.nn.Parameter(positions.clone())
    vision.config.image_size = side


# ---- The measurement -----------------------------------------------------------------------------


def measure(
    name: str,
    model: str,
    rows: Path,
    folder: Path,
    old_questions: int,
    replay: bool,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Tune a model on the rows, and return what it knew before and after.

    Args:
        name: Name of the case.
        model: Run or model folder.
        rows: File of `write_rows`.
        folder: Folder of the case; a measurement that was cut short goes on.
        old_questions: Number of easy-VQA's test questions to ask before and after.
        replay: Whether easy-VQA's training questions are mixed in.
        overrides: Recipe values beside those that `tune` derives.
    """
    run = folder / "run"
    mixed = ["--replay", "easy_vqa"] if replay else []
    wanted = [f"stages.tune.held_out={HELD_OUT}", *overrides]
    _mipha("tune", model, str(rows), "-o", str(run), *mixed, *wanted)

    # The old questions, before and after.
    old = {}
    for when, asked in (("before", model), ("after", str(run))) if old_questions else ():
        results = folder / f"easy-vqa-{when}"
        limit = ("--limit", str(old_questions))
        _mipha("evaluate", asked, "-b", "easy_vqa", *limit, "-o", str(results))
        (scores,) = results.rglob("scores.json")
        found = read_json_object(scores)["scores"][0]
        old[when] = {key: found[key] for key in ("value", "low", "high", "n")}

    tuned = read_json_object(run / "tuned.json")
    metrics = [json.loads(line) for line in (run / "tune/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "loss" in row]
    return {
        "model": name,
        "replay": replay,
        "overrides": list(overrides),
        "rows": NUM_ROWS,
        "steps": len(steps),
        "peak_memory_gib": max(row["peak_memory_gib"] for row in steps),
        "places": {
            "questions": tuned["held_out"]["questions"],
            **{when: tuned["held_out"][when] for when in ("before", "after")},
            "difference": tuned["held_out"]["difference"],
            "difference_interval": tuned["held_out"]["difference_interval"],
        },
        "general": {
            key: tuned["general"][key]
            for key in ("questions", "before", "after", "difference_interval", "lost", "gained")
        },
        "easy_vqa": old,
    }


def _mipha(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "mipha", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="NAME=MODEL to tune, or KEY=VALUE of the recipe")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--old", type=int, default=300, help="questions of easy-VQA; 0: none")
    parser.add_argument("--work", type=Path, help="folder to keep; None: a temporary one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    overrides = [word for word in options.words if "." in word.partition("=")[0]]
    models = dict(word.split("=", 1) for word in options.words if word not in overrides)

    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        rows = work / "rows" / "places.jsonl"
        if not rows.is_file():
            rows.parent.mkdir(parents=True)
            write_rows(rows.parent)
        if options.stock:
            models["stock"] = str(work / "stock-llava")
            if not (work / "stock-llava").is_dir():
                stock_llava(work / "stock-llava")
        found = []
        for name, model in models.items():
            folder = work / (f"{name}-replay" if options.replay else name)
            replay, old = options.replay, options.old
            found.append(measure(name, model, rows, folder, old, replay, overrides))
            print(json.dumps(found[-1], indent=1))

    # Cases measured before stay beside these.
    file = options.out / "tuning.json"
    before = read_json_object(file)["cases"] if file.is_file() else []
    measured = {(case["model"], case["replay"]) for case in found}
    kept = [case for case in before if (case["model"], case["replay"]) not in measured]
    content = {"provenance": provenance(), "cases": [*kept, *found]}
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
