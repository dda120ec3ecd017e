"""The LLaVA classes of transformers with three additions.

They are the head's bias, a loss over supervised positions only, and packed rows whose samples do
not see one another. `geometry.py` says what an image becomes in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from mipha.checkpoint_files import read_checkpoint, read_headers, read_processor
from mipha.files import read_json_object
from mipha.geometry import read_geometry
from mipha.lookup import list_some
from mipha.models.attention import Spans, check_described, describe_rows
from mipha.models.checkpoint_folder import check_finite
from mipha.models.loss import supervised_cross_entropy

TOKEN_RULES = ("sequence_bias", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
"""Rules of a generation config on single tokens; Idefics, for one, forbids its image tokens so."""


@dataclass
class SupervisedOutput(LlavaCausalLMOutputWithPast):
    """Output of a forward pass with labels.

    Args:
        loss: Mean over the supervised tokens, nats.
        loss_sum: Sum over them, nats; a loop adds it up over micro-batches and processes.
        num_tokens: How many tokens were supervised.
    """

    loss_sum: Tensor | None = None
    num_tokens: Tensor | None = None


class _Trainable:
    """What each stock class gets: the head's bias, rows of isolated samples, and our loss.

    For Phi, the stock classes silently drop the bias. Our classes have the stock names and report
    that they are no custom code, because transformers chooses the key names of a checkpoint by
    these. So they read and write `language_model.model.layers.0...` like every LLaVA on the hub.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        if head_bias(config):
            self.lm_head = nn.Linear(
                config.text_config.hidden_size, config.text_config.vocab_size, bias=True
            )
            self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False, else transformers would rename only some weights when it saves."""
        return False

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Save as stock, with the hub's `vision_tower.vision_model.` keys of CLIP and SigLIP.

        vLLM asks for them. Transformers writes that prefix only where it has read it, and a model
        that was made of parts never had one.
        """
        self._weight_conversions = get_model_conversion_mapping(self, add_legacy=False)
        super().save_pretrained(save_directory, **options)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        spans: Spans | None = None,
        supervised: Tensor | None = None,
        **kwargs,
    ):
        """Run as the stock class; with `labels`, return the loss and no logits.

        The arguments are spelled out because `generate` reads this signature and silently drops
        all others.

        Args:
            input_ids: `(rows, tokens)`.
            pixel_values: `(tiles, 3, height, width)` in reading order, of a native image
                `(tiles, patches, 3 x patch x patch)`.
            attention_mask: `(rows, tokens)`, or `(rows, 1, tokens, tokens)` added to the scores.
            position_ids: `(rows, tokens)`.
            labels: `(rows, tokens)`, -100 where not trained on.
            spans: As `collate` makes them: which tokens see which, instead of `attention_mask`.
            supervised: `(positions,)`, as `collate` makes them: where the states stand that predict
                supervised tokens. None: they are searched.
            kwargs: What a class takes beside `pixel_values`, such as `image_sizes`.

        Raises:
            ValueError: A row holds several samples, and neither spans nor a mask of four axes say
                which tokens see which.
        """
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }

        # Without spans, refuse packed rows that no mask describes.
        if spans is None:
            in_full = attention_mask is not None and attention_mask.dim() == 4
            if position_ids is not None and past_key_values is None and not in_full:
                check_described(position_ids, attention_mask)
            return self._run(inputs, labels, supervised, past_key_values)

        # With spans, describe the rows to the attention.
        tokens = input_ids if input_ids is not None else inputs_embeds  # (rows, tokens[, width])
        attention = self.config.text_config._attn_implementation
        with describe_rows(spans, attention, tokens.shape[:2], tokens.device) as mask:
            inputs["attention_mask"] = mask
            return self._run(inputs, labels, supervised, past_key_values)

    def _run(
        self,
        inputs: dict[str, Any],
        labels: Tensor | None,
        supervised: Tensor | None,
        past_key_values: Cache | None,
    ) -> LlavaCausalLMOutputWithPast:
        if labels is None:
            return super().forward(past_key_values=past_key_values, **inputs)

        # A cache would switch off the isolation of packed samples; training never needs one.
        # `collate` has counted the images, on the host.
        with nullcontext() if supervised is None else _uncounted(self.model):
            hidden = self.model(**{**inputs, "use_cache": False}).last_hidden_state
        # hidden is (rows, tokens, width)
        loss_sum, num_tokens = supervised_cross_entropy(hidden, labels, self.lm_head, supervised)
        loss = loss_sum / num_tokens.clamp(min=1)
        return SupervisedOutput(loss=loss, loss_sum=loss_sum, num_tokens=num_tokens)


class LlavaForConditionalGeneration(_Trainable, transformers.LlavaForConditionalGeneration):
    """LLaVA, with images as squares, or as tiles that are images of their own."""


class LlavaNextForConditionalGeneration(_Trainable, transformers.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT: tiles as one grid, with a learned end of every row."""


class LlavaOnevisionForConditionalGeneration(
    _Trainable, transformers.LlavaOnevisionForConditionalGeneration
):
    """LLaVA-OneVision: the same with fewer tokens of a large grid."""


class Idefics3ForConditionalGeneration(_Trainable, transformers.Idefics3ForConditionalGeneration):
    """Idefics3: tiles with marks between them, several patches to a token."""

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Return features of `(tiles, 3, height, width)`; the stock class wants one axis more."""
        return super().get_image_features(_as_row(pixel_values), **kwargs)

    def _run(self, inputs: dict[str, Any], *rest: Any) -> Any:
        if inputs["pixel_values"] is not None:
            inputs = {**inputs, "pixel_values": _as_row(inputs["pixel_values"])}
        return super()._run(inputs, *rest)


class Lfm2VlForConditionalGeneration(_Trainable, transformers.Lfm2VlForConditionalGeneration):
    """LFM2-VL: images in their own shape, several patches to a token."""


MODELS: dict[str, type[PreTrainedModel]] = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
    "idefics3": Idefics3ForConditionalGeneration,
    "lfm2_vl": Lfm2VlForConditionalGeneration,
}
"""Our class of each `model_type`."""


@contextmanager
def _uncounted(inner: nn.Module) -> Iterator[None]:
    """Let a model take the placeholders of images as they are.

    The stock classes compare their number with the features in every forward pass, and the host
    waits for the answer. Idefics3 and LLaVA-OneVision find placeholders otherwise, and go on so.
    """

    if inner.config.model_type not in ("llava", "llava_next", "lfm2_vl"):
        yield
        return

    def placeholders(input_ids: Tensor, **others: Tensor) -> Tensor:
        return (input_ids == inner.config.image_token_id)[..., None]  # (rows, tokens, 1)

    inner.get_placeholder_mask = placeholders
    try:
        yield
    finally:
        del inner.get_placeholder_mask


def _as_row(pixels: Tensor) -> Tensor:
    """Return tiles as one row, `(1, tiles, 3, height, width)`, none of them of zeros alone.

    The stock class takes a tile of zeros for padding and leaves it out. Black is zero where a
    processor does not subtract a mean.
    """
    if pixels.dim() == 5:
        return pixels
    return pixels.masked_fill(pixels == 0, torch.finfo(pixels.dtype).tiny)[None]


def head_bias(config: PretrainedConfig) -> bool:
    """Return whether the language model's head has a bias.

    The checkpoint's config says so; the stock class of Phi always has one.
    """
    return bool(getattr(config.text_config, "lm_head_bias", config.text_config.model_type == "phi"))


@dataclass(frozen=True)
class Parts:
    """The three parts of a model, as the paper names them."""

    vision_tower: tuple[nn.Module, ...]
    projector: tuple[nn.Module, ...]
    language_model: tuple[nn.Module, ...]


def parts(model: LlavaForConditionalGeneration) -> Parts:
    """Return the modules of each part; the head belongs to the language model."""
    inner = model.model
    if isinstance(model, Idefics3ForConditionalGeneration):
        return Parts((inner.vision_model,), (inner.connector,), (inner.text_model, model.lm_head))
    return Parts(
        (inner.vision_tower,), (inner.multi_modal_projector,), (inner.language_model, model.lm_head)
    )


def tile_tokens(config: PretrainedConfig) -> tuple[int, int]:
    """Return the patches of a tile, and the tokens that the projector makes of it.

    A native image has no tile: one of the size that the tower's table of positions is for counts,
    rounded down to whole tokens.
    """
    vision = config.vision_config
    if config.model_type == "lfm2_vl":
        factor = config.downsample_factor
        tokens = max(1, math.isqrt(vision.num_patches) // factor)
        return (tokens * factor) ** 2, tokens**2
    side = vision.image_size // vision.patch_size
    if config.model_type == "idefics3":
        return side**2, (side // config.scale_factor) ** 2
    if config.model_type == "llava":
        return side**2, config.image_seq_length
    return side**2, side**2  # the grids of the others take the patches alone


def attention_window(config: PretrainedConfig) -> int | None:
    """Return the tokens that sliding layers see at a time; None where every layer sees all."""
    return getattr(config.text_config, "sliding_window", None)


def is_recurrent(config: PretrainedConfig) -> bool:
    """Return whether some layers carry a state from token to token, as LFM2's convolutions do.

    The state behind a token is not kept, so a cache cannot be cut back to it, and no mask keeps
    tokens of a row apart.
    """
    layers = DynamicCache(config=config.get_text_config()).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def load_model(
    folder: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """Load a saved checkpoint, complete or not at all; anybody may have made the folder.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: `read_checkpoint` refuses the folder, or `load_saved_model` does.
    """
    read_checkpoint(Path(folder))
    return load_saved_model(folder, device, dtype)


def load_saved_model(
    folder: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """Load the model of a folder that this program wrote, which may hold other files too.

    Raises:
        ValueError: Weights are missing, left over, of another shape or not finite: the folder is
            not the checkpoint that it says.
    """
    # Load the model, and collect the names of weights that do not fit.
    options = {
        "dtype": dtype,
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
        # Else transformers raises an error of its own for a wrong shape, in many sentences.
        "ignore_mismatched_sizes": True,
    }
    try:
        config = _read_config(Path(folder))
        model, info = MODELS[config.model_type].from_pretrained(folder, config=config, **options)
    except Exception as error:  # transformers answers a damaged config with any kind of exception
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{folder} cannot be loaded as a LLaVA: check its config.json and "
            f"generation_config.json ({reason})"
        ) from error

    # Refuse weights that do not fit, or are not numbers.
    reshaped = [name for name, *_ in info.get("mismatched_keys") or ()]
    unfit = {
        "missing": info.get("missing_keys"),
        "unexpected": info.get("unexpected_keys"),
        "of another shape": reshaped,
    }
    problems = [f"{kind}: {list_some(sorted(names))}" for kind, names in unfit.items() if names]
    if problems:
        raise ValueError(
            f"{folder}: the weights do not fit the model that its config.json describes "
            f"({'; '.join(problems)}): give config and weights of one checkpoint"
        )
    check_finite(model.named_parameters(), folder)

    # Keep the special tokens, and tokens that the model should not write: they belong to it. Beams,
    # penalties and the like of a stranger would change how answers are made.
    tokens = model.generation_config
    rules = {rule: getattr(tokens, rule, None) for rule in TOKEN_RULES}
    rules = {rule: value for rule, value in rules.items() if value is not None}
    _check_token_rules(rules, model.config.text_config.vocab_size, folder)
    model.generation_config = GenerationConfig(
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        bos_token_id=tokens.bos_token_id,
        do_sample=False,
        **rules,
    )
    return model.to(device).eval()


def model_skeleton(folder: Path) -> LlavaForConditionalGeneration:
    """Return the model of a checkpoint on the meta device: its size and keys, no weights."""
    with torch.device("meta"):
        config = _read_config(folder)
        return MODELS[config.model_type](config).eval()


def _read_config(folder: Path) -> PretrainedConfig:
    """Read a checkpoint's config, and add what others leave to the weights and the processor."""
    written = read_json_object(folder / "config.json")
    if written.get("model_type") not in MODELS:
        raise ValueError(
            f"{folder} holds a {written.get('model_type')!r}: give a model of the kinds "
            f"{', '.join(MODELS)}"
        )
    config = MODELS[written["model_type"]].config_class.from_pretrained(folder)

    # The stock class of LLaVA saves no bias of a head, although Phi has one.
    text = config.text_config
    if text.model_type == "phi" and not hasattr(text, "lm_head_bias"):
        text.lm_head_bias = any(name.endswith("lm_head.bias") for name in read_headers(folder))
    if config.model_type == "llava" and "image_seq_length" not in written:
        config.image_seq_length = read_geometry(read_processor(folder)).longest
    return config


def _check_token_rules(rules: dict[str, Any], vocab_size: int, folder: str) -> None:
    """Refuse rules on tokens that are malformed, or that name tokens which do not exist."""
    for rule, value in rules.items():
        try:
            if rule == "sequence_bias":
                pairs = value.items() if isinstance(value, dict) else value
                ids = [
                    token for sequence, bias in pairs if float(bias) == bias for token in sequence
                ]
            elif rule == "bad_words_ids":
                ids = [token for sequence in value for token in sequence]
            else:
                ids = list(value)
            is_valid = all(type(token) is int and 0 <= token < vocab_size for token in ids)
        except (TypeError, ValueError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"{Path(folder) / 'generation_config.json'} sets {rule} to {str(value)[:60]}: "
                f"give token ids below {vocab_size}, or remove the key"
            )
