"""Checks of the GPU path: one command, below ten minutes, offline, with random weights.

    python benchmarks/gpu.py [--only kernels,tiny] [--out benchmarks/results/gpu] [--seconds 540]

Each check is a process of its own with its share of the time, and writes OUT/<check>.json when it
ends; `OUT/gpu.json` has them all. The command exits 1 if a check failed, 3 if time ran out before
the last. Without CUDA the same checks run at a small size on the CPU, which tests this program and
says nothing about a GPU.

    environment   device, versions, peak of a large product
    kernels       flex, varlen, segments against float32; a sample changes no bit of another
    loss          supervised cross entropy against all logits
    tiny          two stages of a tiny model: losses of the device against those of a CPU
    resume        a run that was stopped and resumed against one that was not
    fsdp          three steps with FSDP2 and one process against three without
    evaluation    questions about shared images, asked together against one at a time
    stage1,stage2 speed at the shape of Mipha-3B: samples/s, MFU, peak memory, each lever alone
    generation    time to the first token and tokens/s behind a prompt of one image
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mipha.errors import require_version
from mipha.files import describe_file, read_lines, write_whole
from mipha.run import provenance

SCHEMA = 1
SECONDS = {
    "environment": 30,
    "kernels": 120,
    "loss": 30,
    "tiny": 120,
    "resume": 120,
    "fsdp": 40,
    "evaluation": 60,
    "stage2": 240,
    "stage1": 90,
    "generation": 90,
}
"""The checks in their order, and the most seconds of each."""

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


class Findings:
    """What a check finds: values with their limits, speeds, and what was skipped."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []
        self.speed: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.facts: dict[str, Any] = {}

    def limit(self, name: str, value: float, limit: float) -> None:
        """Record a value that must not pass its limit."""
        ok = bool(np.isfinite(value) and value <= limit)
        self.checks.append({"name": name, "ok": ok, "value": value, "limit": limit})
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {value:.3g} (limit {limit:.3g})", flush=True)

    def record(self, name: str, **values: Any) -> None:
        """Record a speed."""
        self.speed.append({"name": name, **values})
        print(f"     {name}: {json.dumps(values)}", flush=True)


# ---- Environment -----------------------------------------------------------------------------


def environment(found: Findings) -> None:
    """Record device and versions, and what a large product of matrices reaches."""
    import peft
    import transformers

    require_version("transformers", "5.23.0")
    found.facts["versions"] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    if not ON_GPU:
        found.facts["device"] = {"name": "CPU", "threads": torch.get_num_threads()}
        return

    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    side = 8192
    left, right = torch.randn(2, side, side, device=DEVICE, dtype=torch.bfloat16)
    seconds = _time(lambda: left @ right, repeats=10)
    found.facts["device"] = {
        "name": torch.cuda.get_device_name(),
        "memory_gib": round(memory, 1),
        "gemm_8192_tflops": round(2 * side**3 / seconds / 1e12, 1),
        "clocks": _clocks(),
    }


def _clocks() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw"]
    try:
        return subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def _time(call: Callable[[], Any], repeats: int = 5, warmup: int = 3) -> float:
    """Return the median seconds of a call on the device."""
    seconds = []
    for number in range(warmup + repeats):
        _wait()
        started = time.perf_counter()
        call()
        _wait()
        if number >= warmup:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


# ---- Kernels ---------------------------------------------------------------------------------


def kernels(found: Findings) -> None:
    """Compare each attention of packed rows with a float32 reference on the CPU."""
    random = np.random.default_rng(0)
    sizes = [(64, 4), (72, 4), (80, 4), (96, 4), (128, 2)] if ON_GPU else [(16, 4), (20, 2)]
    for head_dim, num_shared in sizes:
        spans = [_draw_spans(random, 2048 if ON_GPU else 300) for _ in range(2)]
        for name in ("segments", "flex", "varlen"):
            for dtype in (torch.float32, torch.bfloat16):
                if name == "varlen" and (dtype is torch.float32 or not ON_GPU):
                    continue
                label = f"{name}/h{head_dim}/{str(dtype).removeprefix('torch.')}"
                try:
                    _compare_kernel(found, label, name, spans, head_dim, num_shared, dtype)
                except Exception as error:  # a head size that a kernel refuses is a finding
                    found.checks.append({"name": label, "ok": False, "error": repr(error)[:500]})
                    print(f"FAIL {label}: {error!r:.200}", flush=True)
    if not ON_GPU:
        found.skipped.append("varlen, and flex backward: they need CUDA")


def _draw_spans(random: np.random.Generator, num_tokens: int) -> list[tuple[bool, int]]:
    """Draw groups of a prefix and up to four branches, nearly filling a row."""
    spans: list[tuple[bool, int]] = []
    left = num_tokens - int(random.integers(1, 40))
    while left > 0:
        for number in range(1 + int(random.integers(0, 5))):
            tokens = min(left, int(random.integers(1, num_tokens // 3)))
            if tokens:
                spans.append((number > 0, tokens))
            left -= tokens
    return spans


def _compare_kernel(
    found: Findings,
    label: str,
    name: str,
    spans: list[list[tuple[bool, int]]],
    head_dim: int,
    num_shared: int,
    dtype: torch.dtype,
) -> None:
    from mipha.models.attention import Segments, attend, dense_mask
    from mipha.models.attention_kernels import describe_flex, describe_varlen

    heads, num_tokens = 4, max(sum(tokens for _, tokens in row) for row in spans) + 7
    torch.manual_seed(0)
    shapes = [(2, number, num_tokens, head_dim) for number in (heads, num_shared, num_shared)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    out_gradient = torch.randn(2, num_tokens, heads, head_dim).to(dtype)
    backward = ON_GPU or name != "flex"
    module = nn.Module().train()
    module.num_key_value_groups = heads // num_shared

    def run(description: Any, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(device, dtype).requires_grad_(backward) for tensor in inputs]
        out, _ = attend(module, *leaves, description)
        if backward:
            out.backward(out_gradient.to(device, dtype))
        gradients = [leaf.grad for leaf in leaves] if backward else []
        real = torch.zeros(out.shape[:2], dtype=torch.bool)  # padding may answer anything
        for row, own in enumerate(spans):
            real[row, : sum(tokens for _, tokens in own)] = True
        return [out[real.to(device)].detach().float().cpu(), *(g.float().cpu() for g in gradients)]

    # Gradients of the padding are part of the reference, so it gets none.
    for row, own in enumerate(spans):
        out_gradient[row, sum(tokens for _, tokens in own) :] = 0

    mask = dense_mask(spans, num_tokens)
    wanted = run(mask, torch.device("cpu"), torch.float32)
    describe = {"flex": describe_flex, "varlen": describe_varlen}.get(name)
    description = describe(spans, (2, num_tokens), DEVICE) if describe else Segments(spans)
    measured = run(description, DEVICE, dtype)

    # In bfloat16 the measure is plain attention with the same inputs, also rounded.
    plain = run(mask.to(DEVICE, dtype), DEVICE, dtype) if dtype is torch.bfloat16 else wanted
    parts = ("out", "dQ", "dK", "dV")[: len(wanted)]
    for part, value, reference, rounded in zip(parts, measured, wanted, plain, strict=True):
        floor = 2e-5 if dtype is torch.float32 else 1e-3
        limit = max(3 * float((rounded - reference).abs().max()), floor)
        found.limit(f"{label}/{part}", float((value - reference).abs().max()), limit)

    # Other content of the first group changes no bit of what stands behind it.
    first = _first_group(spans[0])
    behind = sum(tokens for _, tokens in spans[0]) - first
    if behind:
        for tensor in inputs:
            tensor[0, :, :first] = torch.randn_like(tensor[0, :, :first])
        changed = run(description, DEVICE, dtype)
        same = torch.equal(changed[0][first : first + behind], measured[0][first : first + behind])
        found.limit(f"{label}/leak", float(not same), 0.0)


def _first_group(spans: list[tuple[bool, int]]) -> int:
    """Return the tokens of the first prefix and its branches."""
    total = 0
    for number, (is_branch, tokens) in enumerate(spans):
        if number and not is_branch:
            break
        total += tokens
    return total


# ---- Loss ------------------------------------------------------------------------------------


def loss(found: Findings) -> None:
    """Compare the loss over supervised positions with one over all logits."""
    from mipha.labels import IGNORE
    from mipha.models.loss import supervised_cross_entropy

    torch.manual_seed(0)
    width, vocabulary = (2560, 51200) if ON_GPU else (32, 500)
    head = nn.Linear(width, vocabulary).to(DEVICE)
    hidden = torch.randn(2, 600, width, device=DEVICE)
    labels = torch.randint(0, vocabulary, (2, 600), device=DEVICE)
    labels[torch.rand(labels.shape, device=DEVICE) < 0.7] = IGNORE
    wanted = F.cross_entropy(
        head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-3)):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is torch.bfloat16):
            value, _ = supervised_cross_entropy(hidden, labels, head)
        found.limit(f"loss/{dtype}", float(((value - wanted).abs() / wanted).detach()), limit)


# ---- Whole trainings -------------------------------------------------------------------------


def tiny(found: Findings) -> None:
    """Train a tiny model through two stages on the device and on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        recipe = _write_tiny(place)
        on_cpu = _train(place / "cpu", recipe, CUDA_VISIBLE_DEVICES="")
        on_device = _train(place / "device", recipe)
        rounded = _train(place / "bf16", recipe, "precision=bfloat16")
    for stage, losses in on_cpu.items():
        apart = [abs(a - b) / a for a, b in zip(losses, on_device[stage], strict=True)]
        found.limit(f"tiny/{stage}/first", apart[0], 1e-5)
        found.limit(f"tiny/{stage}/last", apart[-1], 1e-3)
        apart = [abs(a - b) / a for a, b in zip(losses, rounded[stage], strict=True)]
        found.limit(f"tiny/{stage}/bfloat16", max(apart), 2e-2)


def resume(found: Findings) -> None:
    """Compare a run that was stopped in the middle and resumed with one that was not."""
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "MIPHA_BENCHMARK_DETERMINISTIC": "1"}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        recipe = _write_tiny(place)
        _train(place / "whole", recipe, **environment)
        _train(place / "again", recipe, **environment)
        _train(place / "stopped", recipe, stop_after=5, **environment)
        _train(place / "stopped", recipe, **environment)
        weights = {
            name: describe_file(place / name / "finetune" / "checkpoint" / "model.safetensors")
            for name in ("whole", "again", "stopped")
        }
    found.limit("resume/same run twice", float(weights["whole"] != weights["again"]), 0.0)
    found.limit("resume/stopped", float(weights["whole"] != weights["stopped"]), 0.0)


def fsdp(found: Findings) -> None:
    """Compare three steps with FSDP2 and one process with three steps without."""
    import torch.distributed as dist
    from full_size import draw_samples, random_model
    from torch.distributed.tensor import DTensor

    from mipha.training.placement import mesh_of, shard
    from mipha.world import World

    backend = "nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    trained: list[dict[str, Tensor]] = []
    for is_sharded in (False, True):
        model = random_model("small", DEVICE, frozen_tower=False)
        if is_sharded:
            shard(model, mesh_of("fsdp", World(0, 1, DEVICE)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        batches = list(_batches(model, draw_samples(model.config, 4), 2048, ()))
        for _ in range(3):
            for batch in batches:
                with torch.autocast(DEVICE.type, torch.bfloat16):
                    model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        trained.append(
            {
                name: weight.full_tensor() if isinstance(weight, DTensor) else weight
                for name, weight in model.named_parameters()
            }
        )
    dist.destroy_process_group()

    plain, sharded = trained
    apart = [name for name in plain if not torch.equal(plain[name], sharded[name])]
    found.limit("fsdp/tensors that differ", float(len(apart)), 0.0)


def evaluation(found: Findings) -> None:
    """Compare answers to questions that share images with those to each question alone."""
    from workloads import Workload, small_parts

    from mipha.assistant import Assistant
    from mipha.models.build import build

    side, width, depth, num_images = (384, 512, 12, 32) if ON_GPU else (56, 64, 2, 2)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        workload = Workload("evaluation", image_size=side)
        model, processor = build(small_parts(Path(folder), workload, width, depth))
    assistant = Assistant(model.to(DEVICE).eval(), processor)
    shapes = random.integers(0, 256, (num_images, side, side, 3), dtype=np.uint8)
    pairs = [
        (Image.fromarray(pixels), f"Question {number}: what is in the picture? One word.")
        for pixels in shapes
        for number in range(8)
    ]

    answers: dict[str, list[str]] = {}

    def ask(way: str, pairs_of_calls: list[list[Any]]) -> None:
        given = [assistant.answer_many(some, max_new_tokens=4) for some in pairs_of_calls]
        answers[way] = [answer.text for some in given for answer in some]

    for way, calls in {"together": [pairs], "alone": [[pair] for pair in pairs]}.items():
        seconds = _time(lambda way=way, calls=calls: ask(way, calls), repeats=1, warmup=1)
        found.record(f"evaluation/{way}", questions_per_second=round(len(pairs) / seconds, 1))
    apart = sum(a != b for a, b in zip(answers["together"], answers["alone"], strict=True))
    found.limit("evaluation/answers that differ", float(apart), 0.0)


def _write_tiny(folder: Path) -> Path:
    """Write parts, samples and the recipe of a tiny run of two stages of 10 steps."""
    from workloads import Workload, small_parts, stage_recipe, write_samples

    from mipha.recipe import Recipe

    workload = Workload("tiny", image_size=56, questions=2, batch_size=4, row_tokens=512)
    parts = small_parts(folder / "parts", workload, width=64, depth=2)
    file = write_samples(folder / "samples", workload, 40)
    stages = {
        name: stage_recipe(file, workload, name, "shared-image", checkpoint_every=3)
        for name in ("pretrain", "finetune")
    }
    recipe = Recipe(name="tiny", precision="float32", model=parts, stages=stages)
    path = folder / "recipe.yaml"
    path.write_text(recipe.dump(), encoding="utf-8")
    return path


def _train(
    folder: Path, recipe: Path, *overrides: str, stop_after: int = 0, **environment: str
) -> dict[str, list[float]]:
    """Train in a process of its own, and return the losses of each stage."""
    command = [sys.executable, __file__, "--train", str(recipe), str(folder), *overrides]
    stop = {"MIPHA_BENCHMARK_STOP": str(stop_after)} if stop_after else {}
    done = subprocess.run(
        command, env=os.environ | environment | stop, capture_output=True, text=True
    )
    if done.returncode and not stop_after:
        raise RuntimeError(f"training failed: {done.stderr[-2000:]}")
    return {
        stage: [row["loss"] for row in read_lines(folder / stage / "metrics.jsonl")]
        for stage in ("pretrain", "finetune")
        if (folder / stage / "metrics.jsonl").is_file()
    }


def _train_here(recipe: str, folder: str, overrides: list[str]) -> None:
    """Train in this process; the environment says whether deterministically, and when to stop."""
    import mipha

    if os.environ.get("MIPHA_BENCHMARK_DETERMINISTIC"):
        torch.use_deterministic_algorithms(True)
    if stop := int(os.environ.get("MIPHA_BENCHMARK_STOP", "0")):
        metrics = Path(folder) / "finetune" / "metrics.jsonl"

        def stop_later() -> None:
            while not metrics.is_file() or len(read_lines(metrics)) < stop:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=stop_later, daemon=True).start()
    mipha.train(mipha.load_recipe(recipe).override(*overrides), folder)


# ---- Speed -----------------------------------------------------------------------------------

LEVERS: dict[str, dict[str, Any]] = {
    "segments": {"attention": "segments"},
    "flex": {"attention": "flex"},
    "varlen": {"attention": "varlen"},
    "flex, compiled": {"attention": "flex", "compile": True},
    "varlen, compiled": {"attention": "varlen", "compile": True},
}


def stage2(found: Findings) -> None:
    """Measure stage 2 with each lever."""
    _measure_stage(found, "stage2", LEVERS if ON_GPU else {"segments": {}})


def stage1(found: Findings) -> None:
    """Measure stage 1, in which the projector alone trains."""
    _measure_stage(found, "stage1", {"flex, compiled": LEVERS["flex, compiled"]} if ON_GPU else {})


def _measure_stage(found: Findings, stage: str, levers: dict[str, dict[str, Any]]) -> None:
    from full_size import PEAK_TFLOPS, draw_samples, random_model, work_of

    from mipha.models.attention import choose_attention, use_attention
    from mipha.models.attention_kernels import row_lengths
    from mipha.models.flops import StepFlops
    from mipha.models.tuning import apply_tuning, layers_of
    from mipha.recipe import TuningRecipe

    size, row_tokens = ("mipha-3b", 8192) if ON_GPU else ("small", 2048)
    peak = PEAK_TFLOPS.get(torch.cuda.get_device_name()) if ON_GPU else None
    model = random_model(size, DEVICE, frozen_tower=stage == "stage1")
    if stage == "stage1":
        tuning = TuningRecipe(vision_tower="frozen", projector="full", language_model="frozen")
        apply_tuning(model, tuning, DEVICE)
    samples = draw_samples(model.config, 32 if ON_GPU else 4)
    work = work_of(samples)
    flops = StepFlops(model).total(work)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)

    for name, lever in levers.items():
        try:
            attention = choose_attention(lever.get("attention", "auto"), DEVICE, torch.bfloat16)
            model.set_attn_implementation({"text_config": "sdpa"})
            use_attention(model, attention)
            if lever.get("compile"):
                for layer in layers_of(model):
                    layer.compile(dynamic=False)
            lengths = row_lengths(row_tokens) if name != "segments" else ()
            batches = list(_batches(model, samples, row_tokens, lengths))
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
            seconds = _time(lambda batches=batches: _step(model, optimizer, batches, work))
        except Exception as error:  # a lever that fails does not end the others
            found.checks.append(
                {"name": f"{stage}/{name}", "ok": False, "error": repr(error)[:500]}
            )
            print(f"FAIL {stage}/{name}: {error!r:.300}", flush=True)
            continue
        rate = flops / seconds
        found.record(
            f"{stage}/{name}",
            samples_per_second=round(len(samples) / seconds, 2),
            tokens_per_second=round(work.tokens / seconds),
            mfu=round(rate / (peak * 1e12), 4) if peak else None,
            padding=round(1 - work.tokens / sum(b["input_ids"].numel() for b in batches), 4),
            peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1) if ON_GPU else None,
        )


def _batches(
    model: nn.Module, samples: list[Any], row_tokens: int, lengths: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Yield micro-batches on the device, with pixels of noise: zeros would be too fast."""
    from full_size import _Processor

    from mipha.data.collate import collate, to_device
    from mipha.data.packing import make_rows

    for row in make_rows(samples, row_tokens, "packed"):
        batch = to_device(collate([row], _Processor(model.config), None, lengths), DEVICE)
        if "pixel_values" in batch:
            batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
        yield batch


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict[str, Any]], work: Any
) -> None:
    """Take one optimizer step of rate zero, which does all of the work."""
    for batch in batches:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            (model(**batch).loss_sum / work.supervised).backward()
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def generation(found: Findings) -> None:
    """Measure the first token and the tokens behind it, for 1 and 16 questions at a time."""
    from full_size import random_model

    model = random_model("mipha-3b" if ON_GPU else "small", DEVICE, frozen_tower=True)
    model = model.to(torch.bfloat16).eval()
    config = model.config
    side, new_tokens = config.vision_config.image_size, 64 if ON_GPU else 4
    for number in (1, 16) if ON_GPU else (2,):
        ids = torch.randint(5, 500, (number, config.image_seq_length + 60), device=DEVICE)
        ids[:, : config.image_seq_length] = config.image_token_id
        pixels = torch.randn(number, 3, side, side, device=DEVICE, dtype=torch.bfloat16)

        def answer(tokens: int, ids: Tensor = ids, pixels: Tensor = pixels) -> None:
            with torch.inference_mode():
                model.generate(
                    input_ids=ids,
                    pixel_values=pixels,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=0,
                )

        first = _time(lambda: answer(1), repeats=3, warmup=1)
        whole = _time(lambda: answer(new_tokens), repeats=3, warmup=1)
        found.record(
            f"generation/{number}",
            first_token_seconds=round(first, 4),
            tokens_per_second=round(number * (new_tokens - 1) / max(whole - first, 1e-9), 1),
        )


# ---- The command -----------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Findings], None]] = {
    name: globals()[name]
    for name in SECONDS  # each check is a function of that name
}


def run_check(name: str, out: Path) -> None:
    """Run one check in this process, and write its file."""
    found, started = Findings(), time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        CHECKS[name](found)
    except Exception as error:  # the file says what failed
        found.checks.append({"name": name, "ok": False, "error": repr(error)[:2000]})
        print(f"FAIL {name}: {error!r:.500}", flush=True)
    content = vars(found) | {"seconds": round(time.perf_counter() - started, 1)}
    write_whole(out / f"{name}.json", json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Run the checks one after another, each in a process, and write the whole."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="names of checks, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--seconds", type=float, default=540, help="time for all checks")
    parser.add_argument("--check", choices=list(SECONDS), help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return _train_here(options.train[0], options.train[1], options.train[2:])
    if options.check:
        return run_check(options.check, options.out)

    names = options.only.split(",") if options.only else list(SECONDS)
    if unknown := [name for name in names if name not in SECONDS]:
        raise SystemExit(f"no check {unknown[0]!r}: choose from {', '.join(SECONDS)}")
    if not ON_GPU:
        print("no CUDA GPU: the checks run small on the CPU, and say nothing about a GPU")
    sys.exit(_run_all(names, options.out, options.seconds))


def _run_all(names: list[str], out: Path, seconds: float) -> int:
    whole: dict[str, Any] = {"schema": SCHEMA, "about": provenance()}
    whole |= {"checks": [], "speed": [], "skipped": [], "seconds": {}}
    started, out_of_time = time.perf_counter(), False
    for name in names:
        left = seconds - (time.perf_counter() - started)
        if left < 5:
            whole["skipped"].append(f"{name}: no time left")
            out_of_time = True
            continue

        # A check that hangs or crashes the driver ends alone.
        (out / f"{name}.json").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--check", name, "--out", str(out)]
        try:
            limit = min(left, SECONDS[name]) if ON_GPU else left
            subprocess.run(command, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            whole["checks"].append({"name": name, "ok": False, "error": "ran past its time"})
        if (out / f"{name}.json").is_file():
            part = json.loads((out / f"{name}.json").read_text())
            whole |= part["facts"]
            for key in ("checks", "speed", "skipped"):
                whole[key] += part[key]
            whole["seconds"][name] = part["seconds"]
        elif not any(check["name"] == name for check in whole["checks"]):
            whole["checks"].append({"name": name, "ok": False, "error": "ended without a result"})
        write_whole(out / "gpu.json", json.dumps(whole, indent=1) + "\n")

    failed = [check["name"] for check in whole["checks"] if not check["ok"]]
    print(f"{len(whole['checks']) - len(failed)} values within limits, {len(failed)} not: {failed}")
    return 1 if failed else 3 if out_of_time else 0


if __name__ == "__main__":
    main()
