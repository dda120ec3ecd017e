"""The parity report: good files pass, and a planted fault is found in the right row by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mipha.models.build import save_checkpoint
from mipha.models.processing import load_processor

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from mipha.deploy import parity  # noqa: E402
from mipha.deploy.gguf.export import export_gguf  # noqa: E402
from mipha.deploy.llama_cpp import LlamaCpp, Reply  # noqa: E402
from mipha.deploy.parity_tables import FileParity, Parity, print_parity, write_parity  # noqa: E402

QUESTIONS = ("What is in the picture?", "Which colour is the circle?")


@pytest.fixture(scope="module")
def exported(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Phi whose head has a bias, sure of its words; it pads in the tower's mean colour."""
    return export(tiny_model, tmp_path_factory.mktemp("exported"), ("f32", "q8_0"))


def export(
    tiny_model: Callable, root: Path, kinds: tuple[str, ...], **changes: object
) -> tuple[Path, Path]:
    """Return the folders of a checkpoint and of its files."""
    model, processor = tiny_model("phi", "siglip", **changes)
    tokenizer = processor.tokenizer
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
        for row in range(len(model.lm_head.weight)):
            if (
                row in tokenizer.all_special_ids
                or not tokenizer.decode([row]).isprintable()
                or "\ufffd" in tokenizer.decode([row])
            ):
                model.lm_head.weight[row] = 0.0
                model.lm_head.bias[row] = -9.0
    save_checkpoint(model, processor, root / "checkpoint")
    export_gguf(root / "checkpoint", root / "gguf", kinds)
    return root / "checkpoint", root / "gguf"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the tower's size, and a wide one, which llama.cpp pads in another colour than we."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, size in {"a": (28, 28), "b": (28, 28), "wide": (28, 84)}.items():
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(
            folder / f"{name}.png"
        )
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def found(exported: tuple[Path, Path], images: Path) -> Parity:
    square = [path for path in parity.images_in(images) if path.stem != "wide"]
    return parity.check_parity(
        *exported, square, QUESTIONS, max_new_tokens=8, threads=1, device="cpu"
    )


def test_good_files_pass(found: Parity) -> None:
    theirs, ours = found.embeddings
    assert (theirs.pixels, ours.pixels, ours.num_images) == ("llama.cpp", "ours", 2)
    assert replace(theirs, pixels="ours") == ours  # nobody resized anything
    assert (
        0.9999 < ours.cosine_min <= ours.cosine_mean < 1.0001
        and ours.max_error < 2e-3 * ours.largest
    )
    assert ours.scale == pytest.approx(1, abs=1e-3)
    f32, q8_0 = found.files
    assert (f32.file, f32.quantization, q8_0.file, q8_0.quantization) == (
        "model-f32.gguf",
        "f32",
        "model-q8_0.gguf",
        "q8_0",
    )
    assert (
        f32.num_same,
        f32.num_same_prompts,
        f32.num_questions,
        f32.num_same_tops,
        f32.num_logits,
    ) == (4, 4, 4, 4, 4)
    assert 0 < f32.logit_error < min(0.05, q8_0.logit_error)
    assert f32.verdict == "ok" and not f32.disagreements and f32.seconds > 0
    assert found.passed == (q8_0.verdict == "ok")


def test_the_report_in_three_forms(
    found: Parity, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    as_json, as_markdown = write_parity(found, tmp_path)
    plain = json.loads(as_json.read_text())
    assert plain["passed"] == found.passed
    assert [row["verdict"] for row in plain["embeddings"]] == ["ok", "ok"]
    assert plain["files"][0]["agreement"] == 1.0
    markdown = as_markdown.read_text()
    assert "| ours | 2 | 1.000000 | 1.000000 | 1.0000 |" in markdown
    assert (
        "| f32 | 4 of 4 |" in markdown and "| 4 of 4 | 51.0 to 100.0 % |" in markdown
    )  # Wilson: 4 of 4
    print_parity(found)
    printed = capsys.readouterr().out
    assert "q8_0" in printed and "the bounds" in printed


def test_other_pixels_are_told_from_other_weights(
    exported: tuple[Path, Path], images: Path, f32: Path
) -> None:
    found = parity.check_parity(
        exported[0],
        f32,
        [images / "wide.png"],
        QUESTIONS,
        max_new_tokens=8,
        threads=1,
        device="cpu",
    )
    assert [row.verdict for row in found.embeddings] == ["pixels differ", "ok"]
    (row,) = found.files
    assert row.logit_error < 0.05  # with our own pixels
    assert row.disagreements and {one.because for one in row.disagreements} == {"pixels"}
    count = len(row.disagreements)
    assert (
        row.verdict == f"answers differ, {count} of {count} for their pixels" and not found.passed
    )


@pytest.mark.parametrize(
    "changes",
    [{"image": "tiles"}, {"image": "tiles", "shuffle": 2}, {"image": "native"}],
    ids=["tiles", "shuffled", "native"],
)
def test_pictures_of_other_shapes_pass_where_they_are_cut(
    tiny_model: Callable, images: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    folders = export(tiny_model, tmp_path, ("f32",), **changes)
    found = parity.check_parity(
        *folders,
        [images / "wide.png", images / "a.png"],
        QUESTIONS[:1],
        max_new_tokens=8,
        threads=1,
        device="cpu",
    )
    assert [row.verdict for row in found.embeddings] == ["ok", "ok"]
    (row,) = found.files
    assert (row.verdict, row.num_same_prompts, row.num_same) == ("ok", 2, 2)
    assert 0 < row.logit_error < 0.03 and found.passed


@pytest.fixture
def f32(exported: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the files in f32, to break."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    for name in ("model-f32.gguf", "mmproj-f32.gguf"):
        shutil.copy(exported[1] / name, folder / name)
    return folder


def _change(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(tensor for tensor in gguf.GGUFReader(path, "r+").tensors if tensor.name == name)
    tensor.data[:] = change(np.array(tensor.data))
    tensor.data.base.flush()


@pytest.mark.parametrize("tensor", ["v.position_embd.weight", "mm.2.bias", "v.blk.0.ffn_up.weight"])
def test_a_fault_in_the_tower_or_projector_is_found(
    exported: tuple[Path, Path], images: Path, f32: Path, tensor: str
) -> None:
    _change(f32 / "mmproj-f32.gguf", tensor, lambda values: np.roll(values, 1, axis=0))
    found = parity.check_parity(
        exported[0],
        f32,
        [images / "a.png"],
        QUESTIONS[:1],
        max_new_tokens=4,
        threads=1,
        device="cpu",
    )
    assert [row.verdict for row in found.embeddings] == ["weights differ", "weights differ"]
    assert not found.passed


@pytest.mark.parametrize(
    ("tensor", "factor"), [("output.bias", 0.0), ("blk.1.attn_v.weight", -1.0)]
)
def test_a_fault_in_the_language_model_is_found(
    exported: tuple[Path, Path], images: Path, f32: Path, tensor: str, factor: float
) -> None:
    _change(f32 / "model-f32.gguf", tensor, lambda values: values * factor)
    found = parity.check_parity(
        exported[0],
        f32,
        [images / "a.png", images / "b.png"],
        QUESTIONS,
        max_new_tokens=8,
        threads=1,
        device="cpu",
    )
    assert [row.verdict for row in found.embeddings] == ["ok", "ok"]
    (row,) = found.files
    assert "weights differ" in row.verdict and not found.passed
    assert {one.because for one in row.disagreements} == {"weights"}


def test_another_prompt_is_found(exported: tuple[Path, Path], images: Path, f32: Path) -> None:
    file = f32 / "model-f32.gguf"
    content = file.read_bytes()
    begins = b"{{- '<|im_start|>' + message.role"
    assert content.count(begins) == 1
    file.write_bytes(
        content.replace(begins, b"{{- '<|im_begun|>' + message.role")
    )  # as long, but no token
    found = parity.check_parity(
        exported[0], f32, [images / "a.png"], max_new_tokens=4, threads=1, device="cpu"
    )
    assert found.files[0].num_same_prompts == 0 and found.files[0].verdict.startswith(
        "prompts differ"
    )


def _row(quantization: str = "q8_0", **changes: object) -> FileParity:
    good = FileParity("model.gguf", quantization, 200, 200, 16, 0.1, 16, 200, 0.98, 1.0, 0, (), 0.1)
    return replace(good, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (_row(num_same=190), "ok"),  # 95 % of 200
        (_row(num_same=189), "answers differ, 0 of 0 for their pixels"),
        (_row("q4_k_m", num_same=160), "ok"),
        (_row("q4_k_m", num_same=159), "answers differ, 0 of 0 for their pixels"),
        (_row("f16", logit_error=0.3), "weights differ"),
        (_row("q8_0", logit_error=0.3), "ok"),
        (_row(num_same_prompts=199), "prompts differ"),
    ],
)
def test_what_is_expected_of_a_file(row: FileParity, verdict: str) -> None:
    assert row.verdict == verdict


def test_the_interval_is_wilsons() -> None:
    # Agresti and Coull 1998 and tables since: 0 of 10, 8 of 10, 200 of 200
    assert parity.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert parity.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert parity.wilson(200, 200) == pytest.approx((0.98115, 1.0), abs=1e-4)


@pytest.mark.parametrize(
    ("ours", "margin"),
    [
        ("a red box", 2.0),  # theirs says a red circle
        ("a red circle too", 4.0),  # theirs ends there
        ("a red", 2.0),  # ours ends there
        ("the red circle", 1.0),
    ],
)
def test_where_two_answers_part(ours: str, margin: float) -> None:
    reply = Reply(
        "a red circle",
        (b" a", b" red", b" cir", b"cle", b""),
        (1.0, 3.0, 2.0, 5.0, 4.0),
        9,
        5,
        finished=True,
    )
    assert parity._margin(reply, ours) == margin


def test_a_square_image_is_resized_as_by_us(exported: tuple[Path, Path]) -> None:
    processor, random = load_processor(exported[0]), np.random.default_rng(0)
    with LlamaCpp(
        exported[1] / "model-f32.gguf", exported[1] / "mmproj-f32.gguf", threads=1, context=64
    ) as runtime:
        for side in (9, 29, 64, 101, 336):
            image = Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8))
            assert np.array_equal(
                runtime.image_embeddings(image),
                runtime.image_embeddings(parity.as_seen(processor, image)),
            ), side


def test_our_pixels_come_back_as_they_are(exported: tuple[Path, Path], images: Path) -> None:
    processor = load_processor(exported[0])
    seen = parity.as_seen(processor, Image.open(images / "wide.png"))
    assert seen.size == (28, 28)
    once, again = (
        processor.image_processor(one, return_tensors="np")["pixel_values"]
        for one in (Image.open(images / "wide.png"), seen)
    )
    assert np.array_equal(once, again)


def test_what_is_missing_is_named(
    exported: tuple[Path, Path], images: Path, f32: Path, tmp_path: Path
) -> None:
    assert [path.name for path in parity.images_in(images)] == ["a.png", "b.png", "wide.png"]
    with pytest.raises(FileNotFoundError, match="holds no image file"):
        parity.images_in(tmp_path)
    with pytest.raises(ValueError, match="give at least one image"):
        parity.check_parity(exported[0], f32, [])
    with pytest.raises(FileNotFoundError, match=r"no model-\*\.gguf with an mmproj"):
        parity.gguf_files(tmp_path)
    shutil.copy(f32 / "mmproj-f32.gguf", f32 / "mmproj-f16.gguf")
    with pytest.raises(ValueError, match=r"2 mmproj-\*\.gguf"):
        parity.gguf_files(f32)


@pytest.mark.skipif(find_spec("easy_vqa") is None, reason="easy-vqa is not installed: make install")
def test_held_out_questions() -> None:
    pairs = parity.easy_vqa_pairs(200)
    assert len(pairs) == 200
    assert all(image.is_file() and image.parent.parent.name == "test" for image, _ in pairs[::20])
    assert len({image for image, _ in pairs}) > 150  # from all of it, not the first twenty images
