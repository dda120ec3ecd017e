"""The steps of the OpenVINO benchmark around OpenVINO, which is not installed for tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import openvino_parity
import pytest


def test_the_export_stays_as_it_was_beside_the_one_that_crops(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    settings = {
        "size": {"height": 70, "width": 70},
        "do_center_crop": False,
        "crop_size": {"height": 70, "width": 70},
    }
    (plain / "preprocessor_config.json").write_text(json.dumps(settings))
    (plain / "weights.bin").write_bytes(b"w")

    openvino_parity.crop_instead(plain, tmp_path / "cropped")
    assert json.loads((plain / "preprocessor_config.json").read_text()) == settings
    cropped = json.loads((tmp_path / "cropped" / "preprocessor_config.json").read_text())
    assert cropped == settings | {"size": {"shortest_edge": 70}, "do_center_crop": True}
    assert (tmp_path / "cropped" / "weights.bin").read_bytes() == b"w"


def test_an_environment_without_openvino_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit,
        match=r"optimum-cli is not there: pip install 'optimum-intel\[openvino\]' openvino-genai",
    ):
        openvino_parity.export(tmp_path / "python", tmp_path, "fp32", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"genai failed on .*\n(.*\n)*.*No module named"):
        openvino_parity.ask(Path(sys.executable), "genai", tmp_path, [("a.png", "Which?")])
