"""Columns of an Arrow schema that hold image files; parquet and Arrow files have the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mipha.data.datasets._images import IMAGE_COLUMNS, choose_images, is_list
from mipha.data.datasets._keys import TURNS, parse_list
from mipha.data.faults import RecordError
from mipha.errors import import_optional

if TYPE_CHECKING:
    import pyarrow


def import_pyarrow(file: object) -> ModuleType:
    """Import pyarrow, which is not installed with mipha itself, to read a file.

    Raises:
        MissingPackage: It is not installed.
    """
    return import_optional("pyarrow", f"reading {file}", "data")


def image_columns(schema: pyarrow.Schema, where: str) -> tuple[str, ...]:
    """Return all columns whose cells hold bytes of files, or lists of them.

    No record is made of the bytes, which may be gigabytes: it holds places in the file.

    Raises:
        ValueError: There are several and none has a usual name, or two columns have one name.
    """
    if twice := {name for name in schema.names if schema.names.count(name) > 1}:
        raise ValueError(f"{where} has two columns {sorted(twice)[0]!r}: rename one of them")
    names = tuple(field.name for field in schema if _holds_bytes(field.type))
    if len(names) > 1 and not choose_images(dict.fromkeys(names, b"image")):
        raise ValueError(
            f"{where} has images in the columns {', '.join(names)}: "
            "rename the one that is meant to image"
        )
    return names


def with_places(content: Mapping[str, Any], places: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the images that lie in its file.

    Args:
        content: Other columns of the row.
        places: Images of the row by column: None, one, or a list.
    """
    # `datasets` wrote lists of objects as an object of lists until its version 4, others JSON.
    for name in TURNS:
        value = parse_list(content.get(name))
        if is_list(value):
            content = {**content, name: value}
        if not isinstance(value, Mapping) or not all(map(is_list, value.values())):
            continue
        if len({len(items) for items in value.values()}) == 1:
            turns = zip(*value.values(), strict=True)
            content = {**content, name: [dict(zip(value, turn, strict=True)) for turn in turns]}

    # One column is the image, whatever it is called, unless another has the usual name.
    named = any(name in content for name in ("image", "images"))
    if len(places) == 1 and not named and not choose_images(dict.fromkeys(places, b"image")):
        (value,) = places.values()
        places = {"images" if isinstance(value, list) else "image": value}

    # A path beside the bytes names the file that they come from.
    if any(places.values()) and choose_images(places):
        content = {name: value for name, value in content.items() if name not in IMAGE_COLUMNS}
    return {**content, **places}


def cell_places(cell: Any, place: Callable[[int | None], Any]) -> Any:
    """Return where the image of a cell is, or its path; a list where the cell is one.

    Args:
        cell: Cell of a mapped table.
        place: Returns the place of an image, of a cell that holds a list by its number.
    """
    if not cell.is_valid:
        return None
    if not hasattr(cell.type, "value_type"):
        return _image_in(cell, place(None))
    return [_image_in(part, place(number)) for number, part in enumerate(cell)]


def _image_in(cell: Any, place: Any) -> Any:
    """Return where an image is: in this cell, or in the file whose path the cell holds instead."""
    if not cell.is_valid:
        return None
    if hasattr(cell, "keys") and not cell["bytes"].is_valid:
        return cell["path"].as_py() if "path" in cell else None
    return place


def cell_bytes(cell: Any, where: str) -> bytes:
    """Return the bytes of an image cell: binary, or the `datasets` library's {"bytes", "path"}.

    Raises:
        RecordError: There are none.
    """
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise RecordError(
            "it holds no bytes of an image",
            "embed the image files when you write it",
            where,
            "missing-image",
        )
    return content


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)
