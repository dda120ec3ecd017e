"""llama.cpp in this process: numbers against transformers, refusals, quantised files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mipha.assistant import Assistant, load
from mipha.data.sample import IMAGE, Message
from mipha.models.build import save_checkpoint

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from mipha.deploy.gguf.export import export_gguf  # noqa: E402
from mipha.deploy.llama_cpp import LlamaCpp, library  # noqa: E402
from mipha.deploy.llama_cpp.quantize import quantize_gguf  # noqa: E402

QUESTION = "What is in the picture?"
LAYERS = 8


@pytest.fixture(scope="module")
def exported(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint whose answers are readable, and its GGUF files in f32."""
    root = tmp_path_factory.mktemp("exported")
    model, processor = tiny_model("llama", "siglip")
    tokenizer = processor.tokenizer
    with torch.no_grad():  # neither halves of letters, nor special or unused tokens
        for row, weight in enumerate(model.lm_head.weight):
            if (
                row in tokenizer.all_special_ids
                or not tokenizer.decode([row]).isprintable()
                or "\ufffd" in tokenizer.decode([row])
            ):
                weight.zero_()
    save_checkpoint(model, processor, root / "checkpoint")
    export_gguf(root / "checkpoint", root / "gguf", ("f32",))
    return root / "checkpoint", root / "gguf"


@pytest.fixture(scope="module")
def assistant(exported: tuple[Path, Path]) -> Assistant:
    return load(exported[0], "cpu", torch.float32)


@pytest.fixture(scope="module")
def runtime(exported: tuple[Path, Path]) -> Iterator[LlamaCpp]:
    with LlamaCpp(
        exported[1] / "model-f32.gguf", exported[1] / "mmproj-f32.gguf", threads=1, context=256
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Of the size that the tower wants, so that nobody resizes them."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (28, 28, 3), dtype=np.uint8)) for _ in range(3)]


def _logits(assistant: Assistant, image: Image.Image | None) -> np.ndarray:
    ids = assistant.prompt_ids([Message("user", f"{IMAGE}\n{QUESTION}" if image else QUESTION)])
    pixels = None if image is None else assistant.pixels(image)
    with torch.inference_mode():
        return (
            assistant.model(input_ids=torch.tensor([ids]), pixel_values=pixels)
            .logits[0, -1]
            .log_softmax(-1)
            .numpy()
        )


def test_image_embeddings_are_ours(
    runtime: LlamaCpp, assistant: Assistant, images: list[Image.Image]
) -> None:
    with torch.inference_mode():
        ours = torch.cat(
            [
                assistant.model.get_image_features(assistant.pixels(one)).pooler_output[0]
                for one in images
            ]
        ).numpy()
    theirs = np.concatenate([runtime.image_embeddings(one) for one in images])
    assert theirs.shape == ours.shape == (12, 32)  # 2 x 2 patches of each of 3 images
    assert np.abs(theirs - ours).max() < 2e-3 * np.abs(ours).max()  # its GELU is the tanh form
    assert np.array_equal(runtime.image_embeddings(np.asarray(images[0])), theirs[:4])


def test_first_logits_and_answers_are_ours(
    runtime: LlamaCpp, assistant: Assistant, images: list[Image.Image]
) -> None:
    for image in (*images, None):
        ours, theirs = _logits(assistant, image), runtime.first_token_logits(image, QUESTION)
        assert theirs.shape == ours.shape == (512,)
        assert np.abs(theirs - ours).max() < 0.02  # of some 5: it keeps keys and values in 16 bits
        reply, answer = (
            runtime.reply(image, QUESTION, 12),
            assistant.answer(image, QUESTION, max_new_tokens=12),
        )
        assert (reply.text, reply.finished) == (answer.text, answer.finished) and reply.text
        assert b"".join(reply.pieces).decode().strip() == reply.text
        assert all(margin > 0 for margin in reply.margins)
        text = f"{IMAGE}\n{QUESTION}" if image else QUESTION
        assert reply.num_prompt_tokens == len(assistant.prompt_ids([Message("user", text)]))
        assert (
            "".join(runtime.stream(image, QUESTION, 12)).strip()
            == runtime.answer(image, QUESTION, 12)
            == reply.text
        )


def test_a_file_is_read_by_our_rules(
    runtime: LlamaCpp, images: list[Image.Image], tmp_path: Path
) -> None:
    turned = images[0].transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(
        runtime.image_embeddings(tmp_path / "turned.png"), runtime.image_embeddings(images[0])
    )
    assert runtime.answer(str(tmp_path / "turned.png"), QUESTION, 6) == runtime.answer(
        images[0], QUESTION, 6
    )


def test_words_are_those_of_the_tokenizer(runtime: LlamaCpp, assistant: Assistant) -> None:
    for text in ("A red circle.<|im_end|>\n", "", "two  spaces", "Größe 12\u20ac"):
        assert (
            runtime.tokenize(text)
            == assistant.processor.tokenizer(text, add_special_tokens=False).input_ids
        )


def test_a_stream_may_be_left(runtime: LlamaCpp, images: list[Image.Image]) -> None:
    whole = runtime.answer(images[0], QUESTION, 100)
    stream = runtime.stream(images[0], QUESTION, 100)
    first = next(stream)
    stream.close()
    assert whole.startswith(first.strip())
    assert runtime.answer(images[0], QUESTION, 100) == whole


def test_the_terminal_stays_clean(
    exported: tuple[Path, Path], images: list[Image.Image], capfd: pytest.CaptureFixture
) -> None:
    with LlamaCpp(
        exported[1] / "model-f32.gguf", exported[1] / "mmproj-f32.gguf", threads=1, context=128
    ) as opened:
        opened.answer(images[0], QUESTION, 3)
        opened.image_embeddings(images[0])
    (exported[1] / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(
        ValueError, match=r"cannot open .*broken\.gguf: (?!it gives no reason).+; export"
    ):
        LlamaCpp(exported[1] / "broken.gguf")
    assert "".join(capfd.readouterr()) == ""


def test_what_cannot_be_opened_is_named(exported: tuple[Path, Path], tmp_path: Path) -> None:
    model, mmproj = exported[1] / "model-f32.gguf", exported[1] / "mmproj-f32.gguf"
    with pytest.raises(FileNotFoundError, match=r"no GGUF file .*gone\.gguf"):
        LlamaCpp(tmp_path / "gone.gguf")
    with pytest.raises(ValueError, match=r"cannot open .*mmproj-f32\.gguf"):
        LlamaCpp(mmproj)
    with pytest.raises(ValueError, match=r"cannot open .*model-f32\.gguf"):
        LlamaCpp(model, model)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-4096])
    with pytest.raises(ValueError, match=r"cannot open .*cut\.gguf"):
        LlamaCpp(cut, mmproj)


def test_what_cannot_be_asked_is_said(
    exported: tuple[Path, Path], runtime: LlamaCpp, images: list[Image.Image]
) -> None:
    with LlamaCpp(exported[1] / "model-f32.gguf", threads=1, context=128) as blind:
        for ask in (blind.answer, blind.first_token_logits):
            with pytest.raises(ValueError, match="opened without an mmproj"):
                ask(images[0], QUESTION)
        with pytest.raises(ValueError, match="opened without an mmproj"):
            blind.image_embeddings(images[0])
        assert blind.answer(None, QUESTION, 4)
    for ask in (runtime.answer, lambda *asked: list(runtime.stream(*asked))):
        with pytest.raises(
            ValueError, match=r"the question is \d+ tokens long .* and the context 256"
        ):
            ask(None, "why? " * 200)


def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.VisionParams.defaults, "batch_max_tokens", 1000)
    library.load_library.cache_clear()
    with pytest.raises(
        ValueError, match=r"VisionParams.batch_max_tokens is 1024.*pip install 'xllamacpp=="
    ):
        library.load_library()
    monkeypatch.undo()
    library.load_library.cache_clear()
    library.load_library()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of `LAYERS` layers in f16, wide enough for blocks of 256, but for one matrix."""
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_array("tokenizer.ggml.tokens", ["a", "\u0120b", "\u20ac"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_float32("llama.rope.freq_base", 1e4)
    shapes = {
        "token_embd.weight": (12, 256),
        "output.weight": (12, 256),
        "output_norm.weight": (256,),
        "output.bias": (12,),
    }
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_{name}.weight": (256, 256) for name in "qv"}
        shapes |= {
            f"blk.{layer}.ffn_down.weight": (256, 512),
            f"blk.{layer}.attn_q_norm.weight": (4, 64),
        }
    shapes |= {"blk.0.ffn_up.weight": (16, 288), "blk.0.ffn_gate.weight": (16, 40)}
    for name, shape in shapes.items():
        kept = len(shape) == 1 or "norm" in name
        writer.add_tensor(
            name, random.standard_normal(shape).astype(np.float32 if kept else np.float16)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


# An eighth of 8 layers is one: the first and the last get more bits, and between them every third,
# counted from the second.
MORE_BITS = {0, 3, 6, 7}


@pytest.mark.parametrize(
    ("kind", "base", "head", "more", "narrow", "most_error"),
    [
        ("q8_0", "Q8_0", "Q8_0", "Q8_0", "Q8_0", 0.01),
        ("Q6_K", "Q6_K", "Q6_K", "Q6_K", "Q8_0", 0.03),
        ("q5_k_m", "Q5_K", "Q6_K", "Q6_K", "Q5_1", 0.05),
        ("q4_k_m", "Q4_K", "Q6_K", "Q6_K", "Q5_0", 0.10),
        ("q4_0", "Q4_0", "Q6_K", "Q4_0", "Q4_0", 0.12),
    ],
)
def test_each_matrix_gets_its_type(
    plain: Path,
    tmp_path: Path,
    kind: str,
    base: str,
    head: str,
    more: str,
    narrow: str,
    most_error: float,
):
    out = tmp_path / "out.gguf"
    quantize_gguf(plain, out, kind)
    before, after = _tensors(plain), _tensors(out)
    expected = {name: base for name in before} | {
        "output.weight": head,
        "blk.0.ffn_up.weight": narrow,
        "blk.0.ffn_gate.weight": "F16",
    }
    for name, tensor in before.items():
        if "norm" in name or "bias" in name:
            expected[name] = tensor.tensor_type.name
    for layer in MORE_BITS:
        expected |= {f"blk.{layer}.attn_v.weight": more, f"blk.{layer}.ffn_down.weight": more}
    assert {name: tensor.tensor_type.name for name, tensor in after.items()} == expected
    for name, tensor in after.items():
        full = np.asarray(before[name].data, np.float32)
        error = gguf.quants.dequantize(tensor.data, tensor.tensor_type) - full
        assert np.sqrt((error**2).mean() / (full**2).mean()) < most_error, name
        if tensor.tensor_type.name in ("Q8_0", "Q4_0"):  # gguf has these two in Python
            assert np.array_equal(tensor.data, gguf.quants.quantize(full, tensor.tensor_type)), name
    fields, copied = (gguf.GGUFReader(path).fields for path in (plain, out))
    changed = {"general.file_type", "GGUF.kv_count", "general.quantization_version"}
    assert {name: field.contents() for name, field in fields.items() if name not in changed} == {
        name: field.contents() for name, field in copied.items() if name not in changed
    }
    assert (
        gguf.LlamaFileType(copied["general.file_type"].contents()).name == f"MOSTLY_{kind.upper()}"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_word_embeddings_that_are_the_head_get_its_bits(
    exported: tuple[Path, Path], plain: Path, tmp_path: Path
) -> None:
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(tmp_path / "tied.gguf", "llama")
    for tensor in reader.tensors:
        if tensor.name != "output.weight":
            writer.add_tensor(tensor.name, np.asarray(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantize_gguf(tmp_path / "tied.gguf", tmp_path / "out.gguf", "q4_k_m")
    assert _tensors(tmp_path / "out.gguf")["token_embd.weight"].tensor_type.name == "Q6_K"


def test_llama_cpp_answers_from_a_quantised_file(
    exported: tuple[Path, Path], runtime: LlamaCpp, tmp_path: Path
) -> None:
    quantize_gguf(exported[1] / "model-f32.gguf", tmp_path / "q8.gguf", "q8_0")
    with LlamaCpp(tmp_path / "q8.gguf", threads=1, context=128) as quantised:
        assert quantised.quantization == "q8_0" and runtime.quantization == "f32"
        error = np.abs(
            quantised.first_token_logits(None, QUESTION)
            - runtime.first_token_logits(None, QUESTION)
        ).max()
        assert 1e-4 < error < 0.2


def test_what_cannot_be_quantised_is_named(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(
        ValueError, match="no quantisation 'q9': give q4_0, q4_k_m, q5_k_m, q6_k, q8_0"
    ):
        quantize_gguf(plain, out, "q9")
    with pytest.raises(FileNotFoundError, match=r"gone\.gguf"):
        quantize_gguf(tmp_path / "gone.gguf", out, "q8_0")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(ValueError, match=r"bad\.gguf is no whole GGUF file"):
        quantize_gguf(tmp_path / "bad.gguf", out, "q8_0")
    quantize_gguf(plain, tmp_path / "q8.gguf", "q8_0")
    with pytest.raises(ValueError, match=r"q8\.gguf is quantised already \(.* is q8_0\)"):
        quantize_gguf(tmp_path / "q8.gguf", out, "q4_0")
    shutil.copy(plain, tmp_path / "cut.gguf")
    with (tmp_path / "cut.gguf").open("r+b") as file:
        file.truncate(plain.stat().st_size - 4096)
    with pytest.raises(ValueError, match=r"cut\.gguf is no whole GGUF file"):
        quantize_gguf(tmp_path / "cut.gguf", out, "q8_0")
    assert not out.exists()
