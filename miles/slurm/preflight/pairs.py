"""Who is paired with whom: every round pairs all nodes once (the circle method), so that no measurement disturbs another's nodes."""

from __future__ import annotations


def rounds(number: int, most: int) -> list[list[tuple[int, int]]]:
    """Up to `most` rounds of disjoint pairs (smaller index first) of `number` nodes; all pairs, each once, when most >= number - 1."""
    seats: list[int | None] = [*range(number), *([None] if number % 2 else [])]
    found = []
    for _ in range(min(len(seats) - 1, most)):
        half = len(seats) // 2
        pairs = [(a, b) for a, b in zip(seats[:half], reversed(seats[half:]), strict=True) if a is not None and b is not None]
        found.append([(min(pair), max(pair)) for pair in pairs])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def partner(pairs: list[tuple[int, int]], me: int) -> int | None:
    """Whom a node has in a round; None where their number is odd and it sits out."""
    return next((b if a == me else a for a, b in pairs if me in (a, b)), None)
