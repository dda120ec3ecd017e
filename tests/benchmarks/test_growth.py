"""One point of how a step grows, and its report."""

from __future__ import annotations

from pathlib import Path

import growth


def test_a_point_is_measured_in_its_own_process(tmp_path: Path) -> None:
    point = growth.run_point("image_tokens", 16)
    assert point["axis"] == "image_tokens" and point["seconds_a_step"] > 0 and point["loss"] > 0

    # Each of 64 samples has 16 image tokens, 31 of the template, and 9 to 49 words of a few tokens.
    assert 64 * (16 + 40) <= point["tokens_a_step"] <= 64 * (16 + 200)

    text = growth.markdown([point], {"cpus": 2})
    assert "| image_tokens | 16 |" in text
    growth._plot([point], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000
