"""Stage 2 of a full-size model with random weights on a GPU: samples and tokens a second, and MFU.

    python benchmarks/full_size.py [--size mipha-3b] [--samples 16] [--row-tokens 4096] \\
        [--activation-checkpointing] [--frozen-tower] [--peak-tflops 989] [--out benchmarks/results]

The lengths of the samples are like LLaVA-665K's. MFU is the FLOPs of real tokens a second over the
GPU's dense bfloat16 peak. It counts the tower, the projector, the language model, attention, and
the head on supervised positions, forward and backward. It does not count padding, nor the second
computation of activation checkpointing. Without a GPU only `--size small` runs, which tests the
harness and prints no MFU.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from harness import report, side_by_side
from lengths import IMAGE_TOKENS, draw_lengths
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaConfig, SiglipVisionConfig
from ways import stock_model

from mipha.data.collate import collate, to_device
from mipha.data.encode import IGNORE, Encoded
from mipha.data.images import grey_image
from mipha.data.packing import Row, make_rows
from mipha.models.attention import use_segments
from mipha.models.build import skeleton
from mipha.models.flops import StepFlops, Work
from mipha.models.modeling import LlavaForConditionalGeneration
from mipha.models.tuning import apply_tuning
from mipha.recipe import ModelRecipe, TuningRecipe

SIZES = {
    "mipha-3b": ModelRecipe(vision_tower="siglip-so400m-384", language_model="phi-2"),
    "mipha-1.6b": ModelRecipe(vision_tower="siglip-so400m-384", language_model="phi-1.5"),
    "small": None,
}
"""The paper's models, and a tiny one that runs in seconds on a CPU."""

PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0, "NVIDIA A100-SXM4-80GB": 312.0}
"""Dense bfloat16 peak by the driver's name of the GPU. Source: NVIDIA's data sheets."""

SUPERVISED = 0.55
"""Share of the text that is supervised: 180 of 330 tokens, as assumed for LLaVA-665K."""

MICRO_BATCH = 4
"""Samples of the baseline's padded forward pass. Source: upstream's finetune.sh, 4 a GPU."""


def random_model(
    size: str, device: torch.device, frozen_tower: bool
) -> LlavaForConditionalGeneration:
    """Build the model with random weights on its device; the tower ends at the layer to read."""
    recipe = SIZES[size]
    config = skeleton(recipe).config if recipe else _small_config()
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).eval()
    tuning = TuningRecipe(
        vision_tower="frozen" if frozen_tower else "full", projector="full", language_model="full"
    )
    apply_tuning(model, tuning, device)
    return model


def _small_config() -> LlavaConfig:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlavaConfig(
        vision_config=SiglipVisionConfig(
            **sizes, image_size=384, patch_size=14, vision_use_head=False
        ),
        text_config=LlamaConfig(**sizes, vocab_size=1000, max_position_embeddings=4096),
        image_token_index=999,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=IMAGE_TOKENS,
    )


def draw_samples(config: LlavaConfig, number: int) -> list[Encoded]:
    """Draw samples of random token ids; a sample longer than an image begins with one."""
    random = np.random.default_rng(0)
    samples = []
    for place, length in enumerate(draw_lengths(number).tolist()):
        ids = random.integers(5, config.image_token_id, length)
        images = (grey_image(),) if length > IMAGE_TOKENS + 16 else ()
        if images:
            ids[:IMAGE_TOKENS] = config.image_token_id
        text = length - (IMAGE_TOKENS if images else 0)
        labels = np.where(np.arange(length) >= length - round(SUPERVISED * text), ids, IGNORE)
        samples.append(Encoded(str(place), ids, labels, images))
    return samples


def work_of(samples: Sequence[Encoded]) -> Work:
    """Count the work in samples, each by itself."""
    lengths = [len(sample) for sample in samples]
    supervised = sum(int((sample.labels[1:] != IGNORE).sum()) for sample in samples)
    images = sum(len(sample.images) for sample in samples)
    return Work(
        images=images,
        tokens=sum(lengths),
        pairs=sum(n * (n + 1) // 2 for n in lengths),
        supervised=supervised,
    )


def measure(options: argparse.Namespace) -> None:
    """Measure the baseline and our ways side by side, and write the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and options.size != "small":
        raise SystemExit(
            f"--size {options.size} needs a GPU, and this machine has none: "
            "use --size small, which runs on a CPU"
        )

    # Make the model and the samples.
    model = random_model(options.size, device, options.frozen_tower)
    if options.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

    samples = draw_samples(model.config, options.samples)
    work = work_of(samples)
    processor = _Processor(model.config)

    # Time the ways.
    padded = [make_rows([sample], options.row_tokens, "padded")[0] for sample in samples]
    ways: dict[str, Callable[[], float]] = {
        "baseline: stock class, padded by 4, all logits, eager": lambda: _step(
            model, padded, MICRO_BATCH, processor, own=False
        ),
        "mipha, padded by 4": lambda: _step(model, padded, MICRO_BATCH, processor, own=True),
        "mipha, packed": lambda: _step(
            model, make_rows(samples, options.row_tokens, "packed"), 1, processor, own=True
        ),
    }

    losses: dict[str, float] = {}
    calls = {
        name: lambda name=name, call=call: losses.update({name: call()})
        for name, call in ways.items()
    }
    rows = side_by_side(f"stage 2, {options.size}", "samples", len(samples), calls, options.repeats)

    # Collect the facts, and report.
    flops = StepFlops(model).total(work)
    peak = options.peak_tflops or (
        PEAK_TFLOPS.get(torch.cuda.get_device_name()) if device.type == "cuda" else None
    )
    facts: dict[str, Any] = {"repeats": options.repeats, "samples": len(samples)}
    facts |= {"real tokens": work.tokens, "TFLOP of a step": round(flops / 1e12, 3)}
    facts |= {
        "tower": "frozen" if options.frozen_tower else "trained",
        "activation checkpointing": options.activation_checkpointing,
    }
    facts |= {
        "products in": "bfloat16",
        "weights and optimizer in": "float32",
        "row_tokens": options.row_tokens,
    }

    for row in rows:
        steps_a_second = row.rate / len(samples)
        mfu = f", MFU {100 * steps_a_second * flops / (peak * 1e12):.1f} %" if peak else ""
        facts[row.way] = (
            f"{steps_a_second * work.tokens:.0f} real tokens/s{mfu}; "
            f"loss before {losses[row.way]:.4f}"
        )
    if device.type == "cuda":
        facts["peak memory, GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    report(
        "full-size",
        f"Stage 2 of {options.size}, random weights, lengths like LLaVA-665K's",
        rows,
        options.out,
        facts,
    )


class _Processor:
    """Stand-in for a processor: `collate` reads its pad token, and pixels of the right shape."""

    def __init__(self, config: LlavaConfig) -> None:
        self.tokenizer = SimpleNamespace(pad_token_id=0)
        self.image_token_id = config.image_token_id
        self.image_processor = _ImageProcessor(config.vision_config.image_size)
        self.patch_size = config.vision_config.patch_size
        self.vision_feature_select_strategy = config.vision_feature_select_strategy
        self.num_additional_image_tokens = 0


class _ImageProcessor:
    """Stand-in for an image processor: black squares."""

    image_mean = (0.5, 0.5, 0.5)

    def __init__(self, side: int) -> None:
        self._side = side

    def __call__(self, images: Sequence[Any], return_tensors: str) -> dict[str, Tensor]:
        return {"pixel_values": torch.zeros(len(images), 3, self._side, self._side)}

    def to_dict(self) -> dict[str, Any]:
        size = {"height": self._side, "width": self._side}
        return {"image_processor_type": "LlavaImageProcessor", "size": size, "crop_size": size}


def _step(
    model: LlavaForConditionalGeneration, rows: Sequence[Row], size: int, processor: Any, own: bool
) -> float:
    """Take one optimizer step on rows, and return the loss of its forward pass."""
    device = model.device
    model.set_attn_implementation("sdpa" if own else "eager")
    if own:
        use_segments(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    # With a rate of zero, every call starts from the same weights and does all of the work.
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=own or None)
    network: nn.Module = model if own else stock_model(model).train(model.training)

    # Add up the gradients of all batches.
    supervised = sum(row.num_supervised for row in rows)
    total = torch.zeros((), device=device)
    for start in range(0, len(rows), size):
        batch = _batch(rows[start : start + size], processor, device, own)
        with torch.autocast(device.type, torch.bfloat16):
            count = int((batch["labels"][:, 1:] != IGNORE).sum())
            loss = (
                network(**batch).loss_sum if own else network(**batch, use_cache=False).loss * count
            )
        (loss / supervised).backward()
        total += loss.detach()

    # Update the weights.
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found = float(total / supervised)  # waits for the device too
    del optimizer
    gc.collect()
    return found


def _batch(
    rows: Sequence[Row], processor: Any, device: torch.device, own: bool
) -> dict[str, Tensor]:
    batch = collate(rows, processor)
    if not own:
        lengths = torch.tensor([len(row) for row in rows])
        batch["attention_mask"] = (
            torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
        ).long()
        del batch["position_ids"], batch["spans"], batch["supervised"]
    return to_device(batch, device)


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="mipha-3b")
    parser.add_argument("--samples", type=int, default=16, help="number of samples in a step")
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument(
        "--frozen-tower",
        action="store_true",
        help="freeze the tower; default: all three parts train, as in the paper's stage 2",
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="dense bfloat16 peak of the GPU; default: known for H100, H200 and A100",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))

    started = time.perf_counter()
    measure(parser.parse_args())
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
