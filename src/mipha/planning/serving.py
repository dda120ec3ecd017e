"""Prediction of what an answer takes on this machine's CPU, for a model of any size.

shapes --some layers of each part, random weights--> timed at two depths --one more layer's time,
times the layers left out--> seconds to the first token, tokens a second

Nothing is assumed: the layers run on the threads that answers would run on. A model that is not
larger than `_MEASURED_BYTES` is timed whole. Beside the prediction stands what the processor could
do at best: the FLOPs of the prompt at the speed of large matrix products, and the weights of a
token at the speed of reading.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from mipha.engine.machine import measure_flops, measure_reading, median_seconds
from mipha.models.flops import StepFlops, Work
from mipha.models.memory import tower_output
from mipha.models.modeling import MODELS, LlavaForConditionalGeneration, parts, tile_tokens
from mipha.terminal import Console

TEXT_TOKENS = 32
"""Tokens of the question and the template in a prompt."""

FEWER = (196, 81, 64)
"""Tokens of an image of 384 pixels in patches of 14, pooled or shuffled; 729 is whole."""

_MEASURED_BYTES = 1.2e9
"""Weights that are made and timed; much more than a processor's caches hold."""

_PARTS = ("vision_config", "text_config")
_WRITTEN = 8
"""Tokens that are written to time one."""


@dataclass(frozen=True)
class AnswerPlan:
    """What one answer takes behind one image.

    Args:
        image_tokens: Tokens of the image.
        first_token: Seconds from the pixels to the first token.
        at_best: The same at the speed of large matrix products.
        tokens_per_second: Rate of the tokens after it.
        rate_at_best: The same at the speed of reading.
    """

    image_tokens: int
    first_token: float
    at_best: float
    tokens_per_second: float
    rate_at_best: float


@dataclass(frozen=True)
class ServingPlan:
    """What answers take on this machine.

    Args:
        dtype: Type of weights and computation.
        threads: Threads that torch computes with.
        tower: Seconds that the tower and the projector take of every first token.
        memory: Bytes of the weights.
        answers: One for each number of image tokens, the most first.
    """

    dtype: torch.dtype
    threads: int
    tower: float
    memory: float
    answers: tuple[AnswerPlan, ...]

    def fewest_changes(self, seconds: float) -> str:
        """Return what to change so that the first token comes within some seconds."""
        own, *fewer = self.answers
        if own.first_token <= seconds:
            return f"the first token comes within {seconds:g} s as it is"
        if fitting := [answer for answer in fewer if answer.first_token <= seconds]:
            most = max(answer.image_tokens for answer in fitting)
            return (
                f"for a first token within {seconds:g} s: {most} image tokens in place of "
                f"{own.image_tokens} (a smaller image_size, or model.shuffle)"
            )
        if self.tower > seconds:
            return (
                f"the vision tower alone takes {self.tower:.2g} s, more than {seconds:g} s: a "
                "smaller image_size or tower, or more threads"
            )
        return (
            f"no number of image tokens tried is enough for {seconds:g} s: a smaller language "
            "model, bfloat16 where the processor has it, or more threads"
        )


def plan_serving(
    model: LlavaForConditionalGeneration,
    dtype: torch.dtype,
    image_tokens: Sequence[int] | None = None,
) -> ServingPlan:
    """Predict the time of answers.

    Args:
        model: Model on the meta device.
        dtype: Type of weights and computation.
        image_tokens: Other numbers of tokens of an image, beside the model's own; the tower's work
            is taken as the same. None: those of `FEWER` that are below it.
    """
    config = model.config
    own = tile_tokens(config)[1]
    if image_tokens is None:
        image_tokens = [count for count in FEWER if count < own]
    counts = [own, *sorted(set(image_tokens) - {own}, reverse=True)]

    # The deep model is whole, or as deep as is affordable; the shallow one has a third of it.
    layers = {key: getattr(config, key).num_hidden_layers for key in _PARTS}
    whole = _num_bytes(model, dtype)
    share = min(1.0, _MEASURED_BYTES / whole)
    deep = {key: max(2, round(share * number)) for key, number in layers.items()}
    shallow = {key: max(1, number // 3) for key, number in deep.items()}
    times = [_time_answers(config, dtype, deep, counts)]
    if share < 1:
        times.append(_time_answers(config, dtype, shallow, counts))

    def whole_time(key: str, value: Callable[[_Times], float]) -> float:
        if len(times) == 1:
            return value(times[0])
        a_layer = (value(times[0]) - value(times[1])) / (deep[key] - shallow[key])
        return value(times[0]) + a_layer * (layers[key] - deep[key])

    # What would be possible.
    flops, speed, reading = StepFlops(model), measure_flops(dtype), measure_reading()
    read = read_bytes(model, dtype)

    tower = whole_time("vision_config", lambda time: time.tower)
    answers = []
    for place, count in enumerate(counts):
        tokens = count + TEXT_TOKENS
        prompt = whole_time("text_config", lambda time, place=place: time.prompts[place])
        token = whole_time("text_config", lambda time, place=place: time.tokens[place])
        work = Work(images=1, tokens=tokens, pairs=tokens * (tokens + 1) // 2, supervised=1)
        forward = sum(part.forward for part in flops.by_part(work).values())
        cache = cache_bytes(config, tokens, dtype)
        answers.append(
            AnswerPlan(count, tower + prompt, forward / speed, 1 / token, reading / (read + cache))
        )
    return ServingPlan(dtype, torch.get_num_threads(), tower, whole, tuple(answers))


@dataclass(frozen=True)
class _Times:
    """Median seconds of a model: of an image, and of a prompt and a token for each length."""

    tower: float
    prompts: list[float]
    tokens: list[float]


def _time_answers(
    config: PretrainedConfig, dtype: torch.dtype, depth: dict[str, int], counts: Sequence[int]
) -> _Times:
    """Time a model of fewer layers with random weights."""
    config = copy.deepcopy(config)
    for key, number in depth.items():
        part = getattr(config, key)
        part.num_hidden_layers = number
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:number]

    model = MODELS[config.model_type](config).to(dtype).eval()
    (projector,), (language_model, head) = parts(model).projector, parts(model).language_model

    with torch.inference_mode():
        tower = median_seconds(lambda: projector(tower_output(model, 1)))
        prompts, tokens = [], []
        for count in counts:
            hidden = torch.zeros(
                1, count + TEXT_TOKENS, config.text_config.hidden_size, dtype=dtype
            ).normal_()

            def read(hidden: Tensor = hidden) -> DynamicCache:
                cache = DynamicCache(config=config.text_config)
                out = language_model(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
                head(out.last_hidden_state[:, -1:])
                return cache

            def write(cache: DynamicCache, hidden: Tensor = hidden) -> None:
                for _ in range(_WRITTEN):
                    out = language_model(
                        inputs_embeds=hidden[:, :1], past_key_values=cache, use_cache=True
                    )
                    head(out.last_hidden_state).argmax()

            prompts.append(median_seconds(read))
            cache = read()
            tokens.append(median_seconds(lambda cache=cache: write(cache)) / _WRITTEN)
    return _Times(tower, prompts, tokens)


def _num_bytes(model: LlavaForConditionalGeneration, dtype: torch.dtype) -> float:
    return float(sum(weight.numel() for weight in model.parameters()) * dtype.itemsize)


def read_bytes(model: LlavaForConditionalGeneration, dtype: torch.dtype) -> float:
    """Return the bytes of the weights that a token passes; of embeddings, only a tied head's."""
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    read = {id(w): w for part in parts(model).language_model for w in part.parameters()}
    if words is not head:
        del read[id(words)]
    return float(sum(weight.numel() for weight in read.values()) * dtype.itemsize)


def cache_bytes(config: PretrainedConfig, tokens: int, dtype: torch.dtype) -> float:
    """Return the bytes of the keys and values of so many tokens."""
    text = config.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2.0 * text.num_hidden_layers * heads * width * tokens * dtype.itemsize


def print_serving_plan(name: str, plan: ServingPlan, wished: float | None) -> None:
    """Print the answers as a table, and what to change for a wished time to the first token."""
    console = Console()
    dtype = str(plan.dtype).removeprefix("torch.")
    title = f"{name} on this CPU, {plan.threads} thread{'s' * (plan.threads > 1)}, {dtype}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("image tokens", justify="right")
    for column in ("first token, s", "at best", "tokens/s", "at best"):
        table.add_column(column, justify="right")
    for answer in plan.answers:
        table.add_row(
            str(answer.image_tokens),
            f"{answer.first_token:.2f}",
            f"{answer.at_best:.2f}",
            f"{answer.tokens_per_second:.1f}",
            f"{answer.rate_at_best:.1f}",
        )
    console.print(table)
    console.print(
        f"weights {plan.memory / 1e9:.2f} GB; the tower takes {plan.tower:.2f} s of every first "
        f"token; {TEXT_TOKENS} tokens of text; transformers' engine"
    )
    if wished is not None:
        console.print(plan.fewest_changes(wished))
