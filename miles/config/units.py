"""Sizes as people write them."""

from __future__ import annotations

import re

from pydantic_core import PydanticCustomError

TIME = re.compile(r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?|(?P<first>\d+)(?::(?P<second>\d+)(?::(?P<third>\d+))?)?)")
UNLIMITED = ("unlimited", "infinite")
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kKMGTP])(i?))?B?\s*")


def bytes_of(text: str) -> int:
    """Bytes of a text: 1500, 200GB (powers of 1000), 1.5TiB (powers of 1024); a B may be left out. Raises what pydantic tells on."""
    found = SIZE.fullmatch(text)
    if found is None:
        raise PydanticCustomError("size", "a number of bytes, or text such as 200GB or 1.5TiB")
    number, prefix, binary = found.groups()
    return round(float(number) * (1024 if binary else 1000) ** ("KMGTP".index(prefix.upper()) + 1 if prefix else 0))


def minutes_of(text: str) -> float | None:
    """Minutes of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None for UNLIMITED. Raises what pydantic tells on."""
    if text.strip().lower() in UNLIMITED:
        return None
    found = TIME.fullmatch(text.strip())
    if found is None:
        raise PydanticCustomError("time", "a time as Slurm writes it: minutes, H:M:S, D-H or D-H:M:S")
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    if found["days"] is not None:
        return (part["days"] * 24 + part["h"]) * 60 + part["m"] + part["s"] / 60
    if found["third"] is not None:
        return part["first"] * 60 + part["second"] + part["third"] / 60
    return part["first"] + part["second"] / 60


def hours(minutes: float) -> str:
    """A length of time for a reader: 40 min, 4 h, 2 h 30 min, 3 d 4 h."""
    whole = round(minutes)
    days, rest = divmod(whole, 24 * 60)
    found = [f"{number} {unit}" for number, unit in ((days, "d"), (rest // 60, "h"), (rest % 60, "min")) if number]
    return " ".join(found[:2]) or ("under a minute" if minutes > 0 else "0 min")
