"""A checkpoint as GGUF: the language model in one file, tower and projector in another.

config + weights --language_model, tokenizer--> model-f16.gguf, model-q4_k_m.gguf ...
                 --mmproj---------------------> mmproj-f16.gguf
`export.export_gguf` writes both into one folder, each file by `writer`.
"""
