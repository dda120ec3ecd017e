"""The verbs that import, check, export and serve a model, or chat with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mipha.cli.arguments import Adapter, Model
from mipha.terminal import echo

if TYPE_CHECKING:
    from mipha.assistant import Assistant


_DTYPE_HELP = "auto, float32, bfloat16 or float16; auto: bfloat16 on a GPU, float32 on a CPU."


def import_checkpoint(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR_OR_HUB_ID",
            help="A released Mipha, or an original LLaVA-1.5-style checkpoint.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="New folder for the standard checkpoint.")
    ],
    vision_tower: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the tower, where the checkpoint only names one."),
    ] = None,
) -> None:
    """Turn a released checkpoint into a standard one, every tensor accounted for."""
    from mipha.models.upstream import import_upstream

    echo(str(import_upstream(source, out, vision_tower)))
    echo(f"imported: {out}")


def verify(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A run, or a model folder.")
    ],
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the findings to a file too.")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(help="Folder of `mipha export --to gguf`: compare llama.cpp's answers."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="With --gguf: a folder of images; or easy_vqa:N for N held-out questions."
        ),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(help="With --gguf: question about each image; may be repeated."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="With --gguf: threads of llama.cpp.")
    ] = None,
) -> None:
    """Load a checkpoint without mipha and compare; exit code 1 if results differ."""
    import json

    from mipha.files import write_whole

    if gguf is not None:
        _compare_gguf(checkpoint, gguf, images, question or [], threads, json_out)
        return
    if images or question or threads:
        raise ValueError(
            "--images, --question and --threads are for --gguf: "
            "give a folder of GGUF files too, or leave them out"
        )

    from mipha.deploy.verify import print_verification
    from mipha.deploy.verify import verify as verify_checkpoint

    found = verify_checkpoint(checkpoint)
    if json_out:
        write_whole(json_out, json.dumps(found.as_json(), indent=2) + "\n")
    print_verification(found)
    raise typer.Exit(0 if found.exact else 1)


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run or a model folder; with --merge an adapter folder."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="New folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="hub: a model folder with its card; gguf: files for llama.cpp and Ollama."
        ),
    ] = "hub",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="With --to gguf: kinds with commas, such as q8_0,q4_k_m; f16 if left out."
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="RUN is an adapter: write its base with the adapter in its weights."
        ),
    ] = False,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter", help="Write the adapter of RUN alone, with the identity of its base."
        ),
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(help="With --merge: the base model, if not the one that the adapter names."),
    ] = None,
) -> None:
    """Write a model folder ready for `hf upload`, or GGUF files for llama.cpp and Ollama."""
    from mipha.deploy.gguf import parse_kinds
    from mipha.preflight import check_adapter, check_new_folder
    from mipha.run import adapter_folder, base_name, model_folder

    if to not in ("hub", "gguf"):
        raise ValueError(f"--to {to}: choose hub or gguf")
    if base is not None and not merge:
        raise ValueError("--base has no effect without --merge: leave it out")
    if adapter:
        if merge or to != "hub" or quantize is not None:
            raise ValueError(
                "--adapter writes an adapter alone: leave --merge, --to and --quantize"
            )

        check_new_folder(out)
        found, name = adapter_folder(source), base_name(source)

        from mipha.models.adapters import export_adapter

        echo(f"exported: {export_adapter(found, out, name)}")
        return
    if to == "gguf":
        if merge:
            raise ValueError("--merge writes a model folder: export that folder to gguf afterwards")

        # Check the names before torch is imported.
        names = [kind.strip() for kind in (quantize or "f16").split(",") if kind.strip()]
        kinds = parse_kinds(names)
        model_folder(source)
        check_new_folder(out)

        from mipha.deploy.gguf.export import export_gguf

        for path in export_gguf(source, out, kinds):
            echo(f"written: {path}")
        return
    if quantize is not None:
        raise ValueError("--quantize has no effect without --to gguf: leave it out")

    if merge:
        check_adapter(source)
    else:
        model_folder(source)
    check_new_folder(out)

    from mipha.deploy.model_card import export_for_hub, write_model_card

    if merge:
        from mipha.models.adapters import merge_adapter

        merge_adapter(source, out, base)
        write_model_card(out)
    else:
        export_for_hub(source, out)
    echo(f"exported: {out}")


def serve(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run, a model folder, a folder of GGUF files or a GGUF file."
        ),
    ],
    engine: Annotated[str, typer.Option(help="auto, transformers, llama.cpp or vllm.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="MIPHA_API_KEY", help="Key that every request must carry.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Without a key: a name that clients use for this server, besides its address; "
            "may be repeated."
        ),
    ] = None,
    allow_remote_images: Annotated[
        bool,
        typer.Option("--allow-remote-images", help="Fetch images from public https addresses."),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Most requests answered in one batch.")
    ] = None,
    max_requests: Annotated[
        int, typer.Option(help="Requests held at a time; another one gets status 429.")
    ] = 128,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 1024,
    max_images: Annotated[int, typer.Option(help="Most images in one conversation.")] = 4,
    request_seconds: Annotated[
        float, typer.Option(help="Longest time for an answer, in seconds.")
    ] = 300.0,
    log_requests: Annotated[
        bool,
        typer.Option(
            "--access-log/--no-access-log",
            help="Write one line for each request to stderr, without its content.",
        ),
    ] = True,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device for transformers, such as cuda:1; default: the GPU if there is one."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help=_DTYPE_HELP)] = "auto",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Adapter over the model, asked for by its name; may be repeated.",
        ),
    ] = None,
) -> None:
    """Serve a model with OpenAI's interface and a web page."""
    import os
    from typing import get_args

    from mipha.deploy.serve.engine import EngineName
    from mipha.deploy.serve.server import serve as serve_model
    from mipha.lookup import did_you_mean

    if engine not in get_args(EngineName):
        raise ValueError(
            f"no engine {engine!r}: {did_you_mean(engine, list(get_args(EngineName)))}"
        )
    serve_model(
        source,
        engine=engine,
        host=host,
        port=port,
        # An empty variable is no missing one: it must not turn the key off silently.
        api_key=os.environ.get("MIPHA_API_KEY") if api_key is None else api_key,
        allow_host=allow_host or [],
        allow_remote_images=allow_remote_images,
        batch_size=batch_size,
        max_requests=max_requests,
        max_new_tokens=max_new_tokens,
        max_images=max_images,
        request_seconds=request_seconds,
        log_requests=log_requests,
        device=device,
        dtype=dtype,
        adapters=adapter or (),
    )


def _compare_gguf(
    checkpoint: Path,
    folder: Path,
    images: Path | None,
    questions: list[str],
    threads: int | None,
    json_out: Path | None,
) -> None:
    from mipha.deploy.parity import check_pairs, check_parity, easy_vqa_pairs, images_in
    from mipha.deploy.parity_tables import print_parity, write_parity

    if images is None:
        raise ValueError(
            "--gguf compares answers about images: give --images, a folder of them or easy_vqa:200"
        )
    name, _, number = str(images).partition(":")
    if name == "easy_vqa" and number.isdigit():
        found = check_pairs(checkpoint, folder, easy_vqa_pairs(int(number)), threads=threads)
    else:
        found = check_parity(checkpoint, folder, images_in(images), questions, threads=threads)
    write_parity(found, json_out.parent if json_out else folder)
    print_parity(found)
    raise typer.Exit(0 if found.passed else 1)


def chat(
    run: Model,
    image: Annotated[Path | None, typer.Option(help="Image to talk about.")] = None,
    dtype: Annotated[str, typer.Option(help=_DTYPE_HELP)] = "auto",
    adapter: Adapter = None,
) -> None:
    """Chat about an image; commands: /image PATH, /reset and /quit."""
    from mipha.preflight import check_dtype
    from mipha.run import adapter_folder, model_folder

    folder = model_folder(run)
    check_dtype(dtype)
    if adapter is not None:
        adapter_folder(adapter)
    if image is not None and not image.is_file():
        raise FileNotFoundError(f"no image {image}: give the path of an image")

    from mipha.assistant import load

    _converse(load(folder, dtype=dtype, adapter=adapter), image)


def _converse(assistant: Assistant, image: Path | None) -> None:
    """Read questions until /quit, the end of the input, or Ctrl-C; answers stream."""
    session = assistant.chat(image)
    echo(
        "ask a question; /image PATH for another image, "
        "/reset to forget the conversation, /quit to leave"
    )
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            echo()
            return

        # Carry out a command.
        verb, _, rest = line.partition(" ")
        path = Path(rest.strip().strip("'\"")).expanduser()
        if line == "/quit":
            return
        if line == "/reset":
            session = assistant.chat(image)
        elif verb == "/image" and path.is_file():
            image = path
            session = assistant.chat(image)
        elif verb == "/image":
            echo(f"no image {path}")
        elif line.startswith("/"):
            echo(f"no command {verb}: /image PATH, /reset or /quit")

        # Answer a question.
        elif line:
            try:
                for piece in session.ask(line):
                    echo(piece, end="")
                echo()
            except (ValueError, FileNotFoundError) as error:
                echo(str(error))
            except KeyboardInterrupt:
                # The answer is not finished: its half-filled cache must not be used again.
                session = assistant.chat(image)
                echo("\n(stopped, and the conversation is forgotten)")
