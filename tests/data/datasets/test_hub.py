"""Sets of the hub: a folder with the hub's layout, and a small hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from mipha.data.dataset import data_recipe, load_data
from mipha.data.mixture import Mixture
from mipha.recipe import DataRecipe

pytest.importorskip("datasets")
pytest.importorskip("pyarrow")
MIRROR = Path(__file__).parents[1] / "field/finevision-mirror/mirror"
COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIPHA_CACHE", str(tmp_path / "cache"))


def test_files_of_a_config_are_those_the_readme_names() -> None:
    for name, num_rows in (("ocr", 7), ("general", 2)):
        for dataset in ("auto", "hub"):
            data = load_data(DataRecipe(dataset=dataset, root=MIRROR, config=name))
            assert (len(data), data.name) == (num_rows, f"mirror/{name}")
    assert data.records[0].id == "hub/general/train-00000-of-00001/0"
    assert data.file_of(0) == "general/train-00000-of-00001.parquet"


def test_the_same_picture_of_two_configs_has_one_key() -> None:
    recipes = [DataRecipe(dataset="hub", root=MIRROR, config=name) for name in ("ocr", "general")]
    keys = Mixture(recipes).image_keys
    assert keys[0] == keys[5] == keys[7] and keys[2] == 0
    assert len(set(keys.tolist())) == 6


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ([], r"pick one among the available configs: \['ocr', 'general'\]"),
        (["config=nope"], r"'nope' not found. Available: \['ocr', 'general'\]"),
        (["config=ocr", "split=test"], r"config ocr, has no split 'test': use train"),
        (["config=ocr", "revision=main"], "revision=main has no effect with the folder"),
    ],
)
def test_what_is_not_there_is_named(settings: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_data(data_recipe(str(MIRROR), settings=settings))


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A server of the routes that `huggingface_hub` and `datasets` ask; and what they asked."""
    files = {
        path.relative_to(MIRROR).as_posix(): path.read_bytes()
        for path in MIRROR.rglob("*")
        if path.is_file()
    }
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).removeprefix("/")
            asked.append(f"{self.command} {path}")
            api, files_at = "api/datasets/lab/mirror", f"datasets/lab/mirror/resolve/{COMMIT}/"
            if path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": name} for name in files]
                self.send(200, {"id": "lab/mirror", "sha": COMMIT, "siblings": siblings})
            elif path.startswith(f"{api}/tree/{COMMIT}"):
                folder = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
                self.send(200, list(self.tree(folder, "recursive=true" in self.path.lower())))
            elif path.removeprefix(files_at) in files:
                content = files[path.removeprefix(files_at)]
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                headers = {"X-Repo-Commit": COMMIT, "ETag": etag}
                wanted = self.headers.get("range")
                if wanted and self.command == "GET":
                    begin, end = map(int, wanted.removeprefix("bytes=").split("-"))
                    asked.append(f"PART {path}")
                    part = content[begin : end + 1]
                    place = f"bytes {begin}-{begin + len(part) - 1}/{len(content)}"
                    self.send(206, part, headers | {"content-range": place})
                    return
                self.send(200, content, headers)
            else:
                code = "EntryNotFound" if "lab/mirror" in path else "RepoNotFound"
                self.send(404, {"error": "no"}, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            asked.append(f"POST {self.path}")
            form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
            found = [
                {"type": "file", "oid": "0" * 40, "size": len(files[name]), "path": name}
                for name in form["paths"]
            ]
            self.send(200, found)

        def tree(self, folder: str, whole: bool) -> Iterator[dict[str, Any]]:
            begin = f"{folder}/" if folder else ""
            inside = [name for name in files if name.startswith(begin)]
            for name in inside if whole else [n for n in inside if "/" not in n[len(begin) :]]:
                size = len(files[name])
                yield {"type": "file", "oid": "0" * 40, "size": size, "path": name}
            for part in sorted({n[len(begin) :].split("/")[0] for n in inside} - set(inside)):
                if f"{begin}{part}" not in files:
                    yield {"type": "directory", "oid": "0" * 40, "path": begin + part}

        def send(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for key, value in {"content-length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("settings", [(), ("cache_gb=1",)], ids=["copied", "in parts"])
def test_a_config_is_fetched_from_the_hub(
    hub: tuple[str, list[str]], tmp_path: Path, settings: tuple[str, ...]
) -> None:
    address, asked = hub
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
    }

    def check(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mipha", "check", f"hf://datasets/{name}", "config=ocr"]
        command += settings
        command += ["--json", str(tmp_path / "out.json")]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    result = check("lab/mirror")
    assert f"hf://datasets/lab/mirror is commit {COMMIT}" in result.stderr, result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["samples"], report["images"]) == (7, 10)
    assert [file["file"] for file in report["files"]] == [
        "ocr/train-00000-of-00002.parquet",
        "ocr/train-00001-of-00002.parquet",
    ]
    assert any(path.startswith("PART") for path in asked) == bool(settings)
    if settings:
        return
    assert not any("general" in path for path in asked if "resolve" in path), "only what is named"

    result = check("lab/nothing")
    assert result.returncode == 2 and "no data set lab/nothing that you may read" in result.stderr
