"""One engine of `inference.py` in its own process, which keeps its peak of memory apart.

    python benchmarks/inference_worker.py TASK.json RESULT.json

It loads the engine, reads an image with a question, and writes an answer. All engines are timed in
the same way: from the call to each token, at the time when it arrives.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Pair = tuple[str, str]
"""Path of an image, and a question."""

PLAIN = "Is this a question?"
"""Question without an image.

The first time it is not timed, because an engine that maps a file reads weights at their first use.
"""


@dataclass(frozen=True)
class Found:
    """Figures of one process.

    Args:
        load_seconds: Seconds to load the engine; the files are in the system's cache.
        first_token_seconds: Seconds from a path and a text to the first token, for each question.
        tokens_per_second: Rate of the tokens after the first, for each question.
        plain_tokens_per_second: Same rate after a few words alone, where hardly any keys and values
            are read beside the weights.
        prompt_tokens: Number of tokens of the first question, its image's included.
        prompt_flop: FLOPs of that prompt's matrix products without attention's own; None where the
            engine does not know them.
        prompt_cache_bytes: Bytes of that prompt's keys and values in 16 bits; None where the engine
            does not know them.
        weight_bytes: Bytes that are read for each written token: the language model without its
            embeddings, which count only where they are the head too.
        peak_gib: Greatest memory during the timed part, mapped files included, GiB.
        texts: Texts of the timed part, which go on beyond the ends of turns.
        answers: Answers to the same questions that stop where the model stops; may be empty.
    """

    load_seconds: float
    first_token_seconds: list[float]
    tokens_per_second: list[float]
    plain_tokens_per_second: float
    prompt_tokens: int
    prompt_flop: float | None
    prompt_cache_bytes: int | None
    weight_bytes: int
    peak_gib: float
    texts: list[str]
    answers: list[str]


def transformers_engine(task: dict[str, Any]) -> Found:
    """Measure the project's own assistant."""
    import torch

    torch.set_num_threads(task["threads"])
    from mipha.assistant import load
    from mipha.data.sample import IMAGE, Message
    from mipha.planning.serving import cache_bytes, read_bytes

    # Load.
    started = time.perf_counter()
    assistant = load(task["checkpoint"], "cpu", getattr(torch, task["dtype"]))
    load_seconds = time.perf_counter() - started

    ends, generation = assistant.end_tokens, assistant.model.generation_config
    own_ends = generation.eos_token_id
    prompt_tokens: list[int] = []

    def write(pair: Pair | None, num_tokens: int) -> tuple[list[float], str]:
        images = [pair[0]] if pair else []
        text = f"{IMAGE}\n{pair[1]}" if pair else PLAIN
        times: list[float] = []

        def note_time(_: list[int | None]) -> tuple[()]:
            times.append(time.perf_counter())
            return ()

        begun = time.perf_counter()
        prompt = assistant.prompt([Message("user", text)], images, max_new_tokens=num_tokens)
        (answer,) = assistant.generate([prompt], note_time)
        if pair:
            prompt_tokens.append(len(prompt.ids))
        return [at - begun for at in times], answer.text

    # Suppress the ends of turns, as `ignore_eos` of llama.cpp does: all write as many tokens.
    generation.eos_token_id, generation.suppress_tokens, assistant.end_tokens = (
        None,
        sorted(ends),
        set(),
    )
    first, rates, plain, texts = _timed(write, task)
    peak = peak_memory_gib()

    # Answer again with the ends of turns.
    generation.eos_token_id, generation.suppress_tokens, assistant.end_tokens = own_ends, None, ends
    answers = [
        assistant.answer(*pair, max_new_tokens=task["answer_tokens"]).text
        for pair in task["questions"]
        if task["answer_tokens"]
    ]
    return Found(
        load_seconds=load_seconds,
        first_token_seconds=first,
        tokens_per_second=rates,
        plain_tokens_per_second=plain,
        prompt_tokens=prompt_tokens[0],
        prompt_flop=_prompt_flop(assistant.model, prompt_tokens[0]),
        prompt_cache_bytes=int(
            cache_bytes(assistant.model.config, prompt_tokens[0], torch.bfloat16)
        ),
        weight_bytes=int(read_bytes(assistant.model, assistant.model.dtype)),
        peak_gib=peak,
        texts=texts,
        answers=answers,
    )


def llama_cpp_engine(task: dict[str, Any]) -> Found:
    """Measure llama.cpp's own server, in this process."""
    from mipha.deploy.llama_cpp import LlamaCpp

    started = time.perf_counter()
    runtime = LlamaCpp(
        Path(task["model"]), Path(task["mmproj"]), threads=task["threads"], context=task["context"]
    )
    load_seconds = time.perf_counter() - started
    prompt_tokens: list[int] = []

    def write(pair: Pair | None, num_tokens: int) -> tuple[list[float], str]:
        times: list[float] = []
        pieces: list[str] = []

        def note_event(event: dict[str, Any]) -> bool:
            now = time.perf_counter() - begun
            assert "error" not in event, event
            if "timings" in event:
                # llama.cpp holds back part of a character, so one event may be several tokens.
                times.extend([now] * (event["timings"]["predicted_n"] - len(times)))
                prompt_tokens[:] = [event["timings"]["prompt_n"]]
            pieces.append(
                (event["choices"][0]["delta"].get("content") if event["choices"] else None) or ""
            )
            return False

        options = {
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "timings_per_token": True,
        }
        begun = time.perf_counter()
        runtime._server.handle_chat_completions(
            runtime._request(*(pair or (None, PLAIN))) | options, note_event
        )
        return times, "".join(pieces).strip()

    with runtime:
        first, rates, plain, texts = _timed(write, task)
        peak = peak_memory_gib()
        answers = [
            runtime.answer(*pair, task["answer_tokens"])
            for pair in task["questions"]
            if task["answer_tokens"]
        ]
    return Found(
        load_seconds=load_seconds,
        first_token_seconds=first,
        tokens_per_second=rates,
        plain_tokens_per_second=plain,
        prompt_tokens=prompt_tokens[0],
        prompt_flop=None,
        prompt_cache_bytes=None,
        weight_bytes=_gguf_weight_bytes(Path(task["model"])),
        peak_gib=peak,
        texts=texts,
        answers=answers,
    )


def limits(task: dict[str, Any]) -> dict[str, float]:
    """Measure the limits of the machine with this number of threads.

    Returns:
        `read`, the GB/s from a large array, and the GFLOP/s of large products by their type.
    """
    import torch

    from mipha.engine.machine import median_seconds

    torch.set_num_threads(task["threads"])
    array = torch.ones(task["limit_bytes"] // 4)
    found = {"read": array.nbytes / 1e9 / median_seconds(array.amax, 5)}
    del array

    # Take the shape of a prompt in Phi-2's MLP, or a smaller one where less memory is read.
    rows, inner, outer = (1024, 2560, 10240) if task["limit_bytes"] >= 2**28 else (128, 256, 1024)
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
        seconds = median_seconds(
            lambda left=left, right=right: torch.nn.functional.linear(left, right), 5
        )
        found[str(dtype).removeprefix("torch.")] = 2 * rows * inner * outer / 1e9 / seconds
    return found


def peak_memory_gib() -> float:
    """Return the greatest memory that this process held, GiB.

    On Linux `ru_maxrss` may be that of the process which started this one, because exec keeps it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**30 if sys.platform == "darwin" else 2**20
    )


def _timed(
    write: Callable[[Pair | None, int], tuple[list[float], str]], task: dict[str, Any]
) -> tuple[list[float], list[float], float, list[str]]:
    """Time the writing of each question's answer.

    Returns:
        Seconds to the first token, tokens a second after it, that rate without an image, and the
        texts.
    """
    write(None, 2)
    plain = _rate(write(None, task["num_tokens"])[0], task)
    found = [write(pair, task["num_tokens"]) for pair in task["questions"]]
    return (
        [times[0] for times, _ in found],
        [_rate(times, task) for times, _ in found],
        plain,
        [text for _, text in found],
    )


def _rate(times: list[float], task: dict[str, Any]) -> float:
    """Return the tokens a second; those that arrive together with the first do not count."""
    assert len(times) == task["num_tokens"], f"{len(times)} tokens of {task['num_tokens']}"
    return sum(at > times[0] for at in times) / (times[-1] - times[0])


def _prompt_flop(model: Any, num_tokens: int) -> float:
    """Count two FLOPs for each weight of a matrix and each token that it multiplies."""
    from torch import nn

    def weights(module: nn.Module) -> int:
        return sum(
            part.weight.numel()
            for part in module.modules()
            if isinstance(part, (nn.Linear, nn.Conv2d))
        )

    inner, image_tokens = model.model, model.config.image_seq_length
    seen = weights(inner.vision_tower) + weights(inner.multi_modal_projector)
    return 2.0 * (seen * image_tokens + weights(inner.language_model) * num_tokens)


def _gguf_weight_bytes(path: Path) -> int:
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:  # else the embeddings are the head
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def main() -> None:
    """Do the task, and write the result to a file, because engines write to the terminal."""
    task_file, result_file = map(Path, sys.argv[1:])
    task = json.loads(task_file.read_text())
    if task["engine"] == "limits":
        found = limits(task)
    else:
        found = asdict(
            {"transformers": transformers_engine, "llama.cpp": llama_cpp_engine}[task["engine"]](
                task
            )
        )
    result_file.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
