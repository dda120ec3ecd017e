"""A checkpoint as a server with OpenAI's interface: one front for all engines, so that limits, errors and figures are the same."""
