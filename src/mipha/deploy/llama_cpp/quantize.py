"""Quantise a GGUF model with llama.cpp's rounding and its choice of bits for each matrix.

`xllamacpp` has llama.cpp's rounding but not its program for this, so the choice of types is written
here.

Source: llama.cpp b11549 `src/llama-quant.cpp` (tensor_allows_quantization, tensor_type_fallback,
    llama_tensor_get_type_impl), for a dense model and without an importance matrix.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mipha.deploy.gguf.writer import gguf
from mipha.deploy.llama_cpp.library import LOG_LOCK, captured_errors, load_library
from mipha.files import whole_file


@dataclass(frozen=True)
class Kind:
    """One way to quantise.

    Args:
        base: Type of most matrices.
        mixed: Whether values and the second matrix of the MLP get six bits in the layers where
            rounding harms most.
        file_type: Name in the file.
    """

    base: str
    mixed: bool
    file_type: str


KINDS = {
    "q4_0": Kind("Q4_0", False, "MOSTLY_Q4_0"),
    "q4_k_m": Kind("Q4_K", True, "MOSTLY_Q4_K_M"),
    "q5_k_m": Kind("Q5_K", True, "MOSTLY_Q5_K_M"),
    "q6_k": Kind("Q6_K", False, "MOSTLY_Q6_K"),
    "q8_0": Kind("Q8_0", False, "MOSTLY_Q8_0"),
}

_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Types with blocks of 32, for rows that do not divide into blocks of 256."""

_NOT_WEIGHTS = ("position_embd.weight", "token_types.weight")
_FULL = ("F32", "F16", "BF16")
_WRITTEN_BY_THE_WRITER = (
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
)
_ROWS_AT_A_TIME = 4096


def quantize_gguf(source: Path, out: Path, kind: str) -> None:
    """Write a language model's GGUF in fewer bits, whole or not at all.

    Args:
        source: GGUF in f16, bf16 or f32.
        out: New file, or one to replace.
        kind: One of `KINDS`.

    Raises:
        FileNotFoundError: There is no source.
        ValueError: No such kind, or the source is quantised already or no GGUF.
        MissingPackage: llama.cpp is not installed.
    """
    if kind.lower() not in KINDS:
        raise ValueError(f"no quantisation {kind!r}: give {', '.join(KINDS)}")
    if not source.is_file():
        raise FileNotFoundError(f"no GGUF file {source}: make one with `mipha export --to gguf`")
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{source} is no whole GGUF file ({error}): export the model again"
        ) from error
    if quantised := [tensor for tensor in reader.tensors if tensor.tensor_type.name not in _FULL]:
        name = quantised[0].tensor_type.name.lower()
        raise ValueError(
            f"{source} is quantised already ({quantised[0].name} is {name}): "
            "quantise the file in f16, or errors add up"
        )

    wanted = KINDS[kind.lower()]
    types = _types(reader, wanted)
    with whole_file(out) as partial:
        _write(reader, types, wanted, partial)


def _types(reader: Any, kind: Kind) -> dict[str, str]:
    """Return the type of each tensor by its name."""
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}  # innermost first
    num_layers = 1 + max(
        (int(found[1]) for name in shapes if (found := re.match(r"blk\.(\d+)\.", name))), default=0
    )
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"

    types = {}
    for tensor in reader.tensors:
        name, shape = tensor.name, shapes[tensor.name]
        is_matrix = (
            len(shape) > 1
            and name.endswith("weight")
            and not name.endswith("_norm.weight")
            and name not in _NOT_WEIGHTS
        )

        # Choose by the place in the model.
        if not is_matrix:
            types[name] = tensor.tensor_type.name
        elif name == head:
            types[name] = "Q8_0" if kind.base == "Q8_0" or shape[0] % _block(kind.base) else "Q6_K"
        elif kind.mixed and (found := re.match(r"blk\.(\d+)\.(attn_v|attn_qkv|ffn_down)\.", name)):
            types[name] = "Q6_K" if _needs_more_bits(int(found[1]), num_layers) else kind.base
        else:
            types[name] = kind.base

        # Take smaller blocks where the rows do not divide into these.
        if is_matrix and shape[0] % _block(types[name]):
            types[name] = _FALLBACK.get(types[name], types[name])
        if is_matrix and shape[0] % _block(types[name]):
            types[name] = tensor.tensor_type.name  # no type has blocks that small
    return types


def _needs_more_bits(layer: int, num_layers: int) -> bool:
    """Return whether a layer is in the first or last eighth, or every third between."""
    first = num_layers // 8
    return layer < first or layer >= 7 * num_layers // 8 or (layer - first) % 3 == 2


def _block(name: str) -> int:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]


def _write(reader: Any, types: dict[str, str], kind: Kind, path: Path) -> None:
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    writer.add_file_type(gguf.LlamaFileType[kind.file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    # Copy the fields.
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in _WRITTEN_BY_THE_WRITER:
            item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item)

    try:
        # Write the header: all names, types and places.
        for tensor in reader.tensors:
            dtype = gguf.GGMLQuantizationType[types[tensor.name]]
            shape = tensor.shape.tolist()[::-1]
            in_bytes = gguf.quant_shape_to_byte_shape(shape, dtype)
            # The writer takes shapes of quantised tensors in bytes, those of others as they are.
            numpy_type = np.dtype({"F32": np.float32, "F16": np.float16}.get(dtype.name, np.uint8))
            told = shape if numpy_type.itemsize > 1 else in_bytes
            writer.add_tensor_info(
                tensor.name, told, numpy_type, int(np.prod(in_bytes)), raw_dtype=dtype
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

        # Write the tensors one by one.
        for tensor in reader.tensors:
            same = types[tensor.name] == tensor.tensor_type.name
            writer.write_tensor_data(
                np.ascontiguousarray(tensor.data) if same else _rounded(tensor, types[tensor.name])
            )
    finally:
        writer.close()


def _rounded(tensor: Any, name: str) -> np.ndarray:
    """Return the bytes of a tensor in another type; the cores share its rows."""
    library, dtype = load_library(), gguf.GGMLQuantizationType[name]
    width = int(tensor.shape[0])
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    row_bytes = gguf.quant_shape_to_byte_shape((width,), dtype)[0]
    out = np.empty((len(rows), row_bytes), np.uint8)

    def quantize(start: int) -> None:
        part = np.ascontiguousarray(
            gguf.quants.dequantize(rows[start : start + _ROWS_AT_A_TIME], tensor.tensor_type),
            np.float32,
        )
        place = out[start : start + len(part)]
        size = library.ggml_quantize_chunk(
            int(dtype), part.ctypes.data, place.ctypes.data, 0, len(part), width, None
        )
        assert size == place.nbytes, f"{tensor.name}: {size} bytes written, not {place.nbytes}"

    with LOG_LOCK, captured_errors(library), ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(quantize, range(0, len(rows), _ROWS_AT_A_TIME)))
    return out
