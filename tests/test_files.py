from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mipha.files import (
    append_line,
    keep_lines,
    read_json,
    read_json_lines,
    read_json_object,
    read_lines,
    whole_folder,
    write_whole,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_that_another_process_fills_is_not_taken_from_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with whole_folder(folder) as partial:
        (partial / "config.json").write_text("{}")
        refused = pytest.raises(ValueError, match="being filled by another process")
        with refused, whole_folder(folder):
            pass
        (partial / "weights").write_text("whole")
    assert contents(folder) == {"config.json": b"{}", "weights": b"whole"}


@pytest.mark.parametrize("name", [".model.partial", ".model.replaced"])
def test_a_link_or_a_file_in_the_way_of_a_folder_is_removed_alone(
    tmp_path: Path, name: str
) -> None:
    folder, others = tmp_path / "model", tmp_path / "others"
    others.mkdir()
    (others / "precious").write_text("precious")
    (tmp_path / name).symlink_to(others)
    for content in ("first", "second"):
        with whole_folder(folder) as partial:
            (partial / "weights").write_text(content)
    (tmp_path / name).write_text("a file")
    with whole_folder(folder) as partial:
        (partial / "weights").write_text("third")
    assert contents(folder) == {"weights": b"third"}
    assert contents(others) == {"precious": b"precious"}


@pytest.mark.parametrize("line", ["[]", "{}", '{"step": "1"}', "5", "null"])
def test_metrics_without_a_step_are_a_sentence_with_their_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl .*: fix or delete that line"):
        keep_lines(path, 1)
    assert len(path.read_text().splitlines()) == 3


def test_a_number_of_thousands_of_digits_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"x": ' + "9" * 5000 + "}")
    with pytest.raises(ValueError, match=r"config\.json holds a number of thousands of digits"):
        read_json(path)


def test_write_whole_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores.json"
    write_whole(path, "old")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert contents(tmp_path) == {"scores.json": b"old"}


def test_write_whole_survives_a_kill_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    sizes = (300_000, 500_000)
    program = (
        "import sys; from pathlib import Path; from mipha.files import write_whole\n"
        f"write_whole(Path({str(path)!r}), 'a' * {sizes[0]}); print('go', flush=True)\n"
        f"while True: [write_whole(Path({str(path)!r}), 'a' * size) for size in {sizes}]"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == b"go\n"
    for _ in range(30):
        assert path.stat().st_size in sizes
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.stat().st_size in sizes


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    rows = [{"step": 1, "text": "naïve\n\u2028 two"}, {"step": 2, "text": ""}]
    for row in rows:
        append_line(path, row)
    assert list(read_lines(path)) == rows
    assert list(read_lines(tmp_path / "none.jsonl")) == []


def test_a_torn_last_line_is_dropped_and_cut_off_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2, "text": "na\xc3\xafve"}\n'
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) - 1):
        path.write_bytes(whole[:end])
        kept = 2 if whole[:end].endswith(b"}") and end > first else 1
        assert len(list(read_lines(path))) == kept, whole[:end]
        append_line(path, {"step": 3})
        assert [row["step"] for row in read_lines(path)] == [1, 3], whole[:end]


def test_a_whole_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    append_line(path, {"step": 3})
    assert [row["step"] for row in read_lines(path)] == [1, 2, 3]


def test_a_malformed_line_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not valid JSON"):
        list(read_lines(path))
    path.write_bytes(b'{"step": 1}\n{"ste\n')
    with pytest.raises(ValueError, match="line 2"):
        list(read_lines(path))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with whole_folder(folder) as partial:
        (partial / "a").write_text("first")
        assert not folder.exists()
    assert contents(folder) == {"a": b"first"}

    with pytest.raises(OSError, match="disk is full"), whole_folder(folder) as partial:
        (partial / "b").write_text("half")
        raise OSError("the disk is full")
    assert contents(folder) == {"a": b"first"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    with whole_folder(folder) as partial:
        (partial / "b").write_text("second")
    assert contents(folder) == {"b": b"second"}


def test_a_folder_is_filled_anew_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "torn").write_text("left by a killed process")
    with whole_folder(tmp_path / "model") as partial:
        (partial / "a").write_text("whole")
    assert contents(tmp_path / "model") == {"a": b"whole"}


def test_lines_of_later_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 5):
        append_line(path, {"step": step})
    keep_lines(path, 2)
    assert [row["step"] for row in read_lines(path)] == [1, 2]
    keep_lines(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"a": 1,\n', r"config\.json line 2 is not valid JSON \(.*\): copy it again"),
        (b'{"a": "\xff"}', r"config\.json is not UTF-8 text: copy it again"),
        (b"[1]", r"config\.json holds a JSON list, not an object: copy it again"),
    ],
)
def test_a_malformed_json_file_is_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_json_object(path)
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.json"):
        read_json(tmp_path / "gone.json")


def test_json_lines_come_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b"}) + "\n\n" + '{"text": "c"}\n')
    assert list(read_json_lines(path)) == [(1, {"text": "a\u2028b"}), (3, {"text": "c"})]
    path.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        list(read_json_lines(path))
