"""One process holds a folder, a killed one leaves no lock, and a child ends with its parent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mipha import processes
from mipha.processes import child_environment, hold_folder

HOLD = """
import sys, time
from pathlib import Path
from mipha.processes import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""

PARENT = """
import os, subprocess, sys, time
from mipha.processes import child_environment
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]], env=os.environ | child_environment()
)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def start() -> Callable[..., subprocess.Popen]:
    """`start(code, *arguments)`: a Python process with that code, ended after the test."""
    begun = []

    def begin(code: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", code, *arguments]
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it has not come about within a minute")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_second_process_is_refused_by_name(
    start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.0)
    other = start(HOLD, str(tmp_path))
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(
            ValueError,
            match=rf"is in use by another process \(process {other.pid} on "
            rf"{socket.gethostname()}, since 20.*\): wait until it has ended",
        ),
        hold_folder(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == other.pid

    # A killed process leaves its file, but no lock.
    other.kill()
    other.wait()
    with hold_folder(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_just_ending_is_waited_for(start: Callable, tmp_path: Path) -> None:
    other = start(HOLD.replace("600", "1"), str(tmp_path))
    assert other.stdout.readline() == "held\n"
    with hold_folder(tmp_path):
        pass


def test_a_forked_child_of_a_killed_process_does_not_keep_the_lock(
    start: Callable, tmp_path: Path
) -> None:
    lines = "import os\n    child = os.fork()\n    if child: print(child, flush=True)"
    other = start(HOLD.replace('print("held", flush=True)', lines), str(tmp_path))
    child = int(other.stdout.readline())
    other.kill()
    other.wait()
    try:
        with hold_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_lock_that_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    """A run folder may come from a stranger: a link would empty the file that it leads to."""
    lock, precious = tmp_path / "run" / processes.LOCK, tmp_path / "precious"
    lock.parent.mkdir()
    precious.write_text("precious")
    make = {"link": lambda: lock.symlink_to(precious), "folder": lock.mkdir}
    make.get(kind, lambda: os.mkfifo(lock))()
    with pytest.raises(ValueError, match="is no plain file"), hold_folder(lock.parent):
        pass
    assert precious.read_text() == "precious"


def test_a_lock_is_released_where_the_block_raises(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), hold_folder(tmp_path):
            raise ZeroDivisionError


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    "module",
    [
        "from mipha.processes import end_with_parent; end_with_parent()",
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "from mipha import processes; processes.GRACE = 0.1; processes.end_with_parent()",
    ],
    ids=["gently", "deaf"],
)
def test_a_child_ends_with_its_killed_parent(start: Callable, module: str) -> None:
    parent = start(PARENT, f"{module}\nimport time; time.sleep(600)")
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(child))


def test_grandchildren_do_not_watch_their_grandparent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*next(iter(child_environment().items())))
    monkeypatch.setattr(processes, "end_with", lambda parent: None)
    processes.end_with_parent()
    assert not set(child_environment()) & os.environ.keys()


def test_a_system_without_flock_and_fork_says_that_nothing_is_locked(tmp_path: Path) -> None:
    """As Windows, which has neither fcntl nor resource."""
    program = (
        "import logging, os, random, signal, sys, threading\n"
        "from pathlib import Path\n"
        "sys.modules |= {'fcntl': None, 'resource': None}\n"
        "del os.register_at_fork, os.pread, signal.SIGKILL\n"
        "import mipha.cli\n"
        "from mipha.processes import hold_folder\n"
        "with hold_folder(Path(sys.argv[1])): print(os.listdir(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
    assert "run cannot be locked (this system has no flock): start no second" in done.stderr
