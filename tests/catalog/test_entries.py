"""Every entry of the catalog has a place, a licence, a source and its true config."""

from __future__ import annotations

import re

import pytest

from mipha.catalog.full_size import CONFIGS, part_config
from mipha.catalog.language_models import LANGUAGE_MODELS
from mipha.catalog.vision_towers import VISION_TOWERS
from mipha.lookup import files_in
from mipha.models.packaged import PACKAGED
from mipha.preflight import CHAT_TEMPLATES

PARTS = VISION_TOWERS | LANGUAGE_MODELS
# Section 4.2 and Tables 1 and 2 of the paper.
PAPER_TOWERS = {
    "siglip-so400m-384",
    "siglip-large-384",
    "clip-large-336",
    "dinov2-large",
    "vit-large-in21k",
}
PAPER_LANGUAGE_MODELS = {
    "phi-2",
    "phi-1.5",
    "gemma-2b",
    "qwen1.5-1.8b",
    "stablelm-2-1.6b",
    "pythia-1.4b",
    "pythia-2.8b",
}


@pytest.mark.parametrize("name", PARTS)
def test_an_entry_says_where_and_whence(name: str) -> None:
    entry = PARTS[name]
    packaged = entry.path.removeprefix("packaged:")
    assert (
        packaged in PACKAGED
        if packaged != entry.path
        else re.fullmatch(r"untrained|[\w-]+/[\w.-]+", entry.path)
    )
    assert entry.licence and entry.source
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name)


def test_each_name_has_its_config_and_no_config_is_left_over() -> None:
    assert len(PARTS) == len(VISION_TOWERS) + len(LANGUAGE_MODELS), (
        "a tower and a language model of one name"
    )
    assert set(files_in(CONFIGS, ".json")) == set(PARTS)


def test_the_parts_of_the_paper_are_there() -> None:
    assert set(VISION_TOWERS) >= PAPER_TOWERS
    assert set(LANGUAGE_MODELS) >= PAPER_LANGUAGE_MODELS
    assert {LANGUAGE_MODELS[name].chat_template for name in PAPER_LANGUAGE_MODELS} == {"vicuna"}


def test_each_template_is_there_and_used() -> None:
    assert {entry.chat_template for entry in LANGUAGE_MODELS.values()} == set(
        files_in(CHAT_TEMPLATES, ".jinja")
    )


def test_a_part_without_a_config_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no config of a part 'phi2': did you mean phi-2"):
        part_config("phi2")
