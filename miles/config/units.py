"""Sizes as people write them."""

from __future__ import annotations

import re

from pydantic_core import PydanticCustomError

SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kKMGTP])(i?))?B?\s*")


def bytes_of(text: str) -> int:
    """Bytes of a text: 1500, 200GB (powers of 1000), 1.5TiB (powers of 1024); a B may be left out. Raises what pydantic tells on."""
    found = SIZE.fullmatch(text)
    if found is None:
        raise PydanticCustomError("size", "a number of bytes, or text such as 200GB or 1.5TiB")
    number, prefix, binary = found.groups()
    return round(float(number) * (1024 if binary else 1000) ** ("KMGTP".index(prefix.upper()) + 1 if prefix else 0))
