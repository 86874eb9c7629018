"""Slurm's notation of several nodes, such as train[0-3,08-10],login: without asking Slurm, where every millisecond before a start counts."""

from __future__ import annotations

import re


def expand(text: str) -> list[str]:
    """The names, in the order in which they stand."""
    found = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        prefix, bracket, rest = item.partition("[")
        if not bracket:
            found.append(item)
            continue
        ranges, _, rest = rest.partition("]")
        ends = expand(rest) if rest else [""]
        for part in ranges.split(","):
            low, _, high = part.partition("-")
            found += [f"{prefix}{number:0{len(low)}}{end}" for number in range(int(low), int(high or low) + 1) for end in ends]
    return found
