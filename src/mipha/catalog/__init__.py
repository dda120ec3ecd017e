"""Facts as data: which language model, which tower, which template, which recipe. Nothing here imports torch."""
