"""llama.cpp's C functions, for tokens, image embeddings and rounding.

Its server in Python offers none of these. `load_library` declares the functions; `Vocabulary` and
`Vision` are a model's two halves opened with them. A struct with a wrong layout would silently give
other numbers. So llama.cpp first fills the two structs that are passed with its defaults, which are
compared with the known ones.

Source: llama.cpp b11549 `include/llama.h`, `ggml/include/ggml.h`, `tools/mtmd/mtmd.h`; the defaults
    in `src/llama-model.cpp` and `tools/mtmd/mtmd.cpp`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
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
from pathlib import Path
from threading import RLock
from types import ModuleType

import numpy as np
from PIL import Image

from mipha.errors import import_optional

TESTED = "2026.10.11549"
"""The version of xllamacpp whose headers were read."""

LOG_LOCK = RLock()
"""Lock that is held while llama.cpp's messages are redirected, which affects the whole process. A
server is opened and closed under it too, because both wait for its thread."""

_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_ERROR = 4  # ggml.h: GGML_LOG_LEVEL_ERROR
_IMAGE_CHUNK = 1  # mtmd.h: MTMD_INPUT_CHUNK_TYPE_IMAGE
_SPARE = 256


class ModelParams(ctypes.Structure):
    """`llama_model_params`, with spare room: a later version with more fields writes into that."""

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
    """`mtmd_context_params`, with spare room."""

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
    "mtmd_input_chunk_get_type": (c_int, c_void_p),
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
    """Import the package that brings llama.cpp.

    Raises:
        MissingPackage: It is not installed.
    """
    return import_optional("xllamacpp", "running llama.cpp", "gguf")


@cache
def load_library() -> ctypes.CDLL:
    """Load llama.cpp from xllamacpp, and declare its functions.

    Raises:
        MissingPackage: xllamacpp is not installed.
        ValueError: Its version does not fit these declarations.
    """
    xllamacpp = import_xllamacpp()
    install = f"pip install 'xllamacpp=={TESTED}'"
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    for name, (result, *arguments) in _SIGNATURES.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise ValueError(
                f"xllamacpp {xllamacpp.__version__} does not offer llama.cpp's {name} "
                f"on this system: {install}"
            ) from error
        function.restype, function.argtypes = result, arguments

    for params in (library.llama_model_default_params(), library.mtmd_context_params_default()):
        if unexpected := _unexpected(params):
            raise ValueError(
                f"xllamacpp {xllamacpp.__version__} has other parameters than the ones known here "
                f"({unexpected}): {install}"
            )

    with LOG_LOCK, captured_errors(library):
        library.llama_backend_init()
    return library


@contextmanager
def captured_errors(library: ctypes.CDLL) -> Iterator[list[str]]:
    """Keep llama.cpp's messages from the terminal, and collect its errors.

    Only under `LOG_LOCK`: waiting with Python's own lock for a thread that logs would never end.
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
    """Return the first field with another default than expected; a field not listed is zero."""
    for name, _ in params._fields_:
        value = getattr(params, name)
        if name != "spare" and (value or 0) != params.defaults.get(name, 0):
            return f"{type(params).__name__}.{name} is {value!r}"
    return None


class Vocabulary:
    """A GGUF model without its weights; `model` is llama.cpp's own object.

    Args:
        path: GGUF of a language model.

    Raises:
        ValueError: llama.cpp cannot read it; the message says why.
    """

    def __init__(self, path: Path) -> None:
        self._library = library = load_library()
        params = library.llama_model_default_params()
        params.vocab_only = True
        with LOG_LOCK, captured_errors(library) as errors:
            self.model = library.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise ValueError(unreadable(path, errors))
        self._words = library.llama_model_get_vocab(self.model)

    def __len__(self) -> int:
        return self._library.llama_vocab_n_tokens(self._words)

    @property
    def width(self) -> int:
        """Width of the language model's embeddings."""
        return int(self._field(f"{self._field('general.architecture')}.embedding_length"))

    @property
    def quantization(self) -> str:
        """Kind of its weights as the file says it, such as q8_0."""
        gguf = import_optional("gguf", "reading GGUF", "gguf")
        name = gguf.LlamaFileType(int(self._field("general.file_type"))).name
        return name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text; special tokens are read as such, none is put in front."""
        # No token is empty; the spare room is for a space that is put in front.
        encoded = text.encode()
        ids = (ctypes.c_int32 * (len(encoded) + 8))()
        with LOG_LOCK, captured_errors(self._library):
            num = self._library.llama_tokenize(
                self._words, encoded, len(encoded), ids, len(ids), False, True
            )
        assert num >= 0, f"{-num} tokens of {len(encoded)} bytes"
        return ids[:num]

    def close(self) -> None:
        """Free its memory; nothing else may be called afterwards."""
        if self.model:
            self._library.llama_model_free(self.model)
            self.model = None

    def _field(self, key: str) -> str:
        value = ctypes.create_string_buffer(64)
        size = self._library.llama_model_meta_val_str(self.model, key.encode(), value, len(value))
        assert size > 0, f"the GGUF has no {key}"
        return value.value.decode()


class Vision:
    """The tower and projector of an mmproj.

    Args:
        path: GGUF of tower and projector.
        vocabulary: The language model: marks between tiles are looked up in it. It must stay open.
        threads: Number of threads; None for all of this machine.

    Raises:
        ValueError: llama.cpp cannot read it; the message says why.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary, threads: int | None = None) -> None:
        self._library, self._width = load_library(), vocabulary.width
        params = self._library.mtmd_context_params_default()
        params.warmup = params.print_timings = False
        params.n_threads = threads or os.cpu_count() or 1
        with LOG_LOCK, captured_errors(self._library) as errors:
            self._context = self._library.mtmd_init_from_file(
                os.fsencode(path), vocabulary.model, params
            )
        if not self._context:
            raise ValueError(unreadable(path, errors))

    def embeddings(self, image: Image.Image) -> np.ndarray:
        """Return the embeddings of an image, `(tokens, width)`.

        Args:
            image: RGB image. llama.cpp neither resizes nor pads one of the tower's own size.
        """
        library = self._library
        bitmap = library.mtmd_bitmap_init(*image.size, image.tobytes())
        chunks = library.mtmd_input_chunks_init()
        part = ctypes.pointer(InputPart(None, bitmap))
        try:
            with LOG_LOCK, captured_errors(library) as errors:
                failed = library.mtmd_tokenize_from_parts(
                    self._context, chunks, (type(part) * 1)(part), 1, False
                )
                made = [] if failed else self._encoded(chunks)
            if not made:
                raise ValueError(
                    f"llama.cpp cannot encode the image of {image.width} x {image.height} pixels: "
                    f"{_first(errors)}"
                )
            return np.concatenate(made)
        finally:
            library.mtmd_input_chunks_free(chunks)
            library.mtmd_bitmap_free(bitmap)

    def _encoded(self, chunks: int) -> list[np.ndarray]:
        """Return the embeddings of each tile; nothing where llama.cpp fails."""
        library, made = self._library, []
        for number in range(library.mtmd_input_chunks_size(chunks)):
            chunk = library.mtmd_input_chunks_get(chunks, number)
            if library.mtmd_input_chunk_get_type(chunk) != _IMAGE_CHUNK:
                continue  # marks between tiles are chunks of text
            if library.mtmd_encode_chunk(self._context, chunk):
                return []
            num_tokens = library.mtmd_input_chunk_get_n_tokens(chunk)
            found = np.ctypeslib.as_array(
                library.mtmd_get_output_embd(self._context), (num_tokens, self._width)
            )
            made.append(found.copy())  # the next image is written over it
        return made

    def close(self) -> None:
        """Free its memory; nothing else may be called afterwards."""
        if self._context:
            self._library.mtmd_free(self._context)
            self._context = None


def unreadable(path: Path, errors: Sequence[str]) -> str:
    """Return the sentence for a file that llama.cpp refuses."""
    return (
        f"llama.cpp cannot open {path}: {_first(errors)}; "
        "export the model again with `mipha export --to gguf`"
    )


def _first(errors: Sequence[str]) -> str:
    """Return the first message: later ones only repeat that there was an error."""
    return errors[0] if errors else "it gives no reason"
