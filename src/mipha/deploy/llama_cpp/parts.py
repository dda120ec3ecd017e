"""Two parts of llama.cpp on their own: a model's vocabulary, and tower with projector."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mipha.deploy.llama_cpp.library import LOG_LOCK, InputPart, captured_errors, load_library


class Vocabulary:
    """A GGUF model without its weights.

    Args:
        path: The GGUF of a language model.

    Raises:
        ValueError: llama.cpp cannot read it; the message says why.
    """

    def __init__(self, path: Path) -> None:
        self._library = library = load_library()
        params = library.llama_model_default_params()
        params.vocab_only = True
        with LOG_LOCK, captured_errors(library) as errors:
            self._model = library.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise ValueError(unreadable(path, errors))
        self._words = library.llama_model_get_vocab(self._model)

    def __len__(self) -> int:
        return self._library.llama_vocab_n_tokens(self._words)

    @property
    def width(self) -> int:
        """Of the language model's embeddings."""
        return int(self._field(f"{self._field('general.architecture')}.embedding_length"))

    @property
    def quantization(self) -> str:
        """What the file says of its weights, such as q8_0."""
        import gguf

        name = gguf.LlamaFileType(int(self._field("general.file_type"))).name
        return name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text; special tokens are read as such, and none is put in front."""
        encoded = text.encode()
        ids = (
            ctypes.c_int32 * (len(encoded) + 8)
        )()  # no token is empty; the rest is for a space put in front
        with LOG_LOCK, captured_errors(self._library):
            num = self._library.llama_tokenize(
                self._words, encoded, len(encoded), ids, len(ids), False, True
            )
        assert num >= 0, f"{-num} tokens of {len(encoded)} bytes"
        return ids[:num]

    def close(self) -> None:
        """Free it; nothing else may be called afterwards."""
        if self._model:
            self._library.llama_model_free(self._model)
            self._model = None

    def _field(self, key: str) -> str:
        value = ctypes.create_string_buffer(64)
        size = self._library.llama_model_meta_val_str(self._model, key.encode(), value, len(value))
        assert size > 0, f"the GGUF has no {key}"
        return value.value.decode()


class Vision:
    """The tower and projector of an mmproj.

    Args:
        path: The GGUF of the tower and projector.
        width: Of the embeddings that it makes.
        threads: None: all of this machine.

    Raises:
        ValueError: llama.cpp cannot read it; the message says why.
    """

    def __init__(self, path: Path, width: int, threads: int | None = None) -> None:
        self._library, self._width = load_library(), width
        params = self._library.mtmd_context_params_default()
        params.warmup = params.print_timings = False
        params.n_threads = threads or os.cpu_count() or 1
        with LOG_LOCK, captured_errors(self._library) as errors:
            self._context = self._library.mtmd_init_from_file(os.fsencode(path), None, params)
        if not self._context:
            raise ValueError(unreadable(path, errors))

    def embeddings(self, image: Image.Image) -> np.ndarray:
        """What the language model reads in the place of an image, `(tokens, width)`.

        Args:
            image: RGB. Where it has the tower's own size already, llama.cpp neither resizes nor pads it.
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
                num_chunks = library.mtmd_input_chunks_size(chunks)
                chunk = library.mtmd_input_chunks_get(chunks, 0) if num_chunks == 1 else None
                failed = failed or chunk is None or library.mtmd_encode_chunk(self._context, chunk)
            if failed:
                raise ValueError(
                    f"llama.cpp cannot encode the image of {image.width} x {image.height} pixels: {_said(errors)}"
                )
            num_tokens = library.mtmd_input_chunk_get_n_tokens(chunk)
            found = np.ctypeslib.as_array(
                library.mtmd_get_output_embd(self._context), (num_tokens, self._width)
            )
            return found.copy()  # the next image is written over it
        finally:
            library.mtmd_input_chunks_free(chunks)
            library.mtmd_bitmap_free(bitmap)

    def close(self) -> None:
        """Free it; nothing else may be called afterwards."""
        if self._context:
            self._library.mtmd_free(self._context)
            self._context = None


def unreadable(path: Path, errors: Sequence[str]) -> str:
    """A sentence on a file that llama.cpp refuses."""
    return f"llama.cpp cannot open {path}: {_said(errors)}; export the model again with `mipha export --to gguf`"


def _said(errors: Sequence[str]) -> str:
    """The most telling of its messages: the first, those after it repeat that there was one."""
    return errors[0] if errors else "it gives no reason"
