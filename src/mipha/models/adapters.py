"""Low-rank adapters (LoRA) through peft: added to a model, saved as stock peft reads them, merged.

model + layers  --add_adapters-->  model with adapters  --training-->  weights by name
weights  --save_adapter-->  adapter/ {adapter_config.json, adapter_model.safetensors, base.json}
weights  --merged_weights-->  weights of the model without adapters
adapter/ + its base  --merge_adapter-->  a standard checkpoint
base model + adapter/  --attach_adapter-->  a model with the adapter, unmerged, that shares the rest
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mipha.checkpoint_files import read_config, read_template, refuse_code, refuse_links
from mipha.files import read_json_object, whole_folder, write_whole
from mipha.models.build import save_checkpoint
from mipha.models.checkpoint_folder import check_finite
from mipha.models.fingerprint import checkpoint_digest
from mipha.models.modeling import LlavaForConditionalGeneration, load_model
from mipha.models.processing import load_processor
from mipha.models.quantization import is_quantized
from mipha.preflight import check_adapter, check_new_folder
from mipha.recipe import LoraRecipe, Part

_NAME = "default"  # peft's name for the one adapter of a model
_PREFIX = "base_model.model."  # of every tensor name in a file of peft


def add_adapters(
    model: LlavaForConditionalGeneration, stacks: Mapping[Part, list[nn.Module]], lora: LoraRecipe
) -> None:
    """Add an adapter to every linear layer of some stacks.

    A new adapter changes nothing, because its second factor is zero.

    Args:
        model: Model without adapters.
        stacks: Layers of each part that gets adapters.
        lora: Shape of the adapters.

    Raises:
        ValueError: A stack has no linear layers or uneven ones, or peft matched others.
    """
    assert not adapter_layers(model), "this model has adapters already"

    # Name the layers that are meant, and a pattern that matches them alone.
    names = {id(module): name for name, module in model.named_modules()}
    wanted: set[str] = set()
    patterns = []
    for part, layers in stacks.items():
        tails = linear_layers(part, layers)
        stack = names[id(layers[0])].rpartition(".")[0]
        wanted |= {f"{names[id(layer)]}.{tail}" for layer in layers for tail in tails}
        numbers = "|".join(names[id(layer)].rpartition(".")[2] for layer in layers)
        patterns.append(rf"{re.escape(stack)}\.({numbers})\.({'|'.join(map(re.escape, tails))})")

    # Let peft add the adapters. It reads `is_loaded_in_4bit`, which transformers must not see.
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="|".join(patterns),
    )
    model.is_loaded_in_4bit = any(is_quantized(module) for module in model.modules())
    inject_adapter_in_model(config, model)
    del model.is_loaded_in_4bit

    # Peft matches names, and another version of transformers may have others.
    matched = set(adapter_layers(model))
    if matched != wanted:
        raise ValueError(
            f"adapters were added to {len(matched)} layers where {len(wanted)} were meant: "
            "this version of peft does not fit"
        )


def linear_layers(part: Part, layers: list[nn.Module]) -> list[str]:
    """Return the names of the linear layers inside each layer of a stack.

    Raises:
        ValueError: A layer has none, or others than the first: adapters would silently skip some.
    """
    found = [
        [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        for layer in layers
    ]
    if not found[0] or any(names != found[0] for names in found):
        counts = sorted({len(names) for names in found})
        raise ValueError(
            f"{part}: adapters want the same linear layers, at least one, in each of its "
            f"{len(layers)} layers, but there are {' or '.join(map(str, counts))} in a layer: "
            "tune it full or last-N"
        )
    return sorted(found[0])


def adapter_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers with an adapter by name; each holds its linear layer as base layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(layer: LoraLayer) -> list[nn.Parameter]:
    """Return the trained parameters of a layer with an adapter: its two factors."""
    return [*layer.lora_A.parameters(), *layer.lora_B.parameters()]


def adapter_deltas(
    model: nn.Module, weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Compute what each adapter adds to its layer.

    Args:
        model: Model with adapters; may be sharded, because only its structure is read.
        weights: All of its weights by name, whole.

    Yields:
        Name of the layer, its own weight `(out, in)`, and what the adapter adds to it.
    """
    for name, layer in adapter_layers(model).items():
        base = layer.get_base_layer()
        if is_quantized(base):
            own = dequantize_module_weight(base).detach()
        else:
            own = weights[f"{name}.base_layer.weight"]

        first = weights[f"{name}.lora_A.{_NAME}.weight"]  # (rank, in)
        second = weights[f"{name}.lora_B.{_NAME}.weight"]  # (out, rank)
        yield name, own, layer.scaling[_NAME] * (second @ first)


def merged_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the model without adapters that computes the same numbers.

    Args:
        model: Model with adapters; may be sharded, because only its structure is read.
        weights: All of its weights by name, whole.
    """
    merged = dict(weights)
    for name, own, delta in adapter_deltas(model, weights):
        for key in [key for key in merged if key.startswith(f"{name}.")]:
            del merged[key]
        merged[f"{name}.weight"] = (own + delta).cpu()
        if (bias := weights.get(f"{name}.base_layer.bias")) is not None:
            merged[f"{name}.bias"] = bias
    return merged


def remove_adapters(model: nn.Module) -> None:
    """Replace the layers with adapters by their own linear layers; the adapters are lost."""
    for name, layer in adapter_layers(model).items():
        model.set_submodule(name, layer.get_base_layer())


def save_adapter(
    model: LlavaForConditionalGeneration,
    weights: Mapping[str, Tensor],
    whole: Iterable[nn.Module],
    base: Path,
    folder: Path,
    template: str | None = None,
) -> None:
    """Write the adapters as stock peft reads them, and the modules that were trained whole.

    Args:
        model: Model with adapters; may be sharded, because only its structure is read.
        weights: All of its weights by name, whole.
        whole: Modules whose own weights were trained.
        base: Checkpoint of the model that the adapters were added to.
        folder: Target; a folder that is there is replaced.
        template: Chat template that was trained with, which may set arguments that the base's own
            does not; None: the base's own.
    """
    # Collect the tensors of the adapters.
    tensors = {}
    for name in adapter_layers(model):
        for factor in ("lora_A", "lora_B"):
            tensors[f"{name}.{factor}.weight"] = weights[f"{name}.{factor}.{_NAME}.weight"]

    # Add those of the modules that were trained whole; a tied head is in the file a second time.
    names = {id(module): name for name, module in model.named_modules()}
    tied = {id(parameter): name for name, parameter in model.named_parameters()}
    saved = [(names[id(module)], module) for module in whole]
    for name, module in saved:
        for key, parameter in module.named_parameters():
            tensors[f"{name}.{key}"] = weights[tied[id(parameter)]].clone()

    # Describe the adapters, and name their base.
    config: LoraConfig = model.peft_config[_NAME]
    config.modules_to_save = [name for name, _ in saved] or None
    config.base_model_name_or_path = str(base.resolve())
    config.inference_mode = True
    layers = adapter_layers(model).values()
    facts = {
        "folder": os.path.relpath(base, folder),
        "sha256": checkpoint_digest(base),
        "quantized": any(is_quantized(layer.get_base_layer()) for layer in layers),
    }

    with whole_folder(folder) as partial:
        config.save_pretrained(partial)
        save_file(
            {_PREFIX + name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
            partial / "adapter_model.safetensors",
        )
        write_whole(partial / "base.json", json.dumps(facts, indent=2) + "\n")
        if template is not None:
            write_whole(partial / "chat_template.jinja", template)


def merge_adapter(adapter: Path, folder: Path, base: Path | None = None) -> None:
    """Write the standard checkpoint of a base model with an adapter merged into its weights.

    Args:
        adapter: Folder in PEFT's format.
        folder: New folder; it appears when everything is in it.
        base: Checkpoint of the model that the adapter was trained on; None for the one that the
            adapter names.

    Raises:
        FileNotFoundError: The adapter, or its base, is not there.
        ValueError: The adapter was trained on another base or over weights of 4 bits, is not whole
            or not finite, or the folder exists.
    """
    check_adapter(adapter)
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another folder for the merged model")
    base = check_base(adapter, base)

    # Merge.
    model = load_model(str(base))
    attach_adapter(model, adapter, base)  # peft fills in what an adapter lacks
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    try:
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except RuntimeError as error:  # peft's answer to factors of another rank than the config's
        raise ValueError(
            f"the tensors of {adapter} are not those that its config describes: copy it again "
            f"({' '.join(str(error).split())[:200]})"
        ) from error

    # Peft loads tied weights as two.
    embeddings = merged.get_input_embeddings().weight
    if is_tied and torch.equal(merged.lm_head.weight, embeddings):
        merged.config.tie_word_embeddings = True
        merged.tie_weights()

    save_checkpoint(merged, load_processor(base, *adapter_template(adapter)), folder)


def check_base(adapter: Path, base: Path | None = None) -> Path:
    """Return the base of an adapter, after a check that it was trained on exactly that.

    Args:
        adapter: Folder in PEFT's format; anybody may have made it.
        base: Checkpoint; None for the one that the adapter names.

    Raises:
        FileNotFoundError: The adapter, or its base, is not there.
        ValueError: The adapter was trained on another base or over weights of 4 bits, is of another
            kind, or holds files that are not safe to read.
    """
    check_adapter(adapter)
    refuse_links(adapter)
    refuse_code(adapter)
    kind = read_config(adapter, "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{adapter} is an adapter of the kind {kind}: give a LoRA")
    _check_config(adapter)

    # Find the base that the adapter was trained on. Without base.json only its name is known.
    facts = read_json_object(adapter / "base.json") if (adapter / "base.json").is_file() else None
    if facts is not None and not (
        {"sha256", "quantized"} <= facts.keys()
        and isinstance(facts.get("folder", facts.get("name")), str)
    ):
        raise ValueError(
            f"{adapter / 'base.json'} does not describe the base of the adapter: copy it again"
        )
    if facts is None:
        named = Path(PeftConfig.from_pretrained(adapter).base_model_name_or_path or "?")
    else:
        named = adapter / facts["folder"] if "folder" in facts else Path(facts["name"])
    base = base or named
    if not (base / "config.json").is_file():
        raise FileNotFoundError(
            f"the base model {base} of {adapter} is not there: "
            "give the checkpoint that the adapter was trained on"
        )
    if facts is not None and checkpoint_digest(base) != facts["sha256"]:
        raise ValueError(
            f"{adapter} was trained on another base than {base}: "
            f"its weights differ from those of {named} at that time"
        )
    if facts is not None and facts["quantized"]:
        raise ValueError(
            f"{adapter} was trained on weights of 4 bits, and its answers would "
            f"change on those of {base}: use the checkpoint/ beside it, which has it merged"
        )
    return base


def _check_config(adapter: Path) -> None:
    """Refuse a config of peft that asks for more than a LoRA, or for what has no end.

    Source: peft 0.21 `LoraConfig`; initialisations that change the base's weights:
        `tuners/lora/layer.py`.
    """
    path = adapter / "adapter_config.json"
    config = read_config(adapter, path.name)

    def refuse(key: str, fix: str) -> ValueError:
        return ValueError(f"{path} sets {key} to {str(config.get(key))[:60]!r}: {fix}")

    # Kinds of adapters that are not read, by their switches.
    for key, value in config.items():
        if value is not None and value is not False and key not in _READ_KEYS:
            raise refuse(key, "give a plain LoRA, without it")
    if config.get("init_lora_weights", True) not in _INITIALISATIONS:
        raise refuse(
            "init_lora_weights", "it changes the base's weights; convert it to a plain LoRA"
        )

    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise refuse("bias", "use none, all or lora_only")

    # Numbers.
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key) and not isinstance(config[key], dict):
            raise refuse(key, "give an object of names and numbers")
    for key, values, most in (
        ("r", [config.get("r", 8), *ranks.values()], _MOST_RANK),
        ("lora_alpha", [config.get("lora_alpha", 8), *alphas.values()], _MOST_ALPHA),
        ("lora_dropout", [config.get("lora_dropout", 0.0)], 1),
    ):
        for value in values:
            kinds = (int,) if key == "r" else (int, float)
            if type(value) not in kinds or not (key == "r") <= value <= most:
                raise ValueError(f"{path} sets {key} to {value!r}: give a number up to {most:,}")

    # Patterns: one with a repeated group, or with many repetitions, takes for ever on some names.
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        if not isinstance(value, (str, list, type(None))) or (not value and key[0] == "t"):
            raise refuse(key, "name the layers that have adapters")
    patterns = [config.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    for pattern in [one for one in patterns if isinstance(one, str)] + [*ranks, *alphas]:
        try:
            re.compile(pattern)
            is_quick = not re.search(r"\)[*+{]", pattern) and len(re.findall("[*+{]", pattern)) < 9
        except re.error:
            is_quick = False
        if not is_quick:
            raise ValueError(
                f"{path} has the pattern {pattern[:60]!r}, which is none or may take for ever: "
                "name the layers in a list"
            )

    # What else is malformed shows to peft itself.
    try:
        PeftConfig.from_pretrained(str(adapter))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read by peft: copy it again ({reason})") from error


_READ_KEYS = {
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "bias", "fan_in_fan_out", "init_lora_weights", "ensure_weight_tying"),
    # Notes of peft, and settings of what is switched off.
    *("peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("base_model_name_or_path", "megatron_core", "qalora_group_size", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config"),
}
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_MOST_RANK = 2**16
_MOST_ALPHA = 2**20


def adapter_template(adapter: Path) -> tuple[str | None, Path]:
    """Return the chat template that an adapter was trained with, and its file.

    None in place of the template stands for that of the base.
    """
    path = adapter / "chat_template.jinja"
    return read_template(path) if path.is_file() else None, path


def attach_adapter(
    model: LlavaForConditionalGeneration, adapter: Path, base: Path
) -> LlavaForConditionalGeneration:
    """Return a model with an adapter beside its weights, unmerged.

    It shares every tensor with the base that the adapter does not have itself, so several adapters
    over one base take little more memory than one.

    Args:
        model: The base's model, which is left as it is.
        adapter: Folder in PEFT's format.
        base: Checkpoint of the model, for messages.

    Raises:
        ValueError: The adapter does not fit this model, or holds numbers that are not finite.
            `check_base` tells whether it was trained on it.
    """
    tensors = _read_tensors(adapter)
    _check_fit(model, adapter, tensors, base)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    own = copy.deepcopy(model, shared)
    embeddings = own.get_input_embeddings()
    is_tied = own.lm_head.weight is embeddings.weight

    # Add the layers; peft's wrappers of modules that were trained whole are not needed.
    config = LoraConfig.from_pretrained(str(adapter))
    config.modules_to_save, config.inference_mode = None, True
    config.init_lora_weights = True
    try:
        inject_adapter_in_model(config, own, _NAME)
    except Exception as error:  # peft answers a malformed config with any kind of exception
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{adapter} does not fit {base}: copy it again ({reason})") from error

    # Put the adapter's tensors in their places.
    found = set()
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        layer, _, factor = path.rpartition(".")
        try:
            place = own.get_submodule(f"{path}.{_NAME}" if factor in ("lora_A", "lora_B") else path)
        except AttributeError as error:
            raise ValueError(
                f"{adapter} holds an adapter of {layer}, which its config does not name: "
                "copy it again"
            ) from error
        if getattr(place, leaf).shape != tensor.shape:
            raise ValueError(
                f"{adapter} has {name} of {tuple(tensor.shape)}, and its config describes "
                f"{tuple(getattr(place, leaf).shape)}: copy it again"
            )
        if factor in ("lora_A", "lora_B"):
            found.add((layer, factor))
        value = tensor.to(model.device, model.dtype)
        setattr(place, leaf, nn.Parameter(value, requires_grad=False))
    wanted = {(name, factor) for name in adapter_layers(own) for factor in ("lora_A", "lora_B")}
    if lacking := sorted(wanted - found):
        raise ValueError(
            f"{adapter} lacks the adapters of {len(lacking)} layers that its config names, such as "
            f"{lacking[0][0]}: copy it again"
        )
    if is_tied and torch.equal(own.lm_head.weight, embeddings.weight):
        own.lm_head.weight = embeddings.weight
    return own.eval()


def export_adapter(adapter: Path, folder: Path, base: str) -> Path:
    """Write an adapter alone, with the identity of its base and without this machine's paths.

    Args:
        adapter: Folder that a stage wrote.
        folder: New folder; it appears when everything is in it.
        base: Name of the base, as others know it: a hub id, or the name of a folder.

    Raises:
        FileNotFoundError: The folder holds no adapter.
        ValueError: The target exists, or the adapter does not say its base.
    """
    check_adapter(adapter)
    check_new_folder(folder)
    refuse_links(adapter)
    refuse_code(adapter)
    facts = read_json_object(adapter / "base.json", fix="export the adapter that a stage wrote")
    config = read_json_object(adapter / "adapter_config.json") | {"base_model_name_or_path": base}
    identity = {"name": base, "sha256": facts["sha256"], "quantized": facts["quantized"]}
    card = (
        f"---\nbase_model: {json.dumps(base)}\nlibrary_name: peft\n"
        f"tags: [mipha, llava, lora]\n---\n\n# {folder.name}\n\n"
        f"A LoRA adapter in PEFT's format. It belongs to `{base}`, and to no other weights: sha256 "
        f"of its tensors {facts['sha256']}.\n\n"
        f"```bash\nmipha chat BASE --adapter {folder.name}\n```\n"
    )
    with whole_folder(folder) as partial:
        shutil.copy2(adapter / "adapter_model.safetensors", partial)
        if (adapter / "chat_template.jinja").is_file():
            shutil.copy2(adapter / "chat_template.jinja", partial)
        write_whole(partial / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        write_whole(partial / "base.json", json.dumps(identity, indent=2) + "\n")
        write_whole(partial / "README.md", card)
    return folder


def _read_tensors(adapter: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter, by their names in the model."""
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{adapter} has no {path.name}: copy it there")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut short: copy it again ({error})") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path} holds {name} in {tensor.dtype}: save it as floats")
    check_finite(tensors.items(), path)
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _check_fit(model: nn.Module, adapter: Path, tensors: Mapping[str, Tensor], base: Path) -> None:
    """Refuse an adapter with a tensor that has no place in the base: peft skips some of them."""
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    # Memory is taken by the config's rank before the tensors are put there.
    config = read_config(adapter, "adapter_config.json")
    ranks = [shape[0] for name, shape in found.items() if ".lora_A." in name and shape]
    if ranks and not config.get("rank_pattern") and config.get("r", 8) > max(ranks):
        raise ValueError(
            f"{adapter} names rank {config.get('r', 8)}, and its tensors have {max(ranks)}: "
            "copy it again"
        )

    for name, shape in found.items():
        factor = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if factor and len(shape) != 2:
            fits = False
        elif factor:
            outputs, inputs = shapes.get(f"{factor[1]}.weight", (None, None))
            fits = shape[1] == inputs if factor[2] == "A" else shape[0] == outputs
        else:
            fits = shapes.get(name) == shape
        if not fits:
            raise ValueError(
                f"{adapter} does not fit {base}, which has no place for {name} {shape}: "
                "give the base it was trained on"
            )
