"""A checkpoint as GGUF, for llama.cpp and what is built on it: the language model in one file, tower and projector in another.

config + weights --language_model--> model-f16.gguf, model-q4_k_m.gguf ...   tokenizer and chat template inside
                 --mmproj----------> mmproj-f16.gguf                         together in one folder, by `export_gguf`
"""
