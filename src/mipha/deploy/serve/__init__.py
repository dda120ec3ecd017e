"""A checkpoint as a server with OpenAI's interface.

One front stands before all engines, so that limits, errors and figures are the same:
server (start and stop) -> app (routes) -> chat (one request) -> requests (reading it) -> an engine,
which is batching (transformers) or child (llama.cpp, vLLM).
"""
