"""pydantic's errors in one line for a user: where, which key, what is wrong, and the mend."""

from __future__ import annotations

import difflib
import functools
import json
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from miles.config.schema import RunConfig
from miles.config.yaml_file import Key

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "one of {expected}",
}


def _optional(annotation: Any) -> tuple[Any, bool]:
    """The annotation without None, and whether None was allowed."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [arg for arg in get_args(annotation) if arg is not type(None)]
        return rest[0], len(rest) < len(get_args(annotation))
    return annotation, False


def without_none(annotation: Any) -> Any:
    """The annotation of a value that is given."""
    return _optional(annotation)[0]


@functools.cache
def fields() -> dict[Key, Any]:
    """Every key of RunConfig, sections included, to its pydantic field."""
    found: dict[Key, Any] = {}

    def visit(model: type[BaseModel], key: Key) -> None:
        for name, field in model.model_fields.items():
            found[(*key, name)] = field
            inner, _ = _optional(field.annotation)
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                visit(inner, (*key, name))

    visit(RunConfig, ())
    return found


@functools.cache
def section_keys() -> frozenset[Key]:
    """Keys of sections that cannot be null."""
    found = set()
    for key, field in fields().items():
        inner, optional = _optional(field.annotation)
        if not optional and isinstance(inner, type) and issubclass(inner, BaseModel):
            found.add(key)
    return frozenset(found)


def nearest_key(key: Key) -> str | None:
    """The dotted path that a wrong key most likely meant: a sibling, a public option's name, or the same name elsewhere."""
    from miles.config.options import public_paths

    name, known = key[-1], fields()
    siblings = [k[-1] for k in known if k[:-1] == key[:-1]]
    near = difflib.get_close_matches(name, siblings, 1, 0.75)
    if near:
        return ".".join((*key[:-1], near[0]))
    public = public_paths()
    near = difflib.get_close_matches(name.replace("_", "-"), list(public), 1, 0.85)
    if near:
        return public[near[0]]
    dotted = ".".join(key)
    near = difflib.get_close_matches(dotted, [".".join(k) for k in known], 1, 0.75)
    if near:
        return near[0]
    leaves = {k[-1]: k for k in reversed(list(known))}
    near = difflib.get_close_matches(name, list(leaves), 1, 0.75)
    return ".".join(leaves[near[0]]) if near else None


def explain(error: ValidationError, origin: Mapping[Key, str]) -> str:
    """One line about the first error; the number of the others in brackets."""
    errors = error.errors(include_url=False)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return explain_one(errors[0], origin) + more


def place(key: Key, origin: Mapping[Key, str]) -> str:
    """Where a key was written ("file:line", the flag, or the override), with ": " after it; empty when it is a default."""
    for length in range(len(key), 0, -1):
        if key[:length] in origin:
            return f"{origin[key[:length]]}: "
    return ""


def named(key: Key, origin: Mapping[Key, str]) -> str:
    """Where a key was written, and the key; once where an override says both."""
    dotted, at = ".".join(key), place(key, origin)
    return at if at.startswith(f"{dotted}=") else f"{at}{dotted}: "


def explain_one(detail: ErrorDetails, origin: Mapping[Key, str]) -> str:
    """One line about one of pydantic's errors."""
    key = tuple(str(part) for part in detail["loc"])
    dotted, at = ".".join(key), place(key, origin)
    if detail["type"] == "extra_forbidden":
        nearest = nearest_key(key)
        if nearest:
            below = [k[len(key) :] for k in origin if k[: len(key)] == key and len(k) > len(key)]
            if len(below) == 1 and (*nearest.split("."), *below[0]) in fields():  # a wrong section in a dotted path
                dotted, nearest = ".".join((*key, *below[0])), ".".join((nearest, *below[0]))
            return f"{at}{dotted}: unknown key; did you mean {nearest}?"
        parent = ".".join(key[:-1])
        siblings = ", ".join(k[-1] for k in fields() if k[:-1] == key[:-1])
        return f"{at}{dotted}: unknown key; {parent or 'the top level'} has {siblings}"
    if detail["type"] == "refused":  # miles.config.raw_options says it whole
        return f"{named(key, origin)}{detail['msg']}"
    context = detail.get("ctx", {})
    expected = EXPECTED.get(detail["type"], detail["msg"]).format(**context) if detail["type"] in EXPECTED else detail["msg"]
    given = detail["input"]
    mend = ""
    if detail["type"] == "literal_error":
        choices = [choice.strip("' ") for choice in str(context["expected"]).replace(" or ", ",").split(",")]
        expected = "one of " + ", ".join(choices)
        near = difflib.get_close_matches(str(given), choices, 1, 0.6)
        mend = f"; did you mean {near[0]}?" if near else ""
    return f"{named(key, origin)}expected {expected}, got {_shown(given)}{mend}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
