"""Columns of an Arrow schema: which one holds image files; parquet and Arrow files say it alike."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from mipha.data.datasets._images import IMAGE_COLUMNS
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


def image_column(schema: pyarrow.Schema, where: str) -> str | None:
    """Return the column whose cells hold bytes of image files, or lists of them; None without.

    Raises:
        ValueError: There are several and none has a usual name.
    """
    names = [field.name for field in schema if _holds_bytes(field.type)]
    usual = [name for name in IMAGE_COLUMNS if name in names]
    if len(names) > 1 and not usual:
        raise ValueError(
            f"{where} has images in the columns {', '.join(names)}: "
            "rename the one that is meant to image"
        )
    return (usual or names or [None])[0]


def byte_columns(schema: pyarrow.Schema) -> frozenset[str]:
    """Return all columns that hold bytes: no record is made of what may be gigabytes."""
    return frozenset(field.name for field in schema if _holds_bytes(field.type))


def cell_bytes(cell: Any, where: str) -> bytes:
    """Return the bytes of an image cell: binary, or the `datasets` library's {"bytes", "path"}.

    Raises:
        RecordError: There are none.
    """
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise RecordError(
            "it holds no bytes of an image", "embed the image files when you write it", where
        )
    return content


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)
