"""Questions -> predictions.jsonl -> scores.json: how good a model is, by each benchmark's own rules."""
