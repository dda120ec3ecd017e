"""The benchmark of inference on a tiny random model, and its rules on numbers made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import inference
import pytest
from full_size_inference import write_random_checkpoint

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

PARAMETERS = {"attention": 4 * (32 * 32 + 32), "mlp": 32 * 48 + 48 + 48 * 32 + 32, "norm": 2 * 32}
HEAD = 512 * 32 + 512


@pytest.fixture(scope="module")
def folder(tiny_parts: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, a Phi behind SigLIP with random weights, and `gguf`."""
    from mipha.deploy.gguf.export import export_gguf

    folder = tmp_path_factory.mktemp("inference")
    recipe = tiny_parts("phi", "siglip").recipe()
    write_random_checkpoint(folder / "model", recipe, recipe)
    export_gguf(folder / "model", folder / "gguf", ("f16",))
    return folder


def test_a_random_checkpoint_is_whole_and_says_words(folder: Path) -> None:
    import torch

    from mipha.assistant import load

    assistant = load(folder / "model", "cpu", torch.float32)
    model, tokenizer = assistant.model, assistant.processor.tokenizer
    (files,) = (folder / "model").glob("*.safetensors")
    num_weights = sum(weight.numel() for weight in model.parameters())
    assert 2 <= files.stat().st_size / num_weights < 3  # bfloat16, and a header

    weights = {
        name: weight.flatten()[:8].tolist()
        for name, weight in model.named_parameters()
        if weight.dim() > 1
    }
    assert len({tuple(first) for first in weights.values()}) == len(weights)  # no two alike

    written = []
    assistant.generate(
        [assistant.prompt([inference_message("Which colour?")], max_new_tokens=20)],
        lambda new: written.extend(new) or (),
    )
    assert all(
        tokenizer.decode([token]).isprintable() and token not in tokenizer.all_special_ids
        for token in written
    )


def inference_message(text: str) -> Any:
    from mipha.data.sample import Message

    return Message("user", text)


def test_every_engine_is_measured_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    questions = inference.noise_questions(tmp_path, 2)
    tasks = inference.make_tasks(
        folder / "model",
        folder / "gguf",
        ["float32"],
        ["f16"],
        questions,
        num_tokens=5,
        answer_tokens=0,
        limit_bytes=2**22,
    )
    results = inference.run_all(tasks, 1, tmp_path)
    assert list(results) == ["limits", "transformers float32", "llama.cpp f16"]
    assert all(value > 0 for value in results["limits"][0].values())
    layer = sum(PARAMETERS.values())
    for way, size in (("transformers float32", 4), ("llama.cpp f16", 2)):
        (found,) = results[way]
        assert len(found["first_token_seconds"]) == len(found["tokens_per_second"]) == 2
        assert (
            min(found["first_token_seconds"] + found["tokens_per_second"]) > 0
            and 0 < found["peak_gib"] < 8
        )

        # GGUF keeps biases and norms in four bytes.
        vectors = 2 * (4 * 32 + 48 + 32 + 64) + 64 + 512
        assert found["weight_bytes"] == size * (2 * layer + 64 + HEAD) + (4 - size) * vectors

    # Both engines read the same prompt and write the same texts.
    ours, theirs = results["transformers float32"][0], results["llama.cpp f16"][0]
    assert ours["prompt_tokens"] == theirs["prompt_tokens"]
    # Keys and values, of 2 bytes, in 2 layers, 32 wide.
    assert ours["prompt_cache_bytes"] == 2 * 2 * 2 * 32 * ours["prompt_tokens"]
    assert ours["texts"] == theirs["texts"] and all(ours["texts"])

    rows, facts = inference.summarise(results)
    assert [(row.case, row.way) for row in rows] == [
        (case, way)
        for case in ("image and question", "answer", "answer without an image")
        for way in ("transformers float32", "llama.cpp f16")
    ]
    assert "same text as transformers float32: 100%" in facts["llama.cpp f16"]


def test_a_failing_engine_is_not_skipped(folder: Path, tmp_path: Path) -> None:
    tasks = inference.make_tasks(folder / "model", folder / "gguf", [], ["f16"], [], num_tokens=2)
    tasks["llama.cpp f16"]["model"] = str(tmp_path / "gone.gguf")
    with pytest.raises(SystemExit, match=r"llama.cpp f16 failed with status 1:(.|\n)*no GGUF file"):
        inference.run_all({"llama.cpp f16": tasks["llama.cpp f16"]}, 1, tmp_path)


def _found(rate: float, gigabytes: float, **changes: Any) -> dict[str, Any]:
    plain = {
        "load_seconds": 1.0,
        "first_token_seconds": [2.0],
        "tokens_per_second": [rate],
        "prompt_tokens": 100,
        "prompt_flop": 4e12,
    }
    plain |= {"plain_tokens_per_second": rate * 1.25, "prompt_cache_bytes": 10**9}
    return (
        plain
        | {"weight_bytes": int(gigabytes * 1e9), "peak_gib": 3.0, "texts": ["a dog"], "answers": []}
        | changes
    )


def test_what_is_wanted_at_full_size() -> None:
    limits = [
        {"read": 20.0, "float32": 100.0, "bfloat16": 200.0},
        {"read": 10.0, "float32": 100.0, "bfloat16": 200.0},
    ]
    results = {"limits": limits, inference.BASELINE: [_found(1.0, 5.0), _found(0.5, 5.0)]}

    # 8 times as fast, at 16 of 20 and at 8 of 10 GB/s.
    quick = results | {"llama.cpp q4_k_m": [_found(8.0, 2.0), _found(4.0, 2.0)]}
    assert inference.share_of_bandwidth(quick, "llama.cpp q4_k_m") == pytest.approx(0.8)
    assert inference.share_of_bandwidth(quick, "llama.cpp q4_k_m", plain=True) == pytest.approx(1.0)
    assert inference.verdict(quick) == []

    slow = results | {"llama.cpp q4_k_m": [_found(5.0, 2.0), _found(2.5, 2.0)]}
    assert [text.partition(",")[0] for text in inference.verdict(slow)] == [
        "llama.cpp q4_k_m writes 5.00 times as fast as transformers bfloat16",
        "llama.cpp q4_k_m reads at 62% of the bandwidth",
    ]

    rows, facts = inference.summarise(quick)
    answer = next(row for row in rows if row.case == "answer" and row.way == "llama.cpp q4_k_m")
    assert (answer.rate, answer.low, answer.high, answer.ratio) == (6.0, 4.0, 8.0, 8.0)
    assert rows[0].rate == 50.0  # 100 tokens in 2 seconds
    assert facts["prompt"].startswith(
        "100 tokens, 4 TFLOP without attention: 20 s at that limit; its keys and values: 1 GB"
    )


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (["a dog"], ["a dog"], 1.0),
        (["a dog"], ["a door"], 4 / 6),
        (["", "yes"], ["", "no"], 0.5),
        ([""], ["yes"], 0.0),
    ],
)
def test_texts_are_compared_from_their_beginnings(
    one: list[str], other: list[str], same: float
) -> None:
    assert inference._sameness(
        {"texts": [], "answers": one}, {"texts": [], "answers": other}
    ) == pytest.approx(same)


def test_questions_are_about_different_images_and_of_several_kinds() -> None:
    questions = inference.easy_questions(64)
    assert len({image for image, _ in questions}) == 64 and len({text for _, text in questions}) > 8


def test_a_run_or_a_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for words, sentence in (
        ([], "give either RUN or --size"),
        (["--size", "mipha-3b", "--keep"], "--keep needs --work"),
    ):
        monkeypatch.setattr("sys.argv", ["inference.py", *words])
        with pytest.raises(SystemExit):
            inference.main()
        assert sentence in capsys.readouterr().err
