"""The program `mipha`: its verbs in one list, and errors that a user can fix in one sentence."""

from __future__ import annotations

import errno
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mipha.cli import align, catalog, data, deployment, results, study, training
from mipha.errors import OldPackage
from mipha.processes import end_with_parent
from mipha.terminal import echo, outlive_readers


class _Verbs(TyperGroup):
    """Turns errors that a user can fix into one sentence without a traceback, for every verb."""

    def invoke(self, ctx: Any) -> Any:
        # Our own progress bars show the long steps.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            echo("\nstopped; run the same command again to go on", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            sentence = None if ctx.params.get("debug") else _sentence(error)
            if sentence is None:
                raise
            echo(f"mipha: {sentence}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MIPHA_DEBUG", help="Show tracebacks.")
    ] = False,
) -> None:
    """Build, train and evaluate multimodal small language models.

    Such a model is a vision tower, a projector and a small language model.
    """


app.command("list")(catalog.list_names)
app.command()(catalog.show)
app.command()(data.check)
app.command()(data.fetch)
app.command()(training.train)
app.command()(training.tune)
app.command()(training.plan)
app.command()(results.evaluate)
app.command()(results.predict)
app.command()(results.score)
app.command()(results.compare)
app.command("import")(deployment.import_checkpoint)
app.command()(deployment.verify)
app.command()(deployment.export)
app.command()(deployment.chat)
app.command()(deployment.serve)
app.command()(training.quickstart)
app.add_typer(align.verbs, name="align")
app.add_typer(study.verbs, name="study")


def main() -> None:
    """Entry point of the `mipha` program."""
    end_with_parent()
    outlive_readers()
    app()


def _sentence(error: Exception) -> str | None:
    """Return one sentence about an error that a user can fix.

    None for our own mistakes, which keep their traceback.
    """
    if isinstance(error, ModuleNotFoundError):
        if (error.name or "").partition(".")[0] == "mipha":
            return None
        if str(error).startswith("No module named"):
            return f"the package {error.name!r} is not installed: pip install {error.name}"
        return str(error)
    if isinstance(error, OldPackage):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full ({error.filename2 or error.filename or 'no space left'}): "
            "free some space and run the same command again to go on"
        )
    if isinstance(error, OSError) and error.strerror:
        name = error.filename2 or error.filename  # the second is the target of a copy or a rename
        return f"{error.strerror}: {name}" if name else error.strerror
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return str(error)

    # Known by its name, because torch is not imported here.
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the accelerator's memory is full: lower --batch-size (evaluate), "
            "or micro_batch_rows or row_tokens (train)"
        )
    return None
