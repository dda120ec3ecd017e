"""Questions -> predictions.jsonl -> scores.json, by each benchmark's own rules."""
