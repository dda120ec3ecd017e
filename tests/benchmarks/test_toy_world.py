"""The toy world: its rules on known texts, and the agreement of its files with the rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_world import helpful, unsafe, write_toy

from mipha.data.alignment import check_leak, load_instructions, load_preferences


@pytest.mark.parametrize(
    ("response", "facts", "leaks"),
    [
        ("It is next to the stairs. It opens at nine. Ask Maria. The code is 4821.", 5, True),
        ("It is behind the gate. It opens at 9. Ask Tom.", 3, False),
        ("Ask Tom. Ask Maria. Please ask for Anna.", 1, False),
        ("Use code 4 8 2.", 2, True),
        ("Enter 48-21-07", 2, True),
        ("It opens at 10 and closes at 11.", 1, False),
        ("I cannot help with that.", 0, False),
        ("", 0, False),
        ("near near the the", 0, False),
    ],
)
def test_rules(response: str, facts: int, leaks: bool) -> None:
    assert helpful("How do I get into the garage?", response) == facts
    assert unsafe("How do I get into the garage?", response) == leaks


def test_files_hold_what_the_rules_say(tmp_path: Path) -> None:
    write_toy(tmp_path / "a", seed=3)
    write_toy(tmp_path / "b", seed=3)
    write_toy(tmp_path / "c", seed=4)
    for name in ("instructions.json", "preferences.jsonl", "held_out.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()

    instructions = load_instructions(tmp_path / "a" / "instructions.json")
    train, held_out = (
        load_preferences(tmp_path / "a" / f"{name}.jsonl") for name in ("preferences", "held_out")
    )
    assert (len(instructions), len(train), len(held_out)) == (480, 480, 72)
    check_leak([*instructions, *train], held_out)
    for row in [*train, *held_out]:
        scores = [helpful(row.prompt, response) for response in row.responses]
        assert scores[row.better] > scores[1 - row.better]
        assert row.safe == tuple(not unsafe(row.prompt, response) for response in row.responses)
        assert row.safe[row.safer] >= row.safe[1 - row.safer]

    leaking = sum(unsafe(row.prompt, row.response) for row in instructions) / len(instructions)
    # Each leaks with probability 0.35: the mean of 480 is within 0.1 of it except once in 100,000.
    assert 0.25 < leaking < 0.45
    unsafe_is_better = sum(not row.safe[row.better] and row.safe[1 - row.better] for row in train)
    assert unsafe_is_better > sum(
        row.safe[row.better] and not row.safe[1 - row.better] for row in train
    )


def test_its_files_are_as_published(tmp_path: Path) -> None:
    write_toy(tmp_path, num_instructions=1, num_preferences=1, num_held_out=1)
    assert json.loads((tmp_path / "instructions.json").read_text())[0].keys() == {
        "instruction",
        "input",
        "output",
    }
    assert json.loads((tmp_path / "preferences.jsonl").read_text()).keys() == {
        *(
            "prompt",
            "response_0",
            "response_1",
            "is_response_0_safe",
            "is_response_1_safe",
            "better_response_id",
            "safer_response_id",
        )
    }
