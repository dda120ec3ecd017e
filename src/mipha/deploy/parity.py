"""Compare exported GGUF files with the checkpoint: image features, first tokens, answers.

checkpoint, float32  --[transformers]-->  features, first logits, answers ---+
GGUF files           --[llama.cpp]----->  the same, from the image file    --+--> rows, each with
                     --[llama.cpp]----->  the same, from our own pixels   ---+    a verdict

llama.cpp neither resizes nor pads an image of the tower's own size. So an error with our own pixels
comes from the weights, and an error that only the image file shows comes from resizing and padding.
llama.cpp resizes a square image exactly as Pillow does; it shrinks any other and then pads it in
CLIP's grey, where we pad in the tower's mean colour, or squash. Tiles of a LLaVA, and native
images, come from us in any case; of Idefics3, ours are images scaled to whole tiles.

Source: llama.cpp b11549 `tools/mtmd/mtmd-image.cpp` (resize), `tools/mtmd/clip.cpp`
    (image_pad_color of PROJECTOR_TYPE_MLP).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import LlavaProcessor

from mipha.assistant import load
from mipha.comparison.statistics import wilson
from mipha.data.datasets import easy_vqa
from mipha.data.datasets.table import INSTRUCTION
from mipha.data.images import SUFFIXES, open_image
from mipha.data.pixels import bounded
from mipha.data.sample import IMAGE, Message
from mipha.deploy.llama_cpp import LlamaCpp, Reply
from mipha.deploy.parity_tables import (
    MIN_COSINE,
    NEAR_TIE,
    Disagreement,
    EmbeddingParity,
    FileParity,
    Parity,
)
from mipha.geometry import Shuffled, Square, geometry_of, scaled_to
from mipha.models.features import image_features

Pair = tuple[Path, str]
"""An image and a question about it."""

LEAST_LOGIT = -7.0
"""Floor of log-probabilities in nats: rounding moves the tokens below one in a thousand most."""

NUM_IMAGES = 32
"""Images whose embeddings are compared; each takes megabytes."""

NUM_LOGITS = 16
"""Questions whose first tokens are compared; each needs a second pass over its prompt."""


@dataclass(frozen=True)
class _Reference:
    """The checkpoint's own numbers and answers."""

    answers: list[str]
    num_prompt_tokens: list[int]
    logits: list[np.ndarray]
    features: dict[Path, np.ndarray]
    processor: LlavaProcessor
    seconds: float

    def seen(self, image: Path) -> Image.Image:
        """Return the image in our own pixels."""
        return as_seen(self.processor, open_image(image))


def check_parity(
    checkpoint: str | Path,
    folder: Path,
    images: Sequence[Path],
    questions: Sequence[str] = (),
    **options: Any,
) -> Parity:
    """Ask a checkpoint and its GGUF files every question about every image.

    Args:
        checkpoint: A run, or a model folder.
        folder: Folder of `export_gguf`: model-KIND.gguf, and one mmproj-KIND.gguf.
        images: Image files.
        questions: Questions; empty for the request for a description.
        options: See `check_pairs`.

    Raises:
        See `check_pairs`.
    """
    return check_pairs(
        checkpoint,
        folder,
        [(image, question) for image in images for question in questions or (INSTRUCTION,)],
        **options,
    )


def check_pairs(
    checkpoint: str | Path,
    folder: Path,
    pairs: Sequence[Pair],
    *,
    max_new_tokens: int = 32,
    threads: int | None = None,
    device: str | None = None,
) -> Parity:
    """Ask a checkpoint and its GGUF files the same questions.

    Args:
        checkpoint: A run, or a model folder.
        folder: Folder of `export_gguf`: model-KIND.gguf, and one mmproj-KIND.gguf.
        pairs: Images and questions; questions about one image should be neighbours.
        max_new_tokens: Longest answer in tokens; answers are compared up to there.
        threads: Threads of llama.cpp; None for as many as there are cores.
        device: Device of the checkpoint; None for the GPU if there is one.

    Raises:
        FileNotFoundError: No such checkpoint, image or GGUF file.
        ValueError: There are no pairs, or llama.cpp cannot read a file.
    """
    if not pairs:
        raise ValueError("no images to compare: give at least one image")

    models, mmproj = gguf_files(folder)
    with _progress() as progress:
        # Ask the checkpoint.
        bar = progress.add_task("the checkpoint", total=len(pairs))
        reference = _ask_ours(
            checkpoint, pairs, max_new_tokens, device, lambda num: progress.advance(bar, num)
        )

        # Ask the files; the first one's runtime also gives the embeddings, which all share.
        embeddings: tuple[EmbeddingParity, ...] = ()
        files = []
        context = max(reference.num_prompt_tokens) + max_new_tokens + 256
        for model in models:
            bar = progress.add_task(model.name, total=len(pairs))
            with LlamaCpp(model, mmproj, threads=threads, context=context) as runtime:
                embeddings = embeddings or _compare_embeddings(runtime, reference)
                files.append(
                    _compare(
                        runtime,
                        pairs,
                        reference,
                        max_new_tokens,
                        lambda bar=bar: progress.advance(bar),
                    )
                )
    return Parity(str(checkpoint), str(folder), reference.seconds, embeddings, tuple(files))


def gguf_files(folder: Path) -> tuple[list[Path], Path]:
    """Return the language models of an export, the largest first, and its mmproj.

    Raises:
        FileNotFoundError: One of the two is missing.
        ValueError: There are several mmproj.
    """
    models = sorted(folder.glob("model-*.gguf"), key=lambda path: -path.stat().st_size)
    mmprojs = sorted(folder.glob("mmproj-*.gguf"))
    if not models or not mmprojs:
        raise FileNotFoundError(
            f"{folder} has no model-*.gguf with an mmproj-*.gguf: "
            "make both with `mipha export --to gguf`"
        )
    if len(mmprojs) > 1:
        raise ValueError(
            f"{folder} has {len(mmprojs)} mmproj-*.gguf, and only one can be compared: "
            "keep one of them there"
        )
    return models, mmprojs[0]


def images_in(folder: Path) -> list[Path]:
    """Return every image file in a folder and below, in order.

    Raises:
        FileNotFoundError: There is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{folder} holds no image file: give a folder with images")
    return found


def easy_vqa_pairs(num: int, root: Path | None = None) -> list[Pair]:
    """Return questions of easy-VQA's test split, spread evenly over it.

    Raises:
        FileNotFoundError: The data is not there.
    """
    records = easy_vqa.load(root, "test")
    chosen = records[:: max(1, len(records) // num)][:num]
    return [
        (easy_vqa.image_path(root, record.folder, record.image), record.question)
        for record in chosen
    ]


def as_seen(processor: LlavaProcessor, image: Image.Image) -> Image.Image:
    """Return the image in our own pixels, where llama.cpp would choose others.

    A square: padded or squashed to the tower's size, in 8 bits. The processor resizes in 8 bits and
    only then scales, so nothing is lost on the way back. An image of Idefics3: scaled to whole
    tiles. Others are prepared by us before llama.cpp gets them.
    """
    geometry, image_processor = geometry_of(processor), processor.image_processor
    if isinstance(geometry, Shuffled):
        return _in_whole_tiles(geometry, bounded(image, geometry, image_processor.image_mean))
    if not isinstance(geometry, Square):
        return image

    pixels = image_processor(image, return_tensors="np")["pixel_values"][0]  # (3, height, width)
    pixels = pixels.transpose(1, 2, 0)  # (height, width, 3)
    scaled = (pixels * image_processor.image_std + image_processor.image_mean) * 255
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def _in_whole_tiles(geometry: Shuffled, image: Image.Image) -> Image.Image:
    """Return an image scaled by both steps of Idefics3, before it is cut."""
    rows, columns = geometry.grid(*image.size)
    height, width = scaled_to(image.height, image.width, geometry.longest_edge)
    first = image.resize((width, height), Image.Resampling.LANCZOS)
    side = geometry.side
    return first.resize((columns * side, rows * side), Image.Resampling.LANCZOS)


@torch.inference_mode()
def _ask_ours(
    checkpoint: str | Path,
    pairs: Sequence[Pair],
    max_new_tokens: int,
    device: str | None,
    on_answers: Callable[[int], None],
) -> _Reference:
    """Ask the checkpoint in float32: a reference must round less than the files it judges."""
    # Compute features, prompts and first logits.
    assistant = load(checkpoint, device, torch.float32)
    images = list(dict.fromkeys(image for image, _ in pairs))[:NUM_IMAGES]
    features = {
        image: image_features(assistant.model, [assistant.image_inputs(image)])[0].cpu().numpy()
        for image in images
    }
    asked = [([Message("user", f"{IMAGE}\n{question}")], [image]) for image, question in pairs]
    prompts = [assistant.prompt_ids(*one) for one in asked]
    logits = []
    for one in asked[:NUM_LOGITS]:
        prompt = assistant.prompt(*one)
        ids = torch.tensor([prompt.ids], device=assistant.model.device)
        found = assistant.model(
            inputs_embeds=assistant.embeddings(ids, prompt.images), logits_to_keep=1
        ).logits[0, -1]
        logits.append(found.log_softmax(-1).cpu().numpy())

    # Answer.
    start = time.perf_counter()
    answers = assistant.answer_many(
        pairs, max_new_tokens=max_new_tokens, on_answers=lambda places, _: on_answers(len(places))
    )
    seconds = (time.perf_counter() - start) / len(pairs)
    return _Reference(
        [answer.text for answer in answers],
        [len(ids) for ids in prompts],
        logits,
        features,
        assistant.processor,
        seconds,
    )


def _compare_embeddings(runtime: LlamaCpp, reference: _Reference) -> tuple[EmbeddingParity, ...]:
    images = list(reference.features)
    with_ours = _embedding_row(
        "ours", runtime, [reference.seen(image) for image in images], reference, "weights differ"
    )
    otherwise = "pixels differ" if with_ours.verdict == "ok" else with_ours.verdict
    return _embedding_row("llama.cpp", runtime, images, reference, otherwise), with_ours


def _embedding_row(
    pixels: Literal["llama.cpp", "ours"],
    runtime: LlamaCpp,
    images: Sequence[Path | Image.Image],
    reference: _Reference,
    otherwise: str,
) -> EmbeddingParity:
    """Compare the embeddings of some images; `otherwise` is the verdict if they differ."""
    ours = np.concatenate(list(reference.features.values()))
    theirs = np.concatenate([runtime.image_embeddings(image) for image in images])
    if theirs.shape != ours.shape:
        raise ValueError(
            f"{runtime.mmproj} makes {theirs.shape[0]} image tokens of {theirs.shape[1]} numbers, "
            f"the checkpoint {ours.shape[0]} of {ours.shape[1]}: "
            "it is of another model, so export this one again"
        )

    scale = float((theirs * ours).sum() / (ours * ours).sum())
    cosines = (theirs * ours).sum(-1) / np.maximum(
        np.linalg.norm(theirs, axis=-1) * np.linalg.norm(ours, axis=-1), 1e-12
    )
    return EmbeddingParity(
        pixels=pixels,
        num_images=len(images),
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        scale=scale,
        max_error=float(np.abs(theirs / scale - ours).max()) if scale else float("inf"),
        largest=float(np.abs(ours).max()),
        verdict="ok" if cosines.min() > MIN_COSINE else otherwise,
    )


def _compare(
    runtime: LlamaCpp,
    pairs: Sequence[Pair],
    reference: _Reference,
    max_new_tokens: int,
    on_answer: Callable[[], None],
) -> FileParity:
    # Answer every question from the image file.
    replies, seconds = [], 0.0
    for image, question in pairs:
        start = time.perf_counter()
        replies.append(runtime.reply(image, question, max_new_tokens))
        seconds += time.perf_counter() - start
        on_answer()

    # Ask again with our own pixels where the answer differs: are the pixels the cause?
    different = []
    for (image, question), ours, reply in zip(pairs, reference.answers, replies, strict=True):
        if reply.text != ours:
            with_our_pixels = runtime.answer(reference.seen(image), question, max_new_tokens)
            because = "pixels" if with_our_pixels == ours else "weights"
            different.append(
                Disagreement(str(image), question, ours, reply.text, _margin(reply, ours), because)
            )

    # Compare the logits of the first tokens.
    errors, tops = [], 0
    for (image, question), ours in zip(pairs, reference.logits, strict=False):
        theirs = runtime.first_token_logits(reference.seen(image), question)
        same_words = theirs.shape == ours.shape
        tops += bool(same_words and theirs.argmax() == ours.argmax())
        errors.append(
            float(np.abs(theirs.clip(LEAST_LOGIT) - ours.clip(LEAST_LOGIT)).max())
            if same_words
            else float("inf")
        )

    num_same = len(pairs) - len(different)
    low, high = wilson(num_same, len(pairs))
    return FileParity(
        file=runtime.model.name,
        quantization=runtime.quantization,
        num_questions=len(pairs),
        num_same_prompts=sum(
            reply.num_prompt_tokens == num
            for reply, num in zip(replies, reference.num_prompt_tokens, strict=True)
        ),
        num_logits=len(errors),
        logit_error=max(errors),
        num_same_tops=tops,
        num_same=num_same,
        low=low,
        high=high,
        num_near_ties=sum(one.margin is not None and one.margin < NEAR_TIE for one in different),
        disagreements=tuple(different),
        seconds=seconds / len(pairs),
    )


def _margin(reply: Reply, ours: str) -> float | None:
    """Return the margin of their first token that does not lead to our answer."""
    text = b""
    for piece, margin in zip(reply.pieces, reply.margins, strict=True):
        text += piece
        readable = text.decode(errors="ignore").lstrip()  # a token may end inside a letter
        if not ours.replace("\ufffd", "").startswith(readable):
            return margin

    # Their turn ended where ours goes on.
    return reply.margins[-1] if reply.finished and reply.margins else None


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answers"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        yield progress
