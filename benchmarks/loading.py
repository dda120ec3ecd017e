"""Reading alone: samples a second by number of workers, parquet in windows, a million samples.

    python benchmarks/loading.py [--samples 512] [--side 448] [--windows] [--remote] [--million]
        [--out benchmarks/results]

The first part reads steps as training does (decode, tokenize, pack, collate), with 0, 1 and 2
workers, and collates a full row of text alone. `--windows` reads the rows of a parquet file with
the bytes of their images: in order, in windows of row groups, and in a full shuffle. The target for
windows is 80 % of the first. `--remote` reads them from a server that takes 50 ms for each answer,
with one process and with four, and reads a window of a million rows. The targets are 80 % again, no
block that is fetched twice, and 150 MB in a process. `--million` writes a million LLaVA
conversations about a million images, as JSON lines and as one JSON list. A fresh process then
indexes, checks, orders and reads each file. The targets are to index in under 2 minutes, and to
stay under 300 MB in a process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mipha.files import write_whole
from mipha.run import provenance

SECONDS, MEGABYTES = 120, 300
"""Limits of indexing a million samples: seconds, and megabytes of the process."""

SHARE_IN_WINDOWS = 0.8
"""Rows a second in windows, as a share of those in order."""

LATENCY = 0.05
"""Seconds that the server of `--remote` waits before each answer."""

WORKER_MEGABYTES = 150
"""Limit of a process that reads a window of a million rows."""

RANDOM_READS = 10_000
_FILES_A_FOLDER = 1_000


def workers(
    num_samples: int, side: int, counts: tuple[int, ...] = (0, 1, 2)
) -> list[dict[str, Any]]:
    """Measure reading by number of workers: samples a second, seconds to the first step, memory."""
    from torch.utils.data import DataLoader
    from workloads import SINGLE, quickstart_parts, stage_recipe, write_samples

    from mipha.data.batches import StepDataset, keep_step
    from mipha.data.mixture import Mixture
    from mipha.models.build import build

    workload = replace(SINGLE, batch_size=32)
    found = []
    with tempfile.TemporaryDirectory() as name:
        recipe = stage_recipe(
            write_samples(Path(name), workload, num_samples, side), workload, "finetune", "packed"
        )
        processor = build(quickstart_parts(workload))[1]
        steps = StepDataset(Mixture(recipe.data), processor, recipe, seed=0)
        _ = steps[0]  # load the image decoder and the like before the clock starts

        for count in counts:
            started = time.perf_counter()
            loader = iter(
                DataLoader(
                    steps,
                    batch_size=None,
                    sampler=range(len(steps)),
                    collate_fn=keep_step,
                    num_workers=count,
                )
            )

            read = len(next(loader).ids)
            first = time.perf_counter() - started
            memory = [_private_megabytes(worker.pid) for worker in getattr(loader, "_workers", [])]

            read += sum(len(step.ids) for step in loader)
            seconds = time.perf_counter() - started
            found.append(
                {
                    "workers": count,
                    "samples_per_second": round(read / seconds, 1),
                    "seconds_to_first_step": round(first, 2),
                    "megabytes_of_a_worker": [round(size) for size in memory],
                }
            )
    return found


def collate_a_row(row_tokens: int = 2048, sample_tokens: int = 128, repeats: int = 50) -> float:
    """Return the seconds that a full row of text samples takes to become tensors; the median."""
    from mipha.data.collate import collate
    from mipha.data.encode import Encoded
    from mipha.data.packing import make_rows

    ids = np.arange(sample_tokens) + 5
    samples = [Encoded(str(n), ids, ids, ()) for n in range(row_tokens // sample_tokens)]
    rows = make_rows(samples, row_tokens, "packed")
    assert [len(row) for row in rows] == [row_tokens]

    processor: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        collate(rows, processor)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def windows(
    num_rows: int = 20_000,
    image_bytes: int = 16_384,
    group_rows: int = 100,
    window_rows: int = 6_400,
    shuffled_rows: int = 500,
) -> list[dict[str, Any]]:
    """Measure reading of parquet: rows a second, reads of row groups, and memory of a process.

    Each way has a fresh process. The full shuffle, which decodes nearly a group a row, is measured
    on its first rows.
    """
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "train.parquet"
        write_parquet(file, num_rows, image_bytes, group_rows)
        found = []
        for way in ("in order", "in windows", "in windows again", "full shuffle"):
            told = {"file": str(file), "way": way, "window_rows": window_rows}
            told["most"] = shuffled_rows if way == "full shuffle" else num_rows
            done = subprocess.run(
                [sys.executable, __file__, "--windows-child", json.dumps(told)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=os.environ | {"MIPHA_CACHE": str(Path(name) / "cache")},
            )
            found.append(json.loads(done.stdout))
    return found


def write_parquet(file: Path, num_rows: int, image_bytes: int, group_rows: int) -> None:
    """Write rows like FineVision's, with random bytes for images."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    draw = random.Random(0)
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    turn = pyarrow.struct({"user": pyarrow.string(), "assistant": pyarrow.string()})
    schema = pyarrow.schema({"images": pyarrow.list_(kind), "texts": pyarrow.list_(turn)})
    with ParquetWriter(file, schema) as writer:
        for start in range(0, num_rows, group_rows):
            rows = [
                {
                    "images": [{"bytes": draw.randbytes(image_bytes), "path": None}],
                    "texts": [{"user": f"What is sign {n}?", "assistant": "A number."}],
                }
                for n in range(start, min(start + group_rows, num_rows))
            ]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


class SlowServer:
    """Some files behind an address, each answer of which comes late; counts what is fetched."""

    def __init__(self, folder: Path) -> None:
        fetched: Counter[str] = Counter()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                time.sleep(LATENCY)
                file, wanted = folder / self.path.strip("/"), self.headers.get("range")
                if not file.is_file():
                    self.send_error(404)
                    return
                size = file.stat().st_size
                begin, end = 0, size
                if wanted:
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    begin, end = int(first), int(last) + 1
                    fetched[f"{file.name} {wanted}"] += 1
                self.send_response(206 if wanted else 200)
                self.send_header("content-length", str(end - begin))
                self.send_header("content-range", f"bytes {begin}-{end - 1}/{size}")
                self.end_headers()
                if self.command == "GET":
                    with file.open("rb") as stream:
                        stream.seek(begin)
                        self.wfile.write(stream.read(end - begin))

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.fetched = fetched
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


def remote(
    num_rows: int = 6_400,
    image_bytes: int = 16_384,
    group_rows: int = 100,
    window_rows: int = 3_200,
    many_rows: int = 1_000_000,
) -> dict[str, Any]:
    """Measure reading over a network: rows a second by order and processes, and memory.

    Every way begins with an empty cache and a fresh process, and reads each row once.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parquet(folder / "train.parquet", num_rows, image_bytes, group_rows)
        write_parquet(folder / "million.parquet", many_rows, 0, group_rows)
        server = SlowServer(folder)

        def child(told: dict[str, Any], cache: str) -> dict[str, Any]:
            server.fetched.clear()
            done = subprocess.run(
                [sys.executable, __file__, "--windows-child", json.dumps(told)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=os.environ | {"MIPHA_CACHE": str(folder / cache)},
            )
            most = max(server.fetched.values())
            return json.loads(done.stdout) | {"most_fetches_of_a_block": most}

        told = {"file": f"{server.address}/train.parquet", "window_rows": window_rows}
        ways = [("in order", 1), ("in windows", 1), ("in order", 4), ("in windows", 4)]
        found = [
            child(
                told | {"way": way, "most": num_rows, "processes": processes}, f"{way} {processes}"
            )
            for way, processes in ways
        ]
        file = f"{server.address}/million.parquet"
        told = {"file": file, "way": "in windows", "window_rows": 16_384, "most": 16_384}
        return {"ways": found, "million": child(told | {"processes": 1}, "million")}


def read_windows(told: dict[str, Any]) -> dict[str, Any]:
    """Read a parquet file in one of the ways of `windows`."""
    from mipha.data import blocks
    from mipha.data.datasets import parquet
    from mipha.data.mixture import Mixture
    from mipha.recipe import DataRecipe

    data = DataRecipe(dataset="parquet", root=told["file"])
    processes = told.get("processes", 0)
    if "windows" in told["way"] or processes:
        update = {"cache_gb": 100.0, "window_rows": told["window_rows"]}
        data = data.model_copy(update=update)
    mixture = Mixture([data])
    is_shuffled = told["way"] != "in order"
    order = mixture.epoch_order(0, 0) if is_shuffled else np.arange(len(mixture))
    order = order[: told["most"]]

    decoded: list[Any] = []
    read_group = blocks._read_group
    blocks._read_group = lambda *one: decoded.append(one) or read_group(*one)  # type: ignore[func-returns-value]

    def read(own: np.ndarray) -> tuple[int, float]:
        for place in own:
            for image in mixture[place].images:
                image.read()  # type: ignore[union-attr]
        return len(decoded) or parquet._read_group.cache_info().misses, _megabytes()

    # Several processes share the rows as the workers of a data loader do.
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    parts = [order[number::processes] for number in range(processes)]
    workers = [
        context.Process(target=lambda part=part: queue.put(read(part)), daemon=True)
        for part in parts
    ]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    done = [queue.get() for _ in workers] or [read(order)]
    seconds = time.perf_counter() - started
    num_decoded = sum(number for number, _ in done)
    return {
        "way": told["way"] + (f", {processes} processes" if processes > 1 else ""),
        "rows": len(order),
        "rows_per_second": round(len(order) / seconds),
        "group_reads": num_decoded,
        "megabytes": round(max(size for _, size in done)),
    }


def write_million(folder: Path, number: int) -> tuple[Path, Path]:
    """Write LLaVA conversations as JSON lines and as one JSON list; each has its own image.

    One folder holds a thousand files, and many links lead to it. So each sample has its own path,
    with far fewer files.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    for place in range(min(number, _FILES_A_FOLDER)):
        (images / f"{place}.jpg").touch()
    for place in range(1, -(-number // _FILES_A_FOLDER)):
        (folder / f"images-{place}").symlink_to(images, target_is_directory=True)

    # Write the conversations.
    lines, array = folder / "train.jsonl", folder / "train.json"
    draw = random.Random(0)
    with lines.open("w") as as_lines, array.open("w") as as_list:
        as_list.write("[")
        for place in range(number):
            part, file = divmod(place, _FILES_A_FOLDER)
            question = (
                f"<image>\nWhat is written on sign number {place}?"
                + " Look at it closely." * draw.randrange(9)
            )
            answer = (
                f"It says {draw.randrange(10**6)}, in white letters."
                + " The rest is hidden." * draw.randrange(20)
            )
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            record = json.dumps(
                {
                    "id": str(place),
                    "image": f"images{f'-{part}' if part else ''}/{file}.jpg",
                    "conversations": turns,
                }
            )
            as_lines.write(record + "\n")
            as_list.write((",\n" if place else "") + record)
        as_list.write("]\n")
    return lines, array


def million(number: int) -> dict[str, Any]:
    """Measure a fresh process on each of the two files."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for file in write_million(Path(name), number):
            done = subprocess.run(
                [sys.executable, __file__, "--child", str(file)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found[file.name] = {
                "megabytes_of_the_file": round(file.stat().st_size / 1e6)
            } | json.loads(done.stdout)
    return found


def read_file(file: Path) -> dict[str, Any]:
    """Index, check, order and read a file, and measure the memory of this process after each."""
    from mipha.data.mixture import Mixture
    from mipha.recipe import DataRecipe

    found: dict[str, Any] = {"megabytes_before": round(_megabytes())}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started, cpu = time.perf_counter(), time.process_time()
        result = work()
        seconds = {
            "seconds": round(time.perf_counter() - started, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
        }
        found[name] = seconds | {"megabytes_after": round(_megabytes())}
        return result

    mixture = timed("index", lambda: Mixture((DataRecipe(dataset="llava", root=file),)))
    draw = random.Random(1)
    places = [draw.randrange(len(mixture)) for _ in range(min(RANDOM_READS, len(mixture)))]
    timed("random_reads", lambda: [mixture[place] for place in places] and None)
    timed("check", mixture.check)
    timed("order", lambda: mixture.epoch_order(0, 0))
    timed("order, 8 an image", lambda: mixture.epoch_order(0, 0, 8))
    return found | {
        "samples": len(mixture),
        "random_reads_per_second": round(len(places) / max(found["random_reads"]["seconds"], 1e-3)),
    }


def remote_verdict(found: dict[str, Any]) -> list[str]:
    """Return the missed targets of `remote`; empty if all are met."""
    ways = {row["way"]: row for row in found["ways"]}
    missed = []
    for processes in ("", ", 4 processes"):
        rows = [ways["in order" + processes], ways["in windows" + processes]]
        missed += [f"server{processes}: {one}" for one in window_verdict(rows, processes)]
    for row in (*found["ways"], found["million"]):
        if row["most_fetches_of_a_block"] > 1:
            missed.append(
                f"{row['way']}: a block is fetched {row['most_fetches_of_a_block']} times"
            )
    if found["million"]["megabytes"] > WORKER_MEGABYTES:
        missed.append(
            f"a million rows: {found['million']['megabytes']} MB, more than {WORKER_MEGABYTES}"
        )
    return missed


def window_verdict(rows: list[dict[str, Any]], processes: str = "") -> list[str]:
    """Return the missed target; empty if it is met."""
    speed = {row["way"]: row["rows_per_second"] for row in rows}
    share = speed["in windows" + processes] / speed["in order" + processes]
    if share >= SHARE_IN_WINDOWS:
        return []
    return [f"in windows: {share:.0%} of the rows a second in order, not {SHARE_IN_WINDOWS:.0%}"]


def verdict(found: dict[str, Any]) -> list[str]:
    """Return the missed targets; empty if all are met."""
    missed = []
    for file, phases in found.items():
        if phases["index"]["seconds"] > SECONDS:
            missed.append(f"{file}: indexed in {phases['index']['seconds']} s, more than {SECONDS}")
        for name, phase in phases.items():
            if isinstance(phase, dict) and phase["megabytes_after"] > MEGABYTES:
                missed.append(
                    f"{file}: {phase['megabytes_after']} MB after {name}, more than {MEGABYTES}"
                )
    return missed


def _megabytes(pid: int | str = "self") -> float:
    """Return the resident megabytes without mapped files, whose pages the system can take back."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in status if ":" in line)
    return int(sizes["RssAnon"].split()[0]) / 1024


def _private_megabytes(pid: int) -> float:
    """Return the megabytes of a worker that it does not share with the process that forked it."""
    rows = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    return sum(int(rows[key].split()[0]) for key in ("Private_Clean", "Private_Dirty")) / 1024


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=int, default=512, help="of the first part; 0 leaves it out"
    )
    parser.add_argument(
        "--side", type=int, default=448, help="side of the images in their files, pixels"
    )
    parser.add_argument("--windows", action="store_true")
    parser.add_argument("--remote", action="store_true")
    parser.add_argument("--million", action="store_true")
    parser.add_argument(
        "--number", type=int, default=1_000_000, help="number of samples of --million"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--windows-child", help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.child:
        print(json.dumps(read_file(options.child)))
        return
    if options.windows_child:
        print(json.dumps(read_windows(json.loads(options.windows_child))))
        return

    found: dict[str, Any] = {
        "about": provenance() | {"samples": options.samples, "side": options.side}
    }
    if options.samples:
        found["workers"] = workers(options.samples, options.side)
        found["collate_milliseconds"] = round(1000 * collate_a_row(), 3)
    missed: list[str] = []
    if options.windows:
        found["windows"] = windows()
        missed += window_verdict(found["windows"])
    if options.remote:
        found["remote"] = remote()
        missed += remote_verdict(found["remote"])
    if options.million:
        found["million"] = million(options.number)
        missed += verdict(found["million"])
    if options.windows or options.remote or options.million:
        found["missed"] = missed

    write_whole(options.out / "loading.json", json.dumps(found, indent=2) + "\n")
    write_whole(options.out / "loading.md", _markdown(found))
    if options.samples:
        _plot(found["workers"], options.out / "loading.png")
    print(_markdown(found))


def _markdown(found: dict[str, Any]) -> str:
    lines = ["# Reading alone"]
    if "workers" in found:
        lines += [
            "",
            "| workers | samples/s | seconds to the first step | MB of a worker |",
            "|---|---|---|---|",
        ]
    for row in found.get("workers", ()):
        sizes = ", ".join(map(str, row["megabytes_of_a_worker"])) or "-"
        lines.append(
            f"| {row['workers']} | {row['samples_per_second']} "
            f"| {row['seconds_to_first_step']} | {sizes} |"
        )

    if "collate_milliseconds" in found:
        milliseconds = found["collate_milliseconds"]
        lines += ["", f"A row of 2,048 tokens of text is collated in {milliseconds} ms."]
    if "windows" in found:
        lines += [
            "",
            "| parquet | rows/s | rows | reads of row groups | MB |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['way']} | {row['rows_per_second']:,} | {row['rows']:,} "
            f"| {row['group_reads']:,} | {row['megabytes']} |"
            for row in found["windows"]
        ]
    if "remote" in found:
        lines += [
            "",
            f"| from a server, {1000 * LATENCY:.0f} ms an answer | rows/s | rows | blocks fetched "
            "| fetches of one block | MB of a process |",
            "|---|---|---|---|---|---|",
        ]
        million = found["remote"]["million"] | {"way": "a window of a million rows"}
        lines += [
            f"| {row['way']} | {row['rows_per_second']:,} | {row['rows']:,} "
            f"| {row['group_reads']:,} | {row['most_fetches_of_a_block']} | {row['megabytes']} |"
            for row in (*found["remote"]["ways"], million)
        ]
    for file, phases in found.get("million", {}).items():
        lines += [
            "",
            f"{phases['samples']:,} samples, {file} ({phases['megabytes_of_the_file']} MB):",
            "",
        ]
        lines += ["| phase | seconds | CPU seconds | MB held after it |", "|---|---|---|---|"]
        for name, phase in phases.items():
            if isinstance(phase, dict):
                lines.append(
                    f"| {name} | {phase['seconds']} | {phase['cpu_seconds']} "
                    f"| {phase['megabytes_after']} |"
                )

    if "missed" in found:
        lines += ["", *(f"- missed: {sentence}" for sentence in found["missed"] or ["nothing"])]
    lines += ["", *(f"- {key}: {value}" for key, value in found["about"].items())]
    return "\n".join(lines) + "\n"


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [f"{row['workers']} workers" for row in rows],
        [row["samples_per_second"] for row in rows],
        color="#3465a4",
    )
    axes.invert_yaxis()
    axes.set_xlabel("samples a second, decoded, tokenized, packed")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
