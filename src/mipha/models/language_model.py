"""Load the language model of a recipe with its tokenizer and template, or refuse it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mipha.catalog.language_models import LANGUAGE_MODELS
from mipha.models.chat_template import end_of_turn
from mipha.models.checkpoint_folder import load_weights, locate, model_type, reading
from mipha.models.processing import IMAGE_TOKEN, checked_template, load_template
from mipha.recipe import ModelRecipe


def load_language_model(
    recipe: ModelRecipe, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load the causal language model, its tokenizer (with a pad token) and its chat template.

    Raises:
        FileNotFoundError: It is not found, or its folder is not whole.
        ValueError: It is of a kind that cannot be used, or its template does not go with it.
    """
    name = recipe.language_model
    folder, config, tokenizer, template = load_tokenizer(recipe)
    entry = LANGUAGE_MODELS.get(name)
    with reading(folder, "language model", name):
        if entry and entry.untrained:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = load_weights(AutoModelForCausalLM, folder, dtype)

    # Gemma 2 ends in 30 * tanh(logits / 30), which the stock LLaVA cannot express. Greedy answers
    # are the same without it.
    if getattr(model.config, "final_logit_softcapping", None):
        model.config.final_logit_softcapping = None
    check_composable(model, name)
    return model, tokenizer, template


def load_tokenizer(
    recipe: ModelRecipe,
) -> tuple[str, PretrainedConfig, PreTrainedTokenizerBase, str]:
    """Load the config, tokenizer and chat template of a language model, without its weights.

    Returns:
        Folder or hub id, config, tokenizer (with a pad token), and chat template.

    Raises:
        FileNotFoundError: It is not found, or its folder is not whole.
        ValueError: It is of a kind that cannot be used, or its template does not go with it.
    """
    name = recipe.language_model
    entry = LANGUAGE_MODELS.get(name)
    folder = locate(name, entry.path if entry else name, "language model", list(LANGUAGE_MODELS))
    config = read_config(folder, name)
    tokenizer = _read_tokenizer(folder, name)

    wanted = recipe.chat_template or (entry.chat_template if entry else None)
    if wanted:
        template = load_template(wanted, tokenizer)
    elif tokenizer.chat_template:
        template = checked_template(tokenizer.chat_template, tokenizer, source=f"of {name}")
    else:
        raise ValueError(
            f"language model {name!r} has no chat template: "
            "set model.chat_template, for example to vicuna"
        )

    end_of_turn(tokenizer, template)  # refuse a template without an end before the weights are read
    return folder, config, tokenizer, template


def read_config(folder: str, name: str) -> PretrainedConfig:
    """Read the config of a language model, before its weights.

    Raises:
        ValueError: LLaVA cannot hold the model that the config describes.
    """
    with reading(folder, "language model", name):
        kind = model_type(folder)
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"language model {name!r} is a {kind!r}, which transformers {transformers.__version__} "
            "does not know: code that comes with a checkpoint is never run"
        )

    with reading(folder, "language model", name):
        config = AutoConfig.from_pretrained(folder)

    reason = None
    if config.get_text_config() is not config:
        reason = "which holds more than a language model"
    elif config.is_encoder_decoder:
        reason = "an encoder and a decoder"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = "which writes no text"
    elif getattr(config, "quantization_config", None):
        reason = "in quantized weights, which do not train"
    if reason:
        raise ValueError(
            f"language model {name!r} is a {kind!r}, {reason}: "
            "give a decoder-only language model in full weights"
        )
    return config


def _read_tokenizer(folder: str, name: str) -> PreTrainedTokenizerBase:
    with reading(folder, "language model", name):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"language model {name!r} has no tokenizer that can be read from {folder}: "
                f"put its tokenizer.json there ({reason})"
            ) from error
    return with_pad_token(tokenizer)


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Use the EOS as pad token where a tokenizer has none.

    Masks come from lengths, so the pad token is never mistaken for an EOS.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def check_composable(model: PreTrainedModel, name: str) -> None:
    """Refuse a language model whose logits change inside LLaVA, by running it on a few words.

    LLaVA gives embeddings to the stack of layers and applies the head to the result. Our training
    puts samples side by side behind a mask. So the model gets the same words twice, side by side,
    and a third sample that is the embedding of no word, like image features; the logits of both
    copies must be those of the model alone.

    Args:
        model: Language model with its weights.
        name: Name in the recipe, for messages.

    Raises:
        ValueError: There is more than the head behind the layers, or samples in one row mix.
    """
    # Put the samples side by side in one row, each behind its own mask.
    words = torch.linspace(0, model.config.vocab_size - 1, 7, device=model.device).long()[1:]
    embedded = model.get_input_embeddings()(words)
    inputs = torch.cat([embedded, embedded, embedded.mean(0, keepdim=True)])[None]
    blocks = [torch.ones(n, n, device=model.device).tril() for n in (len(words), len(words), 1)]
    mask = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=model.dtype, device=model.device)
    mask.masked_fill_(torch.block_diag(*blocks) == 0, torch.finfo(model.dtype).min)
    positions = torch.cat([torch.arange(len(block), device=model.device) for block in blocks])[None]

    # Compute the logits of the words alone, and those of the row as LLaVA does.
    refused = f"language model {name!r} is a {model.config.model_type!r}, which cannot be used"
    try:
        alone = model(input_ids=words[None], use_cache=False).logits[0]
        hidden = model.base_model(
            inputs_embeds=inputs,
            position_ids=positions,
            attention_mask=mask[None, None],
            use_cache=False,
        )
        logits = model.get_output_embeddings()(hidden.last_hidden_state[0])
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{refused}: it does not take embeddings, positions and a mask "
            f"({' '.join(str(error).split())[:200]})"
        ) from error

    # Compare both copies.
    if not _close(logits[: len(words)], alone):
        raise ValueError(
            f"{refused}: its logits are more than its head on its hidden states, "
            "which the stock LLaVA format cannot express"
        )
    if not _close(logits[len(words) : 2 * len(words)], alone):
        raise ValueError(
            f"{refused}: it carries words past the attention mask (a recurrent layer), "
            "so samples in one row would mix"
        )


def _close(one: Tensor, other: Tensor) -> bool:
    """Return whether most words have the same logits.

    Not all, because a mixture of experts may send a word near its boundary to either expert.
    """
    differences = (one - other).abs().amax(-1)
    return bool(differences.median() <= torch.finfo(other.dtype).eps ** 0.5 * other.abs().max())


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str, configured: int | list[int] | None = None
) -> list[int]:
    """Return the ids that end an answer.

    The tokenizer and the template know the end of a turn. Configs in the wild do not (the released
    Mipha-3B says id 2), so theirs only come on top.

    Args:
        tokenizer: Tokenizer of the language model.
        template: Its chat template.
        configured: `eos_token_id` of the generation config.

    Raises:
        ValueError: The turn does not end in a special token, so no answer would ever end.
    """
    known = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, end_of_turn(tokenizer, template), *known} - {None})


def add_image_token(
    tokenizer: PreTrainedTokenizerBase,
    language_model: PreTrainedModel | None = None,
    marks: Sequence[str] = (),
) -> int:
    """Add the image placeholder to a tokenizer and return its id.

    Args:
        tokenizer: Tokenizer to change.
        language_model: Model that gets up to 64 new rows where no row of its vocabulary is unused;
            None changes the tokenizer alone.
        marks: Tokens that stand around images; they begin as the mean of all words.
    """
    known = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN, *marks]})
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    new = [place for place in tokenizer.convert_tokens_to_ids(list(marks)) if place >= known]
    if language_model is None:
        return token_id

    last = max([token_id, *new])
    if last >= language_model.config.vocab_size:
        language_model.resize_token_embeddings(last + 1, pad_to_multiple_of=64, mean_resizing=False)
    if new:
        with torch.no_grad():
            for layer in (
                language_model.get_input_embeddings(),
                language_model.get_output_embeddings(),
            ):
                layer.weight[new] = layer.weight[:known].float().mean(0).to(layer.weight.dtype)
    return token_id
