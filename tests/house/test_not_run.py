"""The end of a test run lists what was not run, with the reason, also of several workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    "test_file.py": 'import pytest\npytest.importorskip("no_such_package", reason="needs it")\n',
    "test_some.py": """
import pytest

def test_here():
    pass

@pytest.mark.skipif(True, reason="no browser")
def test_browser():
    pass

@pytest.mark.gpu
def test_gpu():
    pass
""",
}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_not_run_is_listed(workers: int, tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-n", str(workers), "-p", "tests.conftest"]
    command += ["-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", "pyproject.toml"]
    # Settings of the outer run would hold here too: the inner one would empty its --basetemp.
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout
    _, _, listed = done.stdout.partition(" not run ")
    assert {
        "all of test_file.py: needs it",
        "1 of test_some.py: no browser",
        "1 of test_some.py: marked gpu: pytest -m gpu",
    } <= set(listed.splitlines()), done.stdout
