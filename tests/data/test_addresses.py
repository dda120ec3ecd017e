"""Data behind addresses, from a server that fails by rule: copied whole, once, or named."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mipha.data import addresses
from mipha.data.addresses import copy_to_cache
from mipha.data.batches import StepDataset
from mipha.data.dataset import data_recipe, load_data
from mipha.data.mixture import Mixture
from mipha.recipe import DataRecipe

pytest.importorskip("httpx")
FIELD = Path(__file__).parent / "field"
ROWS = b"".join(
    json.dumps({"question": f"{number}?", "answer": "x" * 50}).encode() + b"\n"
    for number in range(200)
)


class Server:
    """Files by path, and rules of failing: `(method, begin) -> status, headers, bytes sent`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.rule: Callable[[str, int], tuple[int, dict[str, str], int | None] | None]
        self.rule = lambda method, begin: None
        self.has_ranges = True
        self.requests: list[tuple[str, str, str | None]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name, wanted = request.path.lstrip("/"), request.headers.get("range")
        self.requests.append((request.command, name, wanted))
        begin, end = 0, None
        if wanted and self.has_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), int(last) + 1 if last else None
        content = self.files.get(name)
        status, headers, sent = self.rule(request.command, begin) or (
            404 if content is None else 206 if begin or end else 200,
            {},
            None,
        )
        body = b"" if content is None or status >= 400 else content[begin:end]
        request.send_response(status)
        request.send_header("content-length", str(len(body)))
        if status == 206 and content is not None:
            place = f"bytes {begin}-{begin + len(body) - 1}/{len(content)}"
            request.send_header("content-range", place)
        request.send_header("etag", self.etags.get(name, '"1"'))
        for key, value in headers.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body[:sent])
            if sent is not None:
                request.close_connection = True
                request.connection.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MIPHA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(addresses, "FIRST_WAIT", 0.001)
    made = Server()
    made.files["train.jsonl"] = ROWS
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_copy_is_made_once(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    first = copy_to_cache(f"{server.address}/train.jsonl")
    assert first.read_bytes() == ROWS and first.name == "train.jsonl"
    assert "copying 1 files" in capfd.readouterr().err
    assert copy_to_cache(f"{server.address}/train.jsonl") == first
    assert Counter(method for method, *_ in server.requests) == {"HEAD": 2, "GET": 1}
    assert "copying" not in capfd.readouterr().err


def test_braces_are_many_files(server: Server) -> None:
    for number in range(3):
        server.files[f"{number:03d}.jsonl"] = ROWS[: 100 * number] + b"{}\n"
    folder = copy_to_cache(f"{server.address}/{{000..002}}.jsonl")
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == [
        "000.jsonl",
        "001.jsonl",
        "002.jsonl",
    ]


def test_a_transfer_that_is_cut_goes_on_where_it_ended(server: Server) -> None:
    server.rule = lambda method, begin: (
        (206 if begin else 200, {}, 4_000) if method == "GET" and begin < 8_000 else None
    )
    assert copy_to_cache(f"{server.address}/train.jsonl").read_bytes() == ROWS
    ranges = [wanted for method, _, wanted in server.requests if method == "GET"]
    assert ranges == [None, "bytes=4000-", "bytes=8000-"]


def test_a_server_without_ranges_begins_again(server: Server) -> None:
    server.has_ranges = False
    cuts = iter([5_000, 6_000, None])
    server.rule = lambda method, begin: (200, {}, next(cuts)) if method == "GET" else None
    assert copy_to_cache(f"{server.address}/train.jsonl").read_bytes() == ROWS


@pytest.mark.parametrize("headers", [{}, {"retry-after": "0"}])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(server: Server, status: int, headers: dict) -> None:
    busy = iter([True, True, False, True, False])
    server.rule = lambda method, begin: (status, headers, None) if next(busy) else None
    assert copy_to_cache(f"{server.address}/train.jsonl").read_bytes() == ROWS


def test_a_server_that_stays_busy_is_named(server: Server) -> None:
    address = f"{server.address}/train.jsonl"
    server.rule = lambda method, begin: (503, {}, None)
    with pytest.raises(ConnectionError, match=rf"{address} failed 6 times: it answers 503; run"):
        copy_to_cache(address)
    server.rule = lambda method, begin: (503, {}, None) if method == "GET" else None
    with pytest.raises(ConnectionError, match=r"byte 0 of .*, failed 6 times"):
        copy_to_cache(address)
    server.rule = lambda method, begin: None
    assert copy_to_cache(address).read_bytes() == ROWS


@pytest.mark.parametrize(
    ("status", "kind", "sentence"),
    [
        (401, PermissionError, "wants a login"),
        (403, PermissionError, "does not let you read it"),
        (404, FileNotFoundError, "there is no such file: check the address"),
        (418, ValueError, "answers 418"),
    ],
)
def test_what_will_not_change_is_not_asked_again(
    server: Server, status: int, kind: type[Exception], sentence: str
) -> None:
    server.rule = lambda method, begin: (status, {}, None)
    with pytest.raises(kind, match=sentence):
        copy_to_cache(f"{server.address}/train.jsonl")
    assert len(server.requests) == 1


def test_a_file_that_changed_is_an_error(server: Server, tmp_path: Path) -> None:
    address = f"{server.address}/train.jsonl"
    copy_to_cache(address)
    server.etags["train.jsonl"] = '"2"'
    with pytest.raises(ValueError, match="changed since it was copied"):
        copy_to_cache(address)

    # While it is copied.
    server.etags["b.jsonl"], server.files["b.jsonl"] = '"1"', ROWS

    def change(method: str, begin: int) -> tuple[int, dict[str, str], int | None] | None:
        if method == "GET" and not begin:
            server.etags["b.jsonl"] = '"1"'
            return 200, {}, 500
        server.etags["b.jsonl"] = '"2"' if method == "GET" else '"1"'
        return None

    server.rule = change
    with pytest.raises(ValueError, match="changed while it was copied"):
        copy_to_cache(f"{server.address}/b.jsonl")
    assert not list((tmp_path / "cache").rglob("b.jsonl"))


def test_a_full_disk_is_said_before_it_is_full(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = addresses.shutil.disk_usage("/")
    monkeypatch.setattr(addresses.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match="set MIPHA_CACHE to a folder on a larger disk"):
        copy_to_cache(f"{server.address}/train.jsonl")


def test_processes_of_a_machine_share_one_copy(server: Server) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(copy_to_cache, [f"{server.address}/train.jsonl"] * 3, chunksize=1)
    assert len(set(found)) == 1 and found[0].read_bytes() == ROWS
    assert [method for method, *_ in server.requests].count("GET") == 1


def test_file_systems_of_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("MIPHA_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    for name in ("set/train/a.jsonl", "set/train/b.jsonl"):
        memory.pipe(f"/{name}", ROWS)
    assert copy_to_cache("memory://set/train/a.jsonl").read_bytes() == ROWS
    folder = copy_to_cache("memory://set")
    assert (folder / "train/b.jsonl").read_bytes() == ROWS
    assert len(load_data(data_recipe("memory://set"))) == 400
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        copy_to_cache("memory://nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        copy_to_cache("nosuch://bucket/file.jsonl")


@pytest.mark.parametrize(
    "address",
    [
        "https://me:pw@host/a.tar",
        "https://hf_abc@host/a.tar",
        "https://host/a.tar?token=x",
        "s3://bucket/a.tar?X-Amz-Signature=x",
    ],
)
def test_an_address_with_a_credential_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(ValueError, match="root: the address holds a credential") as raised:
        data_recipe(address)
    assert address not in str(raised.value)


def test_addresses_are_kept_as_written() -> None:
    recipe = data_recipe("https://host/a//{00..11}.tar?x=1")
    assert recipe.root == "https://host/a//{00..11}.tar?x=1" == recipe.model_dump()["root"]
    assert recipe.root_name == "{00..11}.tar?x=1"
    assert DataRecipe(dataset="auto", root="a/b").root == Path("a/b")


def test_steps_are_those_of_the_same_files_on_disk(
    server: Server, tiny_model: Callable, tiny_run_recipe: Callable
) -> None:
    pytest.importorskip("pyarrow")
    folder = FIELD / "finevision-mirror/mirror/ocr"
    for number in range(2):
        name = f"train-0000{number}-of-00002.parquet"
        server.files[name] = (folder / name).read_bytes()
    stage = tiny_run_recipe("stages.finetune.max_steps=null").stages["finetune"]
    address = server.address + "/train-{00000..00001}-of-00002.parquet"

    def steps(root: Path | str) -> list[Any]:
        mixture = Mixture([DataRecipe(dataset="auto", root=root)])
        made = StepDataset(mixture, tiny_model()[1], stage, seed=0)
        return [batch for step in made for batch in step.micro_batches]

    local, remote = steps(folder), steps(address)
    assert len(local) == len(remote) > 0
    for ours, theirs in zip(local, remote, strict=True):
        assert all((ours[key] == theirs[key]).all() for key in ("input_ids", "labels"))
        if ours.get("pixel_values") is not None:
            assert (ours["pixel_values"] == theirs["pixel_values"]).all()
