"""llama.cpp, as PyPI's `xllamacpp` brings it prebuilt: runs our GGUF files, and quantises them.

answers, streaming, first logits:    its server, in this process        runtime.py
tokens, image embeddings:            its C functions, by ctypes         library.py
f16 -> q8_0, q4_k_m ...:             its rounding, our choice of types  quantize.py
"""

from mipha.deploy.llama_cpp.runtime import LlamaCpp, Reply

__all__ = ["LlamaCpp", "Reply"]
