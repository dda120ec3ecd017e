"""The verbs that show the catalog: `mipha list` and `mipha show`."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mipha.cli.data import ImageRoot, RecipeName, Root, Settings, Stage, show_row
from mipha.terminal import echo


@dataclass(frozen=True)
class Entries:
    """One kind of entry of the catalog.

    Args:
        names: Names of its entries.
        line: Name to one line that says what it is.
        text: Name to the whole entry, as YAML where it is not a file of its own.
    """

    names: Iterable[str]
    line: Callable[[str], str]
    text: Callable[[str], str]


def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(help="Only this kind, such as recipe, study or benchmark."),
    ] = None,
) -> None:
    """List recipes, studies, parts, data sets, benchmarks: everything that has a name."""
    from rich.table import Table

    from mipha.terminal import Console

    # All names of every kind; of one kind, a line on each.
    table = Table(box=None, pad_edge=False)
    table.add_column("kind" if kind is None else "name", no_wrap=True)
    table.add_column("names" if kind is None else "what it is", overflow="fold")
    for title, found in _chosen(kind).items():
        if kind is None:
            table.add_row(title, ", ".join(found.names))
            continue
        for name in found.names:
            table.add_row(name, found.line(name))

    console = Console()
    console.print(table)
    if kind is None:
        console.print(
            "mipha list KIND says what each of them is, mipha show NAME all of one", style="dim"
        )


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="Any name of `mipha list`, or a .yaml file of yours; with --row, data."
        ),
    ],
    settings: Settings = None,
    row: Annotated[
        int | None, typer.Option(help="Show this row of a data set, from 0, as the model sees it.")
    ] = None,
    recipe: RecipeName = None,
    stage: Stage = None,
    root: Root = None,
    image_root: ImageRoot = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Where the images of a row are written.")
    ] = Path("."),
) -> None:
    """Show an entry of the catalog in full, the recipe of a run, or one row of a data set."""
    if row is not None:
        show_row(name, settings, row, recipe, stage, root, image_root, out)
        return
    if recipe is not None or stage is not None or root or image_root or settings:
        raise ValueError(
            "--recipe, --stage, --root, --image-root and KEY=VALUE are for a row of a data set: "
            "give --row too, or leave them out"
        )
    if (Path(name) / "recipe.yaml").is_file():
        name = str(Path(name) / "recipe.yaml")
    if name.endswith((".yaml", ".yml")):
        echo(_show_file(name), end="")
        return

    # One name may stand for several things: a data set and the benchmark on it.
    kinds = _kinds()
    found = {title: kind for title, kind in kinds.items() if name in kind.names}
    if not found:
        from mipha.lookup import near_names

        if Path(name).exists():
            raise ValueError(
                f"{name} is no entry of the catalog: give --row 0 to see a row of data, "
                "or use `mipha check` for all of them"
            )
        near = near_names(name, {known for kind in kinds.values() for known in kind.names})
        fix = f"did you mean {' or '.join(near)}?" if near else "`mipha list` shows what there is"
        raise ValueError(f"the catalog has no {name!r}: {fix}")
    for title, kind in found.items():
        if len(found) > 1:
            echo(f"# {title} {name}")
        echo(kind.text(name).rstrip("\n"))


def _show_file(name: str) -> str:
    """Return a YAML file of the user with every default, whichever of the three kinds it is."""
    from mipha.alignment.recipe import load_alignment_recipe
    from mipha.lookup import read_yaml
    from mipha.recipe import load_recipe
    from mipha.studies.study import load_study

    tree = read_yaml(Path(name).read_bytes(), name) if Path(name).is_file() else {}
    keys = tree.keys() if isinstance(tree, dict) else ()
    if "scales" in keys:
        return load_study(name).dump()
    return (load_alignment_recipe(name) if "step" in keys else load_recipe(name)).dump()


def _chosen(kind: str | None) -> dict[str, Entries]:
    """Return the kinds that are listed."""
    from mipha.lookup import did_you_mean

    kinds = _kinds()
    if kind is None:
        return kinds
    title = kind.replace("_", "-").replace(" ", "-")
    title = title[:-3] + "y" if title.endswith("ies") else title.removesuffix("s")
    if title not in kinds:
        raise ValueError(f"no kind {kind!r}: {did_you_mean(title, kinds)}")
    return {title: kinds[title]}


def _kinds() -> dict[str, Entries]:
    """Return everything that has a name, kind by kind."""
    from mipha.alignment.recipe import list_alignment_recipes, load_alignment_recipe
    from mipha.catalog.devices import DEVICES
    from mipha.catalog.language_models import LANGUAGE_MODELS
    from mipha.catalog.vision_towers import VISION_TOWERS
    from mipha.comparison.results import PUBLISHED, SMALL_MODELS, published_rows
    from mipha.evaluation.benchmark import BENCHMARKS, list_benchmarks
    from mipha.lookup import files_in
    from mipha.recipe import list_recipes, load_recipe
    from mipha.studies.study import list_studies, load_study

    package = Path(__file__).parents[1]
    datasets, templates = package / "data" / "datasets", package / "catalog" / "chat_templates"
    return {
        "study": Entries(
            list_studies(),
            lambda name: load_study(name).title,
            lambda name: load_study(name).dump(),
        ),
        "recipe": Entries(
            list_recipes(),
            lambda name: load_recipe(name).description,
            lambda name: load_recipe(name).dump(),
        ),
        "alignment-recipe": Entries(
            list_alignment_recipes(),
            lambda name: load_alignment_recipe(name).description,
            lambda name: load_alignment_recipe(name).dump(),
        ),
        "vision-tower": _table(VISION_TOWERS),
        "language-model": _table(LANGUAGE_MODELS),
        "chat-template": Entries(
            files_in(templates, ".jinja"),
            lambda name: f"catalog/chat_templates/{name}.jinja",
            lambda name: (templates / f"{name}.jinja").read_text(encoding="utf-8"),
        ),
        "dataset": _modules(datasets, files_in(datasets, ".py")),
        "benchmark": _modules(BENCHMARKS, list_benchmarks()),
        "published-table": Entries(
            files_in(PUBLISHED, ".csv"),
            lambda name: (
                f"{len(published_rows(name))} rows of "
                f"{'other papers and model cards' if name == SMALL_MODELS else 'the Mipha paper'}"
                ", for `mipha compare --published`"
            ),
            lambda name: (PUBLISHED / f"{name}.csv").read_text(encoding="utf-8"),
        ),
        "device": _table(DEVICES),
    }


def _table(entries: Mapping[str, Any]) -> Entries:
    """Return the kind of a table of entries that have a source."""
    import yaml

    return Entries(
        list(entries),
        lambda name: entries[name].source,
        lambda name: yaml.safe_dump({name: _plain(entries[name])}, sort_keys=False, width=120),
    )


def _plain(entry: Any) -> dict[str, Any]:
    """Return an entry with lists for tuples, which YAML does not have."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(entry).items()
    }


def _modules(folder: Path, names: list[str]) -> Entries:
    """Return the kind of a folder of modules; their docstrings describe them."""

    def docstring(name: str) -> str:
        # Read without importing it: a data set's module may import torch.
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        return ast.get_docstring(tree) or ""

    return Entries(
        names,
        lambda name: docstring(name).partition("\n")[0],
        lambda name: docstring(name),
    )
