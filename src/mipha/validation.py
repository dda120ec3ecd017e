"""A tree of plain values checked against a schema: each wrong key is a line with its fix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from mipha.lookup import did_you_mean

Model = TypeVar("Model", bound=BaseModel)
_LONGEST = 100


def validated(schema: type[Model], tree: Any, source: str, kind: str) -> Model:
    """Return a tree of plain values as the schema's object.

    Args:
        source: Origin of the tree, for the message.
        kind: Kind of file, for the message: `recipe`.

    Raises:
        ValueError: Names the source and, a line each, the key, the value and the fix.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(problem, schema, kind) for problem in error.errors()]
        raise ValueError(f"{source} is not a valid {kind}:\n  " + "\n  ".join(lines)) from error


def _explain(problem: Any, schema: type[BaseModel], kind: str) -> str:
    # Pydantic marks a key of a mapping that is not valid with [key]; ours in brackets say which of
    # several schemas was chosen.
    *place, last = [part for part in problem["loc"] if not str(part).startswith("[")] or [""]
    key = ".".join(map(str, [*place, last]))

    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {did_you_mean(str(last), _fields_at(schema, place))}"
    value = "" if problem["type"] == "missing" or not key else f" (got {problem['input']!r})"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key or kind}: {message}{value if len(value) < _LONGEST else ''}"


def _fields_at(schema: type[BaseModel], place: list[int | str]) -> set[str]:
    """Return the keys that may stand at a place.

    An index, or a name that the user chose, leads no deeper into the schema.
    """
    schemas = [schema]
    for key in place:
        fields = [found.model_fields[key] for found in schemas if key in found.model_fields]
        schemas = [inner for field in fields for inner in _schemas_in(field.annotation)] or schemas
    return {name for found in schemas for name in found.model_fields}


def _schemas_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _schemas_in(inner)
