"""Questions a second of the batched evaluator, beside stock transformers with one question each.

    python benchmarks/evaluation.py [--checkpoint runs/quickstart] [--repeats 3] \\
        [--out benchmarks/results]

The answers must be the same. There are two cases: the trained quickstart checkpoint on its test
images (where there is one), and 729 image tokens with 8 questions an image on random weights
(SigLIP's patch grid at 384 pixels, a small language model).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from harness import Row, report, side_by_side
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mipha.assistant import load
from mipha.data.images import open_image
from mipha.run import model_folder

BASELINE = "stock generate, one question at a time"
Pair = tuple[Path, str]


def measure(
    case: str,
    checkpoint: Path,
    pairs: Sequence[Pair],
    max_new_tokens: int,
    repeats: int,
    batch_size: int,
) -> tuple[list[Row], bool]:
    """Return the rows of the case, and whether both ways gave the same answers."""
    assistant = load(checkpoint)
    model = (
        AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=assistant.model.dtype)
        .to(assistant.model.device)
        .eval()
    )
    processor = AutoProcessor.from_pretrained(checkpoint)
    answers: dict[str, list[str]] = {}

    @torch.inference_mode()
    def one_at_a_time() -> None:
        answers[BASELINE] = []
        for path, question in pairs:
            content = [{"type": "image"}, {"type": "text", "text": f"\n{question}"}]
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = processor(
                images=open_image(path), text=prompt, return_tensors="pt", add_special_tokens=False
            ).to(model.device, model.dtype)
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            text = processor.tokenizer.decode(
                out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            answers[BASELINE].append(text.strip())

    def batched() -> None:
        found = assistant.answer_many(pairs, max_new_tokens=max_new_tokens, batch_size=batch_size)
        answers["batched"] = [answer.text for answer in found]

    rows = side_by_side(
        case,
        "questions",
        len(pairs),
        {BASELINE: one_at_a_time, f"batches of {batch_size}": batched},
        repeats,
    )
    return rows, answers[BASELINE] == answers["batched"]


def quickstart_pairs(num_images: int) -> list[Pair]:
    """Return all distinct questions about some images of the official test split."""
    from mipha.evaluation.benchmark import load_benchmark

    pairs: dict[Pair, None] = {}
    images: dict[Path, None] = {}
    for question in load_benchmark("easy_vqa").questions(None, "test"):
        assert isinstance(question.image, Path)
        images.setdefault(question.image)
        if len(images) > num_images:
            break
        pairs[question.image, question.text] = None
    return list(pairs)


def untrained_checkpoint(folder: Path) -> Path:
    """Write a model of 729 image tokens: a random tower of ViT-small's size, and SmolLM2-135M."""
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    from mipha.models.build import build, save_checkpoint
    from mipha.recipe import ModelRecipe

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
    }

    tower = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=384, patch_size=14))
    tower.save_pretrained(folder / "tower")
    SiglipImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(folder / "tower")

    model, processor = build(
        ModelRecipe(vision_tower=str(folder / "tower"), language_model="smollm2-135m")
    )
    save_checkpoint(model, processor, folder / "model")
    return folder / "model"


def random_pairs(folder: Path, num_images: int, questions_an_image: int) -> list[Pair]:
    """Write images of noise, and return each with its questions."""
    rng = np.random.default_rng(0)
    things = (
        "a dog",
        "a red car",
        "two people",
        "the sky",
        "some text",
        "a wooden table",
        "an open door",
        "a small bird",
        "snow",
    )

    pairs = []
    for number in range(num_images):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (384, 384, 3), dtype=np.uint8)).save(path)
        pairs += [
            (path, f"Is there {thing} in picture {number}?\nAnswer with one word.")
            for thing in things[:questions_an_image]
        ]
    return pairs


def main() -> None:
    """Run both cases and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()

    rows: list[Row] = []
    equal: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = {
            "729 image tokens, 8 questions an image": (
                untrained_checkpoint(folder),
                random_pairs(folder, 2, 8),
                8,
            )
        }

        if options.checkpoint.is_dir():
            cases["quickstart checkpoint"] = (
                model_folder(options.checkpoint),
                quickstart_pairs(options.num_images),
                32,
            )

        for case, (checkpoint, pairs, max_new_tokens) in cases.items():
            found, equal[case] = measure(
                case, checkpoint, pairs, max_new_tokens, options.repeats, options.batch_size
            )
            rows += found

    facts = {
        "repeats": options.repeats,
        **{f"same answers, {case}": same for case, same in equal.items()},
    }
    report(
        "evaluation",
        "Evaluating: batched, against one question at a time",
        rows,
        options.out,
        facts,
    )


if __name__ == "__main__":
    main()
