"""Write one GGUF file tensor by tensor, so that a large model needs little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from mipha.checkpoint_files import weight_files
from mipha.errors import import_optional

gguf = import_optional("gguf", "writing GGUF", "gguf")

Field = bool | int | float | str | list[int] | list[float] | list[str]

KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""Kinds that are written here, with GGUF's name; llama.cpp itself makes the other quantisations."""

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write.

    Args:
        name: llama.cpp's name.
        shape: Its shape.
        read: Function that returns it as float32.
        kept: Whether it is a norm, a bias or a position table: float32 in every file.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    kept: bool


class Weights:
    """Tensors of a checkpoint by name, read on request."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files

    def names(self, prefix: str) -> list[str]:
        """Return all names with a prefix, in order."""
        return sorted(name for name in self._files if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Read a tensor as float32."""
        return self._files[name].get_tensor(name).to(torch.float32).numpy()

    def tensor(
        self,
        name: str,
        gguf_name: str,
        change: Callable[[np.ndarray], np.ndarray] | None = None,
        kept: bool = False,
    ) -> Tensor:
        """Return a tensor to write.

        Args:
            name: Name in the checkpoint.
            gguf_name: llama.cpp's name.
            change: Function that changes its numbers; its shape stays.
            kept: Whether it is float32 in every file; vectors always are.
        """
        shape = self.shape(name)
        read = (lambda: change(self.read(name))) if change else lambda: self.read(name)
        return Tensor(gguf_name, shape, read, kept or len(shape) == 1)


@contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """Open the weights of a checkpoint's folder."""
    files: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in weight_files(folder):
            file = stack.enter_context(safe_open(path, framework="pt"))
            files |= dict.fromkeys(file.keys(), file)
        yield Weights(files)


def write_gguf(
    path: Path, architecture: str, fields: Mapping[str, Field], tensors: Sequence[Tensor], kind: str
) -> None:
    """Write one file.

    Args:
        path: The file.
        architecture: llama.cpp's name of the model's kind.
        fields: Fields by their keys; a list holds values of one type.
        tensors: Tensors to write.
        kind: One of `KINDS`. A matrix whose rows do not divide into blocks of q8_0 is written as
            f16.

    Raises:
        ValueError: A number is too large for f16.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in fields.items():
        _add_field(writer, key, value)

    # Write the header: all names, types and places.
    types = [_type_of(tensor, gguf.GGMLQuantizationType[KINDS[kind]]) for tensor in tensors]
    for tensor, dtype in zip(tensors, types, strict=True):
        stored = (
            gguf.quant_shape_to_byte_shape(tensor.shape, dtype)
            if dtype.name in ("Q8_0", "BF16")
            else tensor.shape
        )
        numpy_type = {"F32": np.float32, "F16": np.float16}.get(dtype.name, np.uint8)
        num_bytes = int(np.prod(stored)) * np.dtype(numpy_type).itemsize
        writer.add_tensor_info(
            tensor.name, stored, np.dtype(numpy_type), num_bytes, raw_dtype=dtype
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    # Write the tensors one by one.
    for tensor, dtype in zip(tensors, types, strict=True):
        array = tensor.read()
        assert array.shape == tensor.shape, f"{tensor.name} is {array.shape}, not {tensor.shape}"
        if dtype.name == "F16" and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
            raise ValueError(
                f"{tensor.name} holds a number too large for f16: export --quantize bf16 instead"
            )
        writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(array), dtype))
    writer.close()


def _type_of(tensor: Tensor, wanted: Any) -> Any:
    if tensor.kept:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    # llama.cpp's convolution takes its kernel in f32 or f16 alone.
    whole = tensor.shape[-1] % block == 0 and (
        len(tensor.shape) == 2 or wanted.name in ("F32", "F16")
    )
    return wanted if whole else gguf.GGMLQuantizationType.F16


def _add_field(writer: Any, key: str, value: Field) -> None:
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        by_type = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
        writer.add_key_value(key, value, by_type[type(value)])
