"""The public option names of miles and slime: options.yaml as a table, a command line as settings."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def public_paths() -> dict[str, str]:
    return {}
def flag_values(flags: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    yield from ()
