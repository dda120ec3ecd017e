"""The model: builds, loads, tunes and saves it; knows tensors, not question files.

Raises:
    OldPackage: transformers is older than the oldest version that computes these models.
"""

from mipha.errors import require_version

# transformers 5.20 to 5.22 keep the pooling head of a SigLIP that is read without it: its weights
# are then missing, and a tuned tower has tensors that no gradient reaches.
require_version("transformers", "5.23.0")
