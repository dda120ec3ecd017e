"""Which column of an Arrow schema holds image files; parquet and Arrow files say it alike."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from mipha.data.datasets._records import IMAGE_COLUMNS

if TYPE_CHECKING:
    import pyarrow


def import_pyarrow(wanted_for: str) -> ModuleType:
    """The package pyarrow, which is not installed with mipha itself.

    Raises:
        ModuleNotFoundError: It is not there; says how to install it.
    """
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        mend = 'pip install "mipha-vlm[data]"'
        raise ModuleNotFoundError(
            f"{wanted_for} is read with the package pyarrow, which is not installed: {mend}",
            name="pyarrow",
        ) from error
    return pyarrow


def image_column(schema: pyarrow.Schema, where: str) -> str | None:
    """The column whose cells hold the bytes of image files, or lists of them; null if none does.

    Raises:
        ValueError: There are several and none has a usual name.
    """
    names = [field.name for field in schema if _holds_bytes(field.type)]
    usual = [name for name in IMAGE_COLUMNS if name in names]
    if len(names) > 1 and not usual:
        raise ValueError(
            f"{where} has images in the columns {', '.join(names)}: rename the one that is meant to image"
        )
    return (usual or names or [None])[0]


def byte_columns(schema: pyarrow.Schema) -> frozenset[str]:
    """All columns that hold bytes: no record is made of what may be gigabytes."""
    return frozenset(field.name for field in schema if _holds_bytes(field.type))


def cell_bytes(cell: Any, where: str) -> bytes:
    """The bytes of an image cell: binary, or the `datasets` library's {"bytes", "path"}.

    Raises:
        ValueError: There are none.
    """
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise ValueError(
            f"{where} holds no bytes of an image; embed the image files when you write it"
        )
    return content


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)
