"""A tree of plain values checked against a schema: each wrong key is a line with its fix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mipha.lookup import did_you_mean, near_names

Model = TypeVar("Model", bound=BaseModel)
_LONGEST = 100

_WHOLE, _NUMBER, _GROUP = "must be a whole number", "must be a number", "must be a group of keys"
_WANTED = {
    "missing": "is missing",
    "int_parsing": _WHOLE,
    "int_type": _WHOLE,
    "int_from_float": _WHOLE,
    "float_parsing": _NUMBER,
    "float_type": _NUMBER,
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "model_type": _GROUP,
    "dict_type": _GROUP,
    "list_type": "must be a list",
    "tuple_type": "must be a list",
}
"""What pydantic's types of errors say of a key; a type that is not here keeps pydantic's words."""


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
        lines = [_explain(problem, schema, tree, kind) for problem in error.errors()]
        raise ValueError(f"{source} is not a valid {kind}:\n  " + "\n  ".join(lines)) from error


def _explain(problem: Any, schema: type[BaseModel], tree: Any, kind: str) -> str:
    # Pydantic marks a key of a mapping that is not valid with [key]; ours in brackets say which of
    # several schemas was chosen.
    *place, last = [part for part in problem["loc"] if not str(part).startswith("[")] or [""]
    key = ".".join(map(str, [*place, last]))

    if problem["type"] == "extra_forbidden":
        # The key may be right, and its place wrong: learning_rate is a key of a stage.
        known, elsewhere = _fields_at(schema, place), list(_places_of(str(last), schema, tree))
        if elsewhere and not near_names(str(last), known):
            return f"{key}: unknown key; did you mean {' or '.join(elsewhere)}?"
        return f"{key}: unknown key; {did_you_mean(str(last), known)}"
    hidden = problem["type"] in ("missing", "credential")
    value = "" if hidden or not key else f" (got {problem['input']!r})"
    if wanted := _WANTED.get(problem["type"]):
        message = wanted.format(**problem.get("ctx", {}))
    else:
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


def _places_of(name: str, schema: type[BaseModel], tree: Any, above: str = "") -> Iterator[str]:
    """Yield the dotted keys of this name that the schema has in the groups of a tree."""
    if not isinstance(tree, dict):
        return
    for key, field in schema.model_fields.items():
        path = f"{above}.{key}" if above else key
        if key == name:
            yield path

        # Its groups; those of a mapping, such as stages, have names of the user's.
        own = tree.get(key)
        groups = {path: own}
        if get_origin(field.annotation) is dict and isinstance(own, dict):
            groups = {f"{path}.{chosen}": group for chosen, group in own.items()}
        for inner in _schemas_in(field.annotation):
            for place, group in groups.items():
                yield from _places_of(name, inner, group, place)


def _schemas_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _schemas_in(inner)
