"""llama.cpp, as PyPI's `xllamacpp` brings it prebuilt: asked from Python what it makes of our GGUF files, and made to quantise them.

answers, streaming, first logits:    its server, in this process        runtime.py
words, image embeddings:             its C functions, by ctypes         library.py, parts.py
f16 -> q8_0, q4_k_m ...:             its rounding, our choice of types  quantize.py
"""

from mipha.deploy.llama_cpp.quantize import quantize_gguf
from mipha.deploy.llama_cpp.runtime import LlamaCpp, Reply

__all__ = ["LlamaCpp", "Reply", "quantize_gguf"]
