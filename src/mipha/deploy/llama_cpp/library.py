"""llama.cpp's C functions, called where its server in Python offers nothing: words to tokens, an image to embeddings, rounding.

A wrong layout of a struct would be read as other numbers, silently. So the two that are passed are first asked for their defaults, and
compared with those that are known.
Source: llama.cpp b11549 `include/llama.h`, `ggml/include/ggml.h`, `tools/mtmd/mtmd.h`; the defaults in `src/llama-model.cpp` and
    `tools/mtmd/mtmd.cpp`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_ubyte,
    c_uint32,
    c_void_p,
)
from functools import cache
from threading import RLock
from types import ModuleType

TESTED = "2026.10.11549"
"""The version of xllamacpp whose headers were read."""

LOG_LOCK = RLock()
"""Where a message goes is one setting for the whole process; a server is opened and closed under it too, for both wait for its thread."""

_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_ERROR = 4  # ggml.h: GGML_LOG_LEVEL_ERROR
_SPARE = 256


class ModelParams(ctypes.Structure):
    """`llama_model_params`, and room behind it: a later version with more fields writes into no one else's memory."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("spare", c_ubyte * _SPARE),
    ]
    defaults = {
        "n_gpu_layers": -1,
        "split_mode": 1,
        "load_mode": -1,
        "lazy_mode": 1,
        "use_extra_bufts": True,
    }


class VisionParams(ctypes.Structure):
    """`mtmd_context_params`, and room behind it."""

    _fields_ = [
        ("use_gpu", c_bool),
        ("device", c_void_p),
        ("print_timings", c_bool),
        ("n_threads", c_int),
        ("image_marker", c_char_p),
        ("media_marker", c_char_p),
        ("flash_attn_type", c_int),
        ("warmup", c_bool),
        ("image_min_tokens", c_int),
        ("image_max_tokens", c_int),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("batch_max_tokens", c_int32),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("spare", c_ubyte * _SPARE),
    ]
    defaults = {
        "use_gpu": True,
        "print_timings": True,
        "n_threads": 4,
        "media_marker": b"<__media__>",
        "flash_attn_type": -1,
        "warmup": True,
        "image_min_tokens": -1,
        "image_max_tokens": -1,
        "batch_max_tokens": 1024,
    }


class InputPart(ctypes.Structure):
    """`mtmd_input_part`: here always an image."""

    _fields_ = [("text", c_void_p), ("bitmap", c_void_p)]


_SIGNATURES = {
    "llama_log_get": (None, POINTER(c_void_p), POINTER(c_void_p)),
    "llama_log_set": (None, c_void_p, c_void_p),
    "mtmd_log_set": (None, c_void_p, c_void_p),
    "llama_backend_init": (None,),
    "llama_model_default_params": (ModelParams,),
    "llama_model_load_from_file": (c_void_p, c_char_p, ModelParams),
    "llama_model_free": (None, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_model_meta_val_str": (c_int32, c_void_p, c_char_p, c_char_p, c_size_t),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_tokenize": (
        c_int32,
        c_void_p,
        c_char_p,
        c_int32,
        POINTER(c_int32),
        c_int32,
        c_bool,
        c_bool,
    ),
    "mtmd_context_params_default": (VisionParams,),
    "mtmd_init_from_file": (c_void_p, c_char_p, c_void_p, VisionParams),
    "mtmd_free": (None, c_void_p),
    "mtmd_bitmap_init": (c_void_p, c_uint32, c_uint32, c_char_p),
    "mtmd_bitmap_free": (None, c_void_p),
    "mtmd_input_chunks_init": (c_void_p,),
    "mtmd_input_chunks_get": (c_void_p, c_void_p, c_size_t),
    "mtmd_input_chunks_size": (c_size_t, c_void_p),
    "mtmd_input_chunks_free": (None, c_void_p),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, c_void_p),
    "mtmd_tokenize_from_parts": (
        c_int32,
        c_void_p,
        c_void_p,
        POINTER(POINTER(InputPart)),
        c_size_t,
        c_bool,
    ),
    "mtmd_encode_chunk": (c_int32, c_void_p, c_void_p),
    "mtmd_get_output_embd": (POINTER(c_float), c_void_p),
    "ggml_quantize_chunk": (
        c_size_t,
        c_int,
        c_void_p,
        c_void_p,
        c_int64,
        c_int64,
        c_int64,
        c_void_p,
    ),
}


def import_xllamacpp() -> ModuleType:
    """The package.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise ValueError(
            f"llama.cpp is not installed ({error}): pip install 'mipha-vlm[gguf]'"
        ) from error
    return xllamacpp


@cache
def load_library() -> ctypes.CDLL:
    """llama.cpp inside xllamacpp, its functions declared.

    Raises:
        ValueError: xllamacpp is not installed, or is of a version that these declarations do not fit.
    """
    xllamacpp = import_xllamacpp()
    mend = f"pip install 'xllamacpp=={TESTED}'"
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    for name, (result, *arguments) in _SIGNATURES.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise ValueError(
                f"xllamacpp {xllamacpp.__version__} does not offer llama.cpp's {name} on this system: {mend}"
            ) from error
        function.restype, function.argtypes = result, arguments
    for params in (library.llama_model_default_params(), library.mtmd_context_params_default()):
        if unexpected := _unexpected(params):
            raise ValueError(
                f"xllamacpp {xllamacpp.__version__} passes parameters otherwise than known here ({unexpected}): {mend}"
            )
    with LOG_LOCK, captured_errors(library):
        library.llama_backend_init()
    return library


@contextmanager
def captured_errors(library: ctypes.CDLL) -> Iterator[list[str]]:
    """What llama.cpp says is kept from the terminal; its errors are collected.

    Only under `LOG_LOCK`: whoever waits, with Python's own lock in hand, for a thread that has something to say would wait for ever.
    """
    errors: list[str] = []

    def log(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())

    callback, before, data = _LogCallback(log), c_void_p(), c_void_p()
    library.llama_log_get(before, data)
    for log_set in (library.llama_log_set, library.mtmd_log_set):
        log_set(ctypes.cast(callback, c_void_p), None)
    try:
        yield errors
    finally:
        for log_set in (library.llama_log_set, library.mtmd_log_set):
            log_set(before, data)


def _unexpected(params: ModelParams | VisionParams) -> str | None:
    """The first field whose default is another than expected; what is not listed is zero."""
    for name, _ in params._fields_:
        value = getattr(params, name)
        if name != "spare" and (value or 0) != params.defaults.get(name, 0):
            return f"{type(params).__name__}.{name} is {value!r}"
    return None
