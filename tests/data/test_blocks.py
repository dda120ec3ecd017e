"""Row groups behind an address: each is fetched once a window, by all processes together."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from mipha.data import addresses, blocks
from mipha.data.batches import StepDataset, keep_step
from mipha.data.blocks import Blocks, index_address
from mipha.data.dataset import data_recipe, load_data
from mipha.data.faults import RecordError
from mipha.data.images import is_readable, open_image, size_or_grey
from mipha.data.mixture import Mixture
from mipha.data.sample import Sample
from mipha.recipe import DataRecipe
from tests.data.test_addresses import Server

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("httpx")

TAR_SAMPLES = 40
FILES, GROUPS, ROWS = 2, 6, 10
"""Files; row groups of each; rows of each."""


def parquet_bytes(file: int, **options: Any) -> bytes:
    """Return a file like FineVision's, whose rows name their place."""
    import pyarrow.parquet as parquet

    rows = []
    for number in range(GROUPS * ROWS):
        picture = io.BytesIO()
        Image.new("RGB", (8, 8), (file, number, 0)).save(picture, "PNG")
        texts = [{"user": f"{file}/{number}?", "assistant": "red"}]
        rows.append({"images": [{"bytes": picture.getvalue(), "path": None}], "texts": texts})
    rows[3]["images"] = []
    content = io.BytesIO()
    options = {"row_group_size": ROWS, "write_page_checksum": True} | options
    parquet.write_table(pyarrow.Table.from_pylist(rows), content, **options)
    return content.getvalue()


def tar_bytes(number: int) -> tuple[bytes, bytes]:
    """Return a tar whose samples name their place, and the index that lies beside it."""
    content, starts = io.BytesIO(), []
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in range(TAR_SAMPLES):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (number, sample, 1)).save(picture, "PNG")
            folder = "a" * 120 if sample == 7 else "a"  # one name needs a header of its own
            record = {"question": f"{number}/{sample}?", "answer": "red"}
            starts.append(tar.offset)
            for suffix, file in (
                ("png", picture.getvalue()),
                ("json", json.dumps(record).encode()),
            ):
                member = tarfile.TarInfo(f"{folder}/{sample:04d}.{suffix}")
                member.size = len(file)
                tar.addfile(member, io.BytesIO(file))
            if sample == 20 and number == 0:
                tar.addfile(tarfile.TarInfo("a/README.md"))
        starts.append(tar.offset)
    return content.getvalue(), np.array(starts, dtype="<u8").tobytes()


@pytest.fixture
def tars(server: Server, monkeypatch: pytest.MonkeyPatch) -> DataRecipe:
    """Two tars on the server, one with the index beside it; a block has some ten samples."""
    monkeypatch.setattr(blocks, "_STRETCH", 20_480)
    for number in range(2):
        server.files[f"{number}.tar"], index = tar_bytes(number)
    server.files["1.tar.idx"] = index
    root = server.address + "/{0..1}.tar"
    return DataRecipe(dataset="auto", root=root, cache_gb=1, window_rows=40)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MIPHA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(addresses, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(blocks, "_open_tables", type(blocks._open_tables)())
    made = Server()
    for file in range(FILES):
        made.files[f"{file}.parquet"] = parquet_bytes(file)
    yield made
    made.server.shutdown()
    made.server.server_close()


def recipe(server: Server, cache_gb: float = 1, window_rows: int | None = 40) -> DataRecipe:
    root = server.address + "/{0..1}.parquet"
    return DataRecipe(dataset="auto", root=root, cache_gb=cache_gb, window_rows=window_rows)


def fetched(server: Server) -> Counter[tuple[str, str]]:
    """Count the requests for row groups; footers are not among them."""
    size = len(server.files["0.parquet"])
    return Counter(
        (name, wanted)
        for method, name, wanted in server.requests
        if method == "GET" and wanted and int(wanted.rpartition("-")[2]) < size - 1
    )


def read(mixture: Mixture, order: np.ndarray) -> list[Sample]:
    samples = []
    for index in order:
        samples.append(mixture[index])
        for image in samples[-1].images:
            assert image.read().startswith(b"\x89PNG")  # type: ignore[union-attr]
    return samples


def test_samples_are_those_of_the_files(server: Server, tmp_path: Path) -> None:
    for name, content in server.files.items():
        (tmp_path / name).write_bytes(content)
    local = Mixture([DataRecipe(dataset="auto", root=tmp_path / f"{n}.parquet") for n in range(2)])
    remote = Mixture([recipe(server)])
    assert len(remote) == len(local) == FILES * GROUPS * ROWS
    for ours, theirs in zip(remote, local, strict=True):
        assert ours.messages == theirs.messages
        assert [i.read() for i in ours.images] == [i.read() for i in theirs.images]  # type: ignore[union-attr]
    assert len(remote[3].images) == 0


def test_a_start_reads_footers_only(server: Server) -> None:
    mixture = Mixture([recipe(server)])
    mixture.check()
    mixture.epoch_order(0, 0)
    assert not fetched(server)
    assert "12 blocks are read in 3 windows of about 40 samples" in mixture.notes[-1]
    assert "a window mixes 4 blocks: raise window_rows" in mixture.notes[-1]
    asked = len(server.requests)
    Mixture([recipe(server)])
    assert [method for method, *_ in server.requests[asked:]] == ["HEAD"] * FILES


def test_each_group_is_fetched_once_an_epoch(server: Server) -> None:
    mixture = Mixture([recipe(server)])
    read(mixture, mixture.epoch_order(0, 0))
    assert len(fetched(server)) == FILES * GROUPS and set(fetched(server).values()) == {1}


def test_a_cache_of_a_window_is_enough(server: Server) -> None:
    """Of 12 groups a window holds 4; the cache has room for 6."""
    read(Mixture([recipe(server)]), np.arange(ROWS))
    (entry,) = (blocks.cache_folder() / "blocks").glob("*/*.arrow")
    limit = 6 * entry.stat().st_size / 1e9
    small = Mixture([recipe(server, cache_gb=limit)])
    for epoch in range(2):
        server.requests.clear()
        read(small, small.epoch_order(0, epoch))
        assert set(fetched(server).values()) == {1}


def test_a_cache_that_is_too_small_gives_the_same_samples(server: Server) -> None:
    mixture, small = Mixture([recipe(server)]), Mixture([recipe(server, cache_gb=1e-6)])
    order = small.epoch_order(0, 0)
    assert (order == mixture.epoch_order(0, 0)).all()
    ours = [sample.messages for sample in read(small, order)]
    assert ours == [sample.messages for sample in read(mixture, order)]
    assert len(list((blocks.cache_folder() / "blocks").glob("*/*.arrow"))) <= FILES * GROUPS
    assert max(fetched(server).values()) > 1


def _read_part(own: Mixture, order: np.ndarray) -> int:
    blocks._open_tables.clear()
    return len(read(own, order))


def test_processes_of_a_machine_share_the_groups(server: Server) -> None:
    mixture = Mixture([recipe(server)])
    order = mixture.epoch_order(0, 0)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(partial(_read_part, mixture), [order[n::4] for n in range(4)], chunksize=1)
    assert sum(found) == len(mixture)
    assert len(fetched(server)) == FILES * GROUPS and set(fetched(server).values()) == {1}


def test_a_window_holds_whole_groups(server: Server) -> None:
    mixture = Mixture([recipe(server)])
    orders = [mixture.epoch_order(0, epoch) for epoch in range(2)]
    for order in orders:
        assert sorted(order) == list(range(len(mixture)))
        windows = [set(order[start : start + 40] // ROWS) for start in range(0, len(order), 40)]
        assert [len(groups) for groups in windows] == [4, 4, 4]
        assert (np.diff(order[:40]) != 1).sum() > 20
    assert not (orders[0] == orders[1]).all()
    assert (orders[0] == Mixture([recipe(server)]).epoch_order(0, 0)).all()


def test_other_data_sets_are_spread_evenly_between(server: Server, tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"{n}?", "answer": "x"}) + "\n" for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    other = DataRecipe(dataset="auto", root=tmp_path / "rows.jsonl", weight=0.5)
    mixture = Mixture([recipe(server), other])
    order = mixture.epoch_order(0, 0)
    assert len(order) == mixture.num_per_epoch == 150 and len(set(order)) == 150
    own = order[order < 120]
    assert (own == Mixture([recipe(server)]).epoch_order(0, 0)).all()
    assert 5 < (order[:75] >= 120).sum() < 25


def test_steps_go_on_with_other_processes(
    server: Server, tiny_model: Callable, tiny_run_recipe: Callable
) -> None:
    stage = tiny_run_recipe("stages.finetune.max_steps=null").stages["finetune"]

    def steps(rank: int, world_size: int, numbers: range) -> list[Any]:
        blocks._open_tables.clear()
        made = StepDataset(Mixture([recipe(server)]), tiny_model()[1], stage, 0, rank, world_size)
        return [made[number].ids for number in numbers]

    whole = steps(0, 1, range(8))
    assert steps(0, 2, range(4)) + steps(1, 2, range(4, 8)) == whole
    assert set(fetched(server).values()) == {1}


def test_steps_go_on_with_other_workers(
    server: Server, tiny_model: Callable, tiny_run_recipe: Callable
) -> None:
    stage = tiny_run_recipe("stages.finetune.max_steps=null").stages["finetune"]
    made = StepDataset(Mixture([recipe(server)]), tiny_model()[1], stage, 0)

    def batches(start: int, workers: int) -> list[Any]:
        blocks._open_tables.clear()
        loader = DataLoader(
            made,
            batch_size=None,
            sampler=range(start, len(made)),
            collate_fn=keep_step,
            num_workers=workers,
        )
        return [batch for step in loader for batch in step.micro_batches]

    whole = batches(0, 0)
    assert len(fetched(server)) == FILES * GROUPS and set(fetched(server).values()) == {1}
    for path in (blocks.cache_folder() / "blocks").glob("*/*.arrow"):
        path.unlink()
    server.requests.clear()
    resumed = batches(len(made) // 2, 2)
    assert set(fetched(server).values()) == {1}
    assert len(resumed) > 0
    for ours, theirs in zip(resumed, whole[-len(resumed) :], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("input_ids", "labels", "pixel_values"):
            assert (ours.get(key) is None) == (theirs.get(key) is None)
            assert ours.get(key) is None or (ours[key] == theirs[key]).all()


def test_a_local_file_is_read_in_windows_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    (tmp_path / "train.parquet").write_bytes(parquet_bytes(0))
    data = DataRecipe(
        dataset="parquet", root=tmp_path / "train.parquet", cache_gb=1, window_rows=20
    )
    mixture, made = Mixture([data]), []
    original = blocks._read_group
    monkeypatch.setattr(blocks, "_read_group", lambda *one: made.append(one) or original(*one))
    samples = read(mixture, mixture.epoch_order(0, 0))
    assert len(samples) == 60 and len(made) == len(set(made)) == GROUPS


def test_what_the_recipe_refuses(tiny_run_recipe: Callable) -> None:
    with pytest.raises(ValueError, match="window_rows: it has no effect without cache_gb"):
        data_recipe("./a.parquet", settings=["window_rows=5"])
    with pytest.raises(ValueError, match="cache_gb has no effect with the data set llava"):
        load_data(data_recipe("llava", "a.json", settings=["cache_gb=1"]))
    with pytest.raises(ValueError, match=r"cache_gb of a.parquet is not possible with batching"):
        tiny_run_recipe(
            "stages.finetune.batching=shared-image",
            "stages.finetune.data=[{dataset: auto, root: ./a.parquet, cache_gb: 1}]",
        )


def test_samples_of_tars_are_those_of_the_files(
    server: Server, tars: DataRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(server.files[f"{number}.tar"])
    local = Mixture([DataRecipe(dataset="webdataset", root=tmp_path / f"{n}.tar") for n in (0, 1)])
    remote = Mixture([tars])
    assert capfd.readouterr().err.count("has no .tar.idx, so it is read through") == 1
    assert len(remote) == len(local) == 2 * TAR_SAMPLES
    for ours, theirs in zip(remote, local, strict=True):
        assert (ours.id, ours.messages) == (theirs.id, theirs.messages)
        assert [i.read() for i in ours.images] == [i.read() for i in theirs.images]  # type: ignore[union-attr]
        assert str(ours.images[0]).rpartition(",")[2] == str(theirs.images[0]).rpartition(",")[2]


def test_blocks_of_tars_are_fetched_once_an_epoch(server: Server, tars: DataRecipe) -> None:
    mixture = Mixture([tars])
    assert "in 2 windows of about 40 samples" in mixture.notes[-1]
    num_blocks = len(np.unique(mixture.sources[0].blocks_of(np.arange(len(mixture)))))
    assert num_blocks > 6
    server.requests.clear()
    Mixture([tars])  # finds its indices in the cache
    assert {method for method, *_ in server.requests} == {"HEAD"}

    order = mixture.epoch_order(0, 0)
    assert sorted(order) == list(range(len(mixture)))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(partial(_read_part, mixture), [order[n::4] for n in range(4)], chunksize=1)
    assert sum(found) == len(mixture)
    asked = Counter(request for request in server.requests if request[0] == "GET")
    assert len(asked) == num_blocks and set(asked.values()) == {1}


def test_tars_that_are_read_through_are_not_read_twice(server: Server, tars: DataRecipe) -> None:
    """Of a tar with an index only the end mark is read."""
    Mixture([tars])
    asked = {name: wanted for method, name, wanted in server.requests if method == "GET"}
    assert asked["0.tar"] == f"bytes=0-{len(server.files['0.tar']) - 1}"
    end = int(np.frombuffer(server.files["1.tar.idx"], dtype="<u8")[-1])
    assert asked["1.tar"] == f"bytes={end}-{end + 511}"
    assert len([1 for method, *_ in server.requests if method == "GET"]) == len(asked) == 3


def test_tars_that_cannot_be_read_are_all_named(server: Server, tars: DataRecipe) -> None:
    server.files["0.tar"] = server.files["0.tar"][:30_000]
    server.files["1.tar"] = server.files["1.tar"][:30_000]
    with pytest.raises(
        ValueError, match=r"2 of 2 .*0.tar cannot .*cut short.*1.tar.idx is not .*cut "
    ):
        Mixture([tars])
    server.files["0.tar"] = tar_bytes(0)[0]
    mixture = Mixture([tars.model_copy(update={"unreadable_shards": "skip"})])
    assert len(mixture) == TAR_SAMPLES
    assert "1 of 2 files are left out: " in mixture.notes[1] and "1.tar.idx" in mixture.notes[1]


def test_an_index_of_another_tar_is_noticed(server: Server, tars: DataRecipe) -> None:
    whole = np.frombuffer(server.files["1.tar.idx"], dtype="<u8")
    for wrong in (whole[:-5], whole[1:][::-1], whole[:1], whole - 1, np.tile(whole, 9)):
        server.files["1.tar.idx"] = wrong.tobytes()
        with pytest.raises(ValueError, match=r"1.tar.idx is not the index of the tar beside it"):
            Mixture([tars])
    server.files["1.tar.idx"] = np.append(whole[0] + 512, whole[1:]).astype("<u8").tobytes()
    with pytest.raises(RecordError, match=r"1.tar, sample number 0: its part of 1.tar .*again"):
        _ = Mixture([tars])[TAR_SAMPLES]


def test_tars_of_this_machine_have_no_parts(
    server: Server, tars: DataRecipe, tmp_path: Path
) -> None:
    (tmp_path / "0.tar").write_bytes(server.files["0.tar"])
    with pytest.raises(ValueError, match=r"lies on this machine.*leave cache_gb out"):
        Mixture([tars.model_copy(update={"root": tmp_path / "0.tar"})])


def test_parquet_files_and_tars_are_not_mixed(server: Server, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/both/a.tar", tar_bytes(0)[0])
    memory.pipe("/both/a.tar.idx", tar_bytes(0)[1])
    assert len(load_data(data_recipe("memory://both", settings=["cache_gb=1"]))) == TAR_SAMPLES
    memory.pipe("/both/a.parquet", parquet_bytes(0))
    with pytest.raises(ValueError, match="has parquet files and tars: give one data set for each"):
        index_address("memory://both")


# ---- When things fail ----------------------------------------------------------------------------


def test_a_busy_server_is_asked_again(server: Server) -> None:
    mixture = Mixture([recipe(server)])
    busy = iter([True, True, False])
    server.rule = lambda method, begin: (503, {}, None) if next(busy, False) else None
    assert mixture[0].messages[0].text.endswith("0/0?")
    server.rule = lambda method, begin: (206, {}, 100)  # cut in the middle, always
    with pytest.raises(ConnectionError, match=r"1.parquet, bytes .* failed 6 times"):
        mixture[119]


def test_a_server_that_fails_makes_no_image_unreadable(server: Server) -> None:
    """An unreadable image may be replaced by a grey one; one that did not arrive may not."""
    image = Mixture([recipe(server)])[0].images[0]
    blocks._open_tables.clear()
    for path in (blocks.cache_folder() / "blocks").glob("*/*.arrow"):
        path.unlink()
    server.rule = lambda method, begin: (503, {}, None)
    for read_image in (open_image, size_or_grey, is_readable):
        with pytest.raises(ConnectionError, match=r"0.parquet, bytes .* it answers 503"):
            read_image(image)


def test_files_that_change_are_refused(server: Server) -> None:
    mixture = Mixture([recipe(server)])
    server.etags["1.parquet"] = '"2"'
    assert mixture[0].messages
    with pytest.raises(ValueError, match="changed since its index was made"):
        mixture[119]
    with pytest.raises(ValueError, match=r"1.parquet changed since its index was made: give"):
        Mixture([recipe(server)])


def test_broken_files_are_all_named(server: Server) -> None:
    for name in ("0.parquet", "1.parquet"):
        server.files[name] = server.files[name][:-100]
    with pytest.raises(ValueError, match=r"2 of 2 files .*0.parquet is no .*1.parquet is no "):
        Mixture([recipe(server)])


def test_a_flipped_byte_is_noticed(server: Server) -> None:
    content = bytearray(server.files["0.parquet"])
    place = content.index(b"IDAT", 2_000)  # in the pixels of a picture
    content[place] ^= 1
    server.files["0.parquet"] = bytes(content)
    mixture = Mixture([recipe(server)])
    with pytest.raises(ValueError, match=r"row group . cannot be read: .*CRC"):
        read(mixture, np.arange(60))


def test_a_server_without_ranges_is_named(server: Server) -> None:
    server.has_ranges = False
    with pytest.raises(ValueError, match="sends no parts of files: leave cache_gb out"):
        Mixture([recipe(server)])


def test_other_files_than_parquet_are_refused(server: Server) -> None:
    server.files["a.jsonl"] = b"{}\n"
    with pytest.raises(ValueError, match=r"cache_gb reads parquet files and tars, and .*a.jsonl"):
        index_address(f"{server.address}/a.jsonl")
    for number in range(2):
        server.files[f"{number}/train.parquet"] = parquet_bytes(number)
    with pytest.raises(ValueError, match="files of the same name"):
        index_address(server.address + "/{0..1}/train.parquet")


def test_long_footers_and_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("MIPHA_CACHE", str(tmp_path))
    monkeypatch.setattr(blocks, "_FOOTER_BYTES", 64)
    fsspec.filesystem("memory").pipe("/parts/train/a.parquet", parquet_bytes(0))
    data = load_data(data_recipe("memory://parts", settings=["cache_gb=1"]))
    assert len(data) == 60
    assert data.to_sample(data.records[59]).images[0].read().startswith(b"\x89PNG")  # type: ignore[union-attr]


def test_files_that_are_gone_are_no_data_any_more(tmp_path: Path, server: Server) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in ("a", "b"):
        memory.pipe(f"/fewer/train/{name}.parquet", parquet_bytes(0))
    assert len(load_data(data_recipe("memory://fewer", settings=["cache_gb=1"]))) == 120
    memory.rm("/fewer/train/b.parquet")
    assert len(load_data(data_recipe("memory://fewer", settings=["cache_gb=1"]))) == 60


def test_one_file_is_one_split_whatever_its_name(server: Server) -> None:
    server.files["validation.parquet"] = parquet_bytes(0)
    address = f"{server.address}/validation.parquet"
    assert len(load_data(data_recipe(address, settings=["cache_gb=1"]))) == 60


def test_what_a_killed_process_left_is_removed(server: Server) -> None:
    mixture = Mixture([recipe(server)])
    _ = mixture[0]
    (entry,) = (blocks.cache_folder() / "blocks").glob("*/*.arrow")
    old, new = entry.with_suffix(".1.partial"), entry.with_suffix(".2.partial")
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    _ = mixture[119]
    assert not old.exists() and new.exists()


def test_a_cache_has_its_own_folder_and_limit(tmp_path: Path) -> None:
    first, second = Blocks.of(tmp_path / "a", 1), Blocks.of(tmp_path / "b", 0.5)
    assert first.folder != second.folder and (first.limit, second.limit) == (10**9, 5 * 10**8)
