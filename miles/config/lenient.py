"""A configuration that is only looked at: what of it has the types that it should have."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import ValidationError

from miles.config.explain import explain_one
from miles.config.schema import RunConfig


def usable(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the tree without values of a wrong type or range, a line about each). Keys that this version doesn't know stay: another one wrote them."""
    try:
        RunConfig.model_validate(tree, strict=True)
    except ValidationError as error:
        wrong = [detail for detail in error.errors(include_url=False) if detail["type"] not in ("extra_forbidden", "missing")]
    else:
        return tree, []
    kept = copy.deepcopy(tree)
    for detail in wrong:
        _remove(kept, detail["loc"])
    return kept, [explain_one(detail, {}) for detail in wrong]


def _remove(tree: dict[str, Any], place: tuple[str | int, ...]) -> None:
    """Remove the value at a place; of a list's item the whole list."""
    *path, last = place
    for at, key in enumerate(path):
        inside = tree.get(str(key))
        if not isinstance(inside, dict):
            last = path[at]
            break
        tree = inside
    tree.pop(str(last), None)
