"""The verbs that take a model elsewhere, or talk with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mipha.cli.arguments import Model

if TYPE_CHECKING:
    from mipha.assistant import Assistant


def import_checkpoint(
    source: Annotated[str, typer.Argument(metavar="DIR_OR_HUB_ID", help="A released Mipha, or an original LLaVA-1.5-style checkpoint.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="New folder for the standard checkpoint.")],
    vision_tower: Annotated[str | None, typer.Option(help="Folder or hub id of the tower, where the checkpoint only names one.")] = None,
) -> None:
    """Turn a released checkpoint into a standard one, every tensor accounted for."""
    from mipha.models.upstream import import_upstream

    typer.echo(str(import_upstream(source, out, vision_tower)))
    typer.echo(f"imported: {out}")


def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run, or a model folder.")],
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the findings to a file too.")] = None,
) -> None:
    """Load a checkpoint without mipha and compare; exit code 1 if stock transformers does not give the same."""
    import json

    from mipha.deploy.verify import print_verification
    from mipha.deploy.verify import verify as verify_checkpoint
    from mipha.run import write_whole

    found = verify_checkpoint(checkpoint)
    if json_out:
        write_whole(json_out, json.dumps(found.as_json(), indent=2) + "\n")
    print_verification(found)
    raise typer.Exit(0 if found.exact else 1)


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A run or a model folder; with --merge an adapter folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="New folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="RUN is an adapter: write its base with the adapter in its weights.")] = False,
    base: Annotated[Path | None, typer.Option(help="With --merge: the base model, if not the one that the adapter names.")] = None,
) -> None:
    """Write a model folder with its card, ready for `hf upload`."""
    from mipha.deploy.model_card import export_for_hub, write_model_card

    if base is not None and not merge:
        raise ValueError("--base has no effect without --merge: leave it out")
    if merge:
        from mipha.models.adapters import merge_adapter

        merge_adapter(source, out, base)
        write_model_card(out)
    else:
        export_for_hub(source, out)
    typer.echo(f"exported: {out}")


def chat(run: Model, image: Annotated[Path | None, typer.Option(help="The picture to talk about.")] = None) -> None:
    """Talk about a picture; /image PATH, /reset and /quit."""
    from mipha.run import model_folder

    folder = model_folder(run)
    if image is not None and not image.is_file():
        raise FileNotFoundError(f"no image {image}: give the path of a picture")

    from mipha.assistant import load

    _converse(load(folder), image)


def _converse(assistant: Assistant, image: Path | None) -> None:
    """Read questions until /quit, the end of the input, or Ctrl-C; answers stream."""
    session = assistant.chat(image)
    typer.echo("ask something; /image PATH for another picture, /reset to forget the conversation, /quit to leave")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
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
            typer.echo(f"no image {path}")
        elif line.startswith("/"):
            typer.echo(f"no command {verb}: /image PATH, /reset or /quit")
        elif line:
            try:
                for piece in session.ask(line):
                    typer.echo(piece, nl=False)
                typer.echo()
            except (ValueError, FileNotFoundError) as error:
                typer.echo(str(error))
            except KeyboardInterrupt:
                # The answer is still being made behind our back: its half-filled cache must not be gone on with.
                session = assistant.chat(image)
                typer.echo("\n(stopped, and the conversation is forgotten)")
