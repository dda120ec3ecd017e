"""One engine in a process of its own, so that its peak of memory is its own: it loads, reads a picture with a question, and writes.

    python benchmarks/inference_worker.py TASK.json RESULT.json

Started by `inference.py`. The clock is the same for all engines: it stands around the call, and hears of every token as it comes.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Pair = tuple[str, str]
"""A picture's path, and a question."""

PLAIN = "Is this a question?"
"""Asked without a picture: first without a clock, for weights that lie in a file are read from it when they are first used."""


@dataclass(frozen=True)
class Found:
    """What one process measured.

    Args:
        load_seconds: From nothing to an engine that can be asked; the files lie in the system's cache.
        first_token_seconds: For each question: from a path and a text to the first token of the answer.
        tokens_per_second: For each question: of those after the first.
        plain_tokens_per_second: The same behind a few words alone, where hardly any keys and values are read beside the weights.
        prompt_tokens: Of the first question, its picture's included.
        prompt_flop: Of matrix products over that prompt, attention's own left out; null where the engine does not know.
        prompt_cache_bytes: Keys and values of that prompt in 16 bits; null where the engine does not know.
        weight_bytes: Read for every token that is written: all of the language model but its table of words.
        peak_gib: Most memory held while it was timed, mapped files included.
        texts: What was written while it was timed, beyond the ends of turns.
        answers: To the same questions, ended where the model ends them; empty where none were asked for.
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
    """The project's own assistant."""
    import torch

    torch.set_num_threads(task["threads"])
    from mipha.assistant import load
    from mipha.data.sample import IMAGE, Message

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

        def told(_: list[int | None]) -> tuple[()]:
            times.append(time.perf_counter())
            return ()

        begun = time.perf_counter()
        prompt = assistant.prompt([Message("user", text)], images, max_new_tokens=num_tokens)
        (answer,) = assistant.generate([prompt], told)
        if pair:
            prompt_tokens.append(len(prompt.ids))
        return [at - begun for at in times], answer.text

    # As `ignore_eos` of llama.cpp: ends of turns are never the likeliest, so that all write as many tokens.
    generation.eos_token_id, generation.suppress_tokens, assistant.end_tokens = (
        None,
        sorted(ends),
        set(),
    )
    first, rates, plain, texts = _timed(write, task)
    peak = peak_memory_gib()
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
        prompt_cache_bytes=_cache_bytes(assistant.model, prompt_tokens[0]),
        weight_bytes=_weight_bytes(assistant.model),
        peak_gib=peak,
        texts=texts,
        answers=answers,
    )


def llama_cpp_engine(task: dict[str, Any]) -> Found:
    """llama.cpp's own server, in this process."""
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

        def told(event: dict[str, Any]) -> bool:
            now = time.perf_counter() - begun
            assert "error" not in event, event
            if "timings" in event:
                # Bytes that are no whole letter are held back, so an event may tell of several tokens.
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
            runtime._request(*(pair or (None, PLAIN))) | options, told
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
    """What the machine can do at best, with as many threads: GB/s read from a large array, GFLOP/s of large products."""
    import torch

    torch.set_num_threads(task["threads"])
    array = torch.ones(task["limit_bytes"] // 4)
    found = {"read": array.nbytes / 1e9 / _seconds(array.amax)}
    del array
    # The shape of a prompt's tokens going through Phi-2's MLP, or less where less memory is read.
    rows, inner, outer = (1024, 2560, 10240) if task["limit_bytes"] >= 2**28 else (128, 256, 1024)
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
        seconds = _seconds(lambda left=left, right=right: torch.nn.functional.linear(left, right))
        found[str(dtype).removeprefix("torch.")] = 2 * rows * inner * outer / 1e9 / seconds
    return found


def peak_memory_gib() -> float:
    """The most memory that this process held.

    On Linux `ru_maxrss` may be that of the process which started this one: it is kept when a program takes another's place.
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
    """Seconds to the first token, tokens a second after it, the same without a picture, and the texts."""
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
    """Tokens a second; what came together with the first token was not waited for."""
    assert len(times) == task["num_tokens"], f"{len(times)} tokens of {task['num_tokens']}"
    return sum(at > times[0] for at in times) / (times[-1] - times[0])


def _prompt_flop(model: Any, num_tokens: int) -> float:
    """Two for each weight of a matrix and each token that goes through it."""
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


def _cache_bytes(model: Any, num_tokens: int) -> int:
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * 2 * text.num_hidden_layers * heads * head_dim * num_tokens


def _weight_bytes(model: Any) -> int:
    from mipha.models.modeling import parts

    read = {
        id(weight): weight for part in parts(model).language_model for weight in part.parameters()
    }
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(weight.nbytes for weight in read.values()) - (
        words.nbytes if words is not head else 0
    )


def _gguf_weight_bytes(path: Path) -> int:
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:  # else the table of words is the head
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def _seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median, after one call that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def main() -> None:
    """Do the task; the result is written to a file, for engines write to the terminal."""
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
