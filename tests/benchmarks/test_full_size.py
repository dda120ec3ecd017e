"""The harness of a full-size model, with a small one."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import full_size
import pytest
import torch
from full_size import Encoded
from lengths import IMAGE_TOKENS

OPTIONS = {
    "samples": 3,
    "row_tokens": 4096,
    "repeats": 1,
    "frozen_tower": False,
    "activation_checkpointing": False,
    "peak_tflops": None,
}


def test_it_runs_on_a_cpu_and_claims_no_mfu_there(tmp_path: Path) -> None:
    full_size.measure(Namespace(**OPTIONS, size="small", out=tmp_path))
    found = json.loads((tmp_path / "full-size.json").read_text())
    assert len(found["rows"]) == 3
    losses = [float(found["about"][row["way"]].rsplit(" ", 1)[1]) for row in found["rows"]]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    assert torch.cuda.is_available() or "MFU" not in (tmp_path / "full-size.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_full_size_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        full_size.measure(Namespace(**OPTIONS, size="mipha-3b", out=tmp_path))


def test_samples_and_their_work() -> None:
    config = full_size._small_config()
    samples = full_size.draw_samples(config, 50)
    for sample in samples:
        images = int((sample.input_ids == config.image_token_id).sum())
        assert images == IMAGE_TOKENS * len(sample.images)
    import numpy as np

    ids = np.arange(4)
    work = full_size.work_of(
        [
            Encoded("a", ids, np.array([-100, -100, 2, 3]), ()),
            Encoded("b", ids[:2], np.array([0, 1]), (b"x",)),
        ]
    )
    assert (work.images, work.tokens, work.pairs, work.supervised) == (1, 6, 10 + 3, 2 + 1)
